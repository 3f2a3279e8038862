"""What the command lines share: arguments, configs, and errors that a user can act on, in one line."""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

from mmcv.transforms import LoadImageFromFile as _LoadImageFromFile
from mmengine.config import Config, DictAction
from mmengine.device import is_cuda_available
from mmengine.registry import TRANSFORMS


class BadInput(Exception):
    """Something the user gave is wrong; the message is one line that names it and the way out."""


def argument_parser(description: str, **kwargs) -> argparse.ArgumentParser:
    """A parser with the arguments that OpenMMLab's tools have in common."""
    parser = argparse.ArgumentParser(description=description, **kwargs)
    parser.add_argument("config", help="path of a config, or package::path, as mmdet::retinanet/...")
    parser.add_argument("--work-dir", help="where logs and checkpoints go (default: work_dirs/<config's name>)")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="override settings, as key=value")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """The config with the common arguments applied; a `BadInput` where it cannot be read."""
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    try:
        cfg = Config.fromfile(args.config)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise BadInput(f"cannot read the config {args.config}: {type(error).__name__} {reason}") from error
    cfg.merge_from_dict(args.cfg_options or {})
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or os.path.join("work_dirs", Path(args.config).stem)
    if not is_cuda_available():
        cfg.merge_from_dict({"env_cfg.dist_cfg.backend": "gloo"})
    return cfg


def data_files(loader: dict | None) -> Iterator[str]:
    """The files and folders that the datasets of a dataloader's config read, wrapped datasets too."""
    if not isinstance(loader, dict):
        return
    for key in ("dataset", "datasets"):
        inner = loader.get(key)
        for dataset in inner if isinstance(inner, (list, tuple)) else [inner]:
            yield from data_files(dataset)
    prefix = loader.get("data_prefix") or {}
    prefix = prefix if isinstance(prefix, dict) else {"": prefix}
    names = [name for name in (loader.get("ann_file"), *prefix.values()) if isinstance(name, str) and name]
    root = loader.get("data_root") or ""
    yield from (os.path.join(root, name) for name in names)
    if root and not names:
        yield root


def check_data(cfg: Config, *splits: str) -> None:
    """Raise `BadInput` if data of `splits` ("train", "val", "test") is not there, with the command that prepares it."""
    for split in splits:
        for path in data_files(cfg.get(f"{split}_dataloader")):
            if "://" not in path and not os.path.exists(path):
                way = f"run: {cfg.prepare_data}" if "prepare_data" in cfg else "see the README for where data belongs"
                raise BadInput(f"the {split} data {path} is not there; {way}")


@TRANSFORMS.register_module(force=True)
class LoadImageFromFile(_LoadImageFromFile):
    """mmcv's loader, which here names the file that it cannot read and refuses one whose end is missing."""

    def transform(self, results: dict) -> dict | None:
        path = results["img_path"]
        try:
            loaded = super().transform(results)
        except Exception as error:
            raise BadInput(f"cannot read the image {path}: {type(error).__name__} {error}".splitlines()[0]) from error
        if os.path.isfile(path) and is_truncated(Path(path).read_bytes()):
            raise BadInput(f"the image {path} is truncated: replace it, or take it out of the annotations")
        return loaded


def is_truncated(image: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end marker. Decoders fill the missing part with grey and say nothing."""
    if image.startswith(b"\xff\xd8"):
        return image.rfind(b"\xff\xd9") < image.rfind(b"\xff\xda")  # end of image, start of the last scan
    return image.startswith(b"\x89PNG") and b"IEND" not in image


def explain(error: BaseException, cfg: Config | None) -> str | None:
    """The line to print in place of a traceback, or None if the error is not one of the user's input."""
    if isinstance(error, BadInput):  # a DataLoader worker's error arrives with its traceback as the message
        return str(error).strip().splitlines()[-1].removeprefix(f"{BadInput.__module__}.BadInput: ")
    if isinstance(error, json.JSONDecodeError) and cfg is not None:
        for split in ("train", "val", "test"):
            for path in data_files(cfg.get(f"{split}_dataloader")):
                if os.path.isfile(path) and not _is_json(path):
                    return f"the annotation file {path} is not valid JSON: {error}"
    return None


def _is_json(path: str) -> bool:
    try:
        json.loads(Path(path).read_bytes())
    except ValueError:
        return False
    return True
