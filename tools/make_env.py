"""Build the environment: a venv with the pinned versions of requirements.txt and this project in editable form.

    python3 tools/make_env.py .venv

Needs nothing but the standard library. Does nothing when the environment stands, and goes on where it was stopped.
mmcv comes as source, so its operators are compiled here: everything that this takes is checked before.
"""

from __future__ import annotations  # an old Python must get as far as saying that it is too old

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "requirements.txt"
PYTHONS = ((3, 11), (3, 13))  # tried with 3.11; the pinned versions have wheels for the other two
GIGABYTES = 10  # 6 stay, the rest is needed while installing
BUILD = ("torch", "torchvision", "numpy", "ninja", "psutil", "wheel", "packaging", "setuptools")  # for mmcv's setup.py


def obstacles(venv: Path) -> list[str]:
    """What stands in the way of building the environment, one readable line each."""
    found = []
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        low, high = (".".join(map(str, version)) for version in PYTHONS)
        found.append(
            f"Python {sys.version.split()[0]} at {sys.executable}: need {low} to {high}, "
            "name one with `make PYTHON=/path/to/python3.11`"
        )
    if importlib.util.find_spec("ensurepip") is None:
        found.append("Python has no venv module: install it (Debian: python3-venv)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        found.append("Python's headers are missing, mmcv needs them: install them (Debian: python3-dev)")
    if not compiles(os.environ.get("CXX", "g++")):
        found.append("no C++17 compiler, mmcv needs one: install g++ 9 or newer, or set CXX (Debian: g++)")
    gpu = Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    if gpu and not (shutil.which("nvcc") or os.environ.get("CUDA_HOME")):
        found.append(
            "there is a GPU but no CUDA toolkit, which mmcv's operators need: install the toolkit of torch's CUDA "
            "version, or build for the CPU alone with CUDA_VISIBLE_DEVICES= (set, and empty) before the command"
        )
    free = shutil.disk_usage(venv.parent).free / 1e9
    if not venv.exists() and free < GIGABYTES:
        found.append(f"{free:.0f} GB free at {venv.parent}: need {GIGABYTES}")
    return found


def compiles(compiler: str) -> bool:
    """Whether `compiler` builds a C++17 source."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <optional>\nint main() { return std::optional<int>(0).value(); }\n")
        command = [compiler, "-std=c++17", "-fsyntax-only", str(source)]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False


def install(venv: Path) -> None:
    """Install every pin into `venv`, mmcv after what its build needs."""
    python, version = str(venv / "bin" / "python"), ".".join(map(str, sys.version_info[:3]))

    def pip(*args: str, **env: str) -> None:
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *args]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **env})

    # Made anew where another Python made it, completed where it was left half made.
    same = (venv / "pyvenv.cfg").is_file() and f"version = {version}" in (venv / "pyvenv.cfg").read_text()
    subprocess.run([sys.executable, "-m", "venv", *([] if same else ["--clear"]), str(venv)], check=True)
    pins = ("--constraint", str(PINS))
    say("installing torch (about 3 GB to download)")
    pip(*pins, *BUILD)
    say("compiling mmcv's operators (12 to 20 minutes on 2 cores; nothing is printed meanwhile)")
    pip(*pins, "--no-build-isolation", "--no-deps", "onedl-mmcv", MAX_JOBS=str(os.cpu_count()))
    say("installing the rest")
    pip("--requirement", str(PINS))
    # Two distributions write the folder cv2; the headless one must be last, as it needs no libGL from the system.
    headless = next(line for line in PINS.read_text().splitlines() if line.startswith("opencv-python-headless"))
    pip("--force-reinstall", "--no-deps", headless)
    pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    subprocess.run([python, "-c", "import mmcv.ops, mmdet, mmpretrain, mmseg, tic_backbone.openmmlab"], check=True)


def say(line: str) -> None:
    print(f"environment: {line}", flush=True)


def main() -> None:
    venv = Path(sys.argv[1] if len(sys.argv) > 1 else ".venv").absolute()
    stamp = venv / ".complete"
    want = hashlib.sha256(PINS.read_bytes() + sys.version.encode() + str(ROOT).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == want:
        return
    problems = obstacles(venv)
    if problems:
        sys.exit("cannot build the environment:\n" + "\n".join(f"  * {line}" for line in problems))
    try:
        install(venv)
    except subprocess.CalledProcessError as error:
        sys.exit(f"environment: this failed, see above: {' '.join(error.cmd)}\nThe same command goes on from here.")
    stamp.write_text(want)
    say(f"ready in {venv}")


if __name__ == "__main__":
    main()
