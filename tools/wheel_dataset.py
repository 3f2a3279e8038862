"""What the tools that make datasets share: one pinned wheel as source, a folder that appears whole or not at all.

The wheel is opened, never installed, so one file serves every machine and every version of Python.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wheel:
    """One file on PyPI."""

    package: str  # name==version
    sha256: str
    megabytes: int
    choice: tuple[str, ...] = ()  # pip's arguments that name this one of several wheels of the version

    def download(self, folder: Path) -> Path:
        """Fetch it by pip into `folder`, where pip's temporary files go too, to vanish with it."""
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--ignore-requires-python", *self.choice, "--dest", str(folder)]
        env = {**os.environ, "TMPDIR": str(folder)}
        pip = subprocess.run([*command, self.package], capture_output=True, text=True, errors="replace", env=env)
        wheels = list(folder.glob("*.whl"))
        if pip.returncode or not wheels:
            reason = (pip.stderr.strip() or f"exit code {pip.returncode}").splitlines()[-1]
            raise OSError(f"pip could not download {self.package}: {reason} (--wheel takes a copy from elsewhere)")
        return wheels[0]

    def check(self, path: Path) -> None:
        """Raise ValueError unless the file at `path` is, byte for byte, the wheel that the tool knows."""
        with path.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != self.sha256:
            command = " ".join(["pip download --no-deps", *self.choice, self.package])
            raise ValueError(
                f"{path}: wrong sha256: expected {self.sha256}, got {got}; damaged or another version: "
                f"run without --wheel, or `{command}` again"
            )


def for_platform(platform: str) -> tuple[str, ...]:
    """pip's arguments that name a compiled package's wheel of CPython 3.11 on `platform`, whatever asks for it."""
    return ("--platform", platform, "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311")


@dataclass(frozen=True)
class Recipe:
    """How a tool makes its dataset out of what a wheel carries."""

    made_by: str  # in the manifest, the proof that a folder may be replaced
    out: str  # the dataset's folder, unless the user gives another
    wheel: Wheel
    files: re.Pattern  # everything it writes, as paths in the dataset
    read: Callable[[zipfile.ZipFile], Any]  # what the dataset is made of
    write: Callable[[Any, Path], None]  # fill a new folder with the dataset made of that
    count: Callable[[Path], dict[str, dict]]  # what lies in such a folder, by split
    told: tuple[str, ...]  # the counts that a user is told
    settings: dict  # what else decides the content

    def manifest(self, folder: Path) -> dict:
        """What decides a dataset's content, and what lies in `folder`."""
        made = {"made_by": self.made_by, "wheel_sha256": self.wheel.sha256, **self.settings}
        return {**made, "splits": self.count(folder)}

    def is_current(self, out: Path) -> bool:
        """Whether `out` holds, complete, what a run would write."""
        try:
            return json.loads((out / "manifest.json").read_bytes()) == self.manifest(out)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def check_replaceable(self, out: Path) -> None:
        """Raise ValueError where replacing `out` could delete anything that this tool did not write."""
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        manifest = out / "manifest.json"
        if not (manifest.is_file() and self.made_by in manifest.read_text(errors="replace")):
            raise ValueError(
                f"{out}: exists, without a manifest of this tool, so it stays as it is: "
                "give another --out, or move it away"
            )
        for path in out.rglob("*"):
            if not self.files.fullmatch(path.relative_to(out).as_posix()):
                raise ValueError(f"{path}: not made by this tool, so {out} stays as it is: move that file away")

    def prepare(self, out: Path, wheel: Path | None) -> None:
        """Write the dataset to `out` unless it is there; `out` is only touched once the new one is complete."""
        if self.is_current(out):
            print(f"{out} is complete: nothing to do")
            return
        self.check_replaceable(out)
        with tempfile.TemporaryDirectory() as scratch:
            if wheel is None:
                print(f"downloading {self.wheel.package} ({self.wheel.megabytes} MB) with pip", flush=True)
                wheel = self.wheel.download(Path(scratch))
            self.wheel.check(wheel)
            content = read_archive(wheel, self.read)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as sibling:
            new, old = Path(sibling, "new"), Path(sibling, "old")
            self.write(content, new)
            manifest = self.manifest(new)
            (new / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            self.check_replaceable(out)  # again: a file may have been put there meanwhile
            if out.exists():
                out.rename(old)
            new.rename(out)
        told = [f"{split} {'/'.join(str(n[key]) for key in self.told)}" for split, n in manifest["splits"].items()]
        print(f"wrote {out}: {'/'.join(self.told)}: {', '.join(told)}")


def read_archive(path: Path, read: Callable[[zipfile.ZipFile], Any]) -> Any:
    """What `read` makes of the wheel at `path`; ValueError where the archive or a member is unreadable."""
    try:
        with zipfile.ZipFile(path) as archive:
            return read(archive)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, SyntaxError, ValueError, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error  # SyntaxError: broken XML or PNG


def count_files(*folders: Path) -> dict[str, int | str]:
    """How many files lie in `folders`, and a digest of their folders, names and sizes: one gone or cut short shows."""
    paths = sorted(path for folder in folders for path in folder.iterdir())
    listing = "\n".join(f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in paths)
    return {"files": len(paths), "listing_sha256": hashlib.sha256(listing.encode()).hexdigest()}


def main(recipe: Recipe, description: str, argv: list[str] | None) -> int:
    """The command line of a tool. Exit code: 0 done, 1 an error in one line on stderr, 130 interrupted."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(recipe.out), help="default: %(default)s")
    parser.add_argument("--wheel", type=Path, help=f"local copy of {recipe.wheel.package}, instead of the network")
    args = parser.parse_args(argv)
    try:
        recipe.prepare(args.out.resolve(), args.wheel)
    except (OSError, ValueError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run(tool: Callable[[], int]) -> None:
    """Leave the process with what `tool` returns; `kill` cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(tool())
