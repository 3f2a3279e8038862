"""What the command lines share: arguments, configs, and errors that a user can act on, in one line."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config, DictAction
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.device import is_cuda_available
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torch import nn

from tic_backbone.checkpoint import load_weights, local_file
from tic_backbone.openmmlab import read_mm_checkpoint
from tic_backbone.swap import swap_backbone

PACKAGE = Path(__file__).parent
MODULE2PACKAGE["mmseg"] = "mmseg"  # look for the module: its distribution has another name in the forks


class BadInput(Exception):
    """Something the user gave is wrong; the message is one line that names it and the way out."""


def argument_parser(description: str, **kwargs) -> argparse.ArgumentParser:
    """A parser with the arguments that OpenMMLab's tools have in common."""
    parser = argparse.ArgumentParser(description=description, **kwargs)
    parser.add_argument("config", help="path of a config, or package::path, as mmdet::retinanet/...")
    parser.add_argument(
        "--backbone", help="put TiC in the place of the config's backbone: tic_nano, tic_tiny, tic_small or tic_base"
    )
    parser.add_argument("--work-dir", help="where logs and checkpoints go (default: work_dirs/<config's name>)")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="override settings, as key=value")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """The config with the common arguments applied, --cfg-options last; a `BadInput` where it cannot be read."""
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = _read(args.config)
    name = Path(args.config).stem
    if args.backbone:
        cfg, name = swap_backbone(cfg, args.backbone), f"{name}_{args.backbone}"
    try:
        cfg.merge_from_dict(args.cfg_options or {})
    except Exception as error:
        raise BadInput(f"cannot apply --cfg-options {args.cfg_options}: {type(error).__name__} {error}") from error
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or os.path.join("work_dirs", name)
    if args.launcher == "pytorch" and not is_cuda_available():  # mmengine would ask for a GPU in both steps
        torch.distributed.init_process_group("gloo")
        cfg.model_wrapper_cfg = dict(
            type="MMDistributedDataParallel",
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get("find_unused_parameters", False),
        )
    return cfg


def _read(config: str) -> Config:
    try:
        return get_config(config) if "::" in config else Config.fromfile(config)
    except Exception as error:
        raise BadInput(f"cannot read the config {config}: {type(error).__name__} {error}") from error


def load_backbone(model: str, checkpoint: str = "", size: int = 224) -> tuple[nn.Module, Callable]:
    """A backbone in eval mode, and a function from photos, (N, 3, H, W), to its last map, (N, C, h, w).

    The function takes RGB from 0 to 1, and normalizes it as the model wants.

    Args:
        model: a config, as `read_config` takes them, whose backbone is meant, or a model of timm's by name.
        checkpoint: weights of the whole model; without one they are random, the same at every call.
        size: px a side of the images, for those of timm's models that are made for one.

    Raises:
        BadInput: if there is no such model, or the checkpoint lacks a weight of the backbone.
    """
    torch.manual_seed(0)
    if model.endswith(".py"):
        cfg = _read(model)
        cfg.model.setdefault("data_preprocessor", cfg.get("data_preprocessor"))  # as mmengine's runner does
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope")):
            whole = MODELS.build(cfg.model)
        if not hasattr(whole, "backbone"):
            raise BadInput(f"the model of {model}, a {type(whole).__name__}, has no backbone")
        backbone, prefix = whole.backbone, "backbone."
        last = lambda images: backbone(images)[-1]  # noqa: E731
        wanted = cfg.model.data_preprocessor or {}
        order = [0, 1, 2] if wanted.get("bgr_to_rgb") or wanted.get("to_rgb") else [2, 1, 0]
        unit, mean, std = 255, wanted.get("mean") or [0.0], wanted.get("std") or [1.0]
    else:
        import timm

        import tic_backbone.timm  # noqa: F401 - so that timm knows TiC

        if not timm.is_model(model):
            raise BadInput(f"{model} is neither a config (.py) nor a model that timm knows")
        try:
            whole = timm.create_model(model, num_classes=0, img_size=size)
        except TypeError:  # of models that take any size
            whole = timm.create_model(model, num_classes=0)
        backbone, prefix = whole, ""
        last = lambda images: whole.forward_intermediates(images, indices=1, intermediates_only=True)[-1]  # noqa: E731
        wanted = timm.data.resolve_model_data_config(whole)
        order, unit, mean, std = [0, 1, 2], 1, wanted["mean"], wanted["std"]
    if checkpoint:
        report = load_weights(whole, read_mm_checkpoint(checkpoint))
        if lacking := [name for name in (*report.missing, *report.mismatched) if name.startswith(prefix)]:
            raise BadInput(f"{checkpoint} lacks weights of the backbone, which would stay random: {lacking}")
    whole.eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return backbone, lambda photos: last((unit * photos[:, order] - mean) / std)


def to_tensor(photo: Image.Image) -> torch.Tensor:
    """(3, H, W), RGB from 0 to 1."""
    return torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1) / 255


def check_data(cfg: Config, *splits: str) -> None:
    """Raise `BadInput` if a config that says how its data is prepared lacks data of `splits` ("train", "val", ...)."""
    for path in data_files(cfg, *splits):
        if "prepare_data" in cfg and not os.path.exists(path):
            raise BadInput(f"the data {path} is not there; run: {cfg.prepare_data}")


def checked_checkpoint(path: str) -> str:
    """The local path of a checkpoint; raises unless it can be read without running code in it, as mmengine may do."""
    if path.endswith(".safetensors"):
        raise BadInput(f"mmengine cannot read {path}: make a .pth of it with tools/convert_checkpoint.py")
    path = str(local_file(path))
    read_mm_checkpoint(path)
    return path


def data_files(cfg: Config, *splits: str) -> Iterator[str]:
    """The files and folders that the dataloaders and evaluators of a config read."""
    for split in splits:
        for part in (cfg.get(f"{split}_dataloader"), cfg.get(f"{split}_evaluator")):
            yield from _named_files(part)


def _named_files(part) -> Iterator[str]:
    if isinstance(part, (list, tuple)):
        for item in part:
            yield from _named_files(item)
    elif isinstance(part, dict):
        yield from _named_files([part.get("dataset"), part.get("datasets")])
        prefix = part.get("data_prefix") or {}
        names = [part.get("ann_file"), *(prefix.values() if isinstance(prefix, dict) else [prefix])]
        yield from (os.path.join(part.get("data_root") or "", n) for n in names if isinstance(n, str) and n)


@contextmanager
def readable_errors(cfg: Config | None = None) -> Iterator[None]:
    """Turn errors of the user's input into one line and exit code 1; all others keep their traceback."""
    try:
        yield
    except Exception as error:
        line = explain(error, cfg)
        if line is None:
            raise
        sys.exit("error: " + " ".join(line.split()))


def explain(error: BaseException, cfg: Config | None) -> str | None:
    """What to print in place of a traceback, or None if the error is not one of the user's input."""
    if isinstance(error, BadInput):  # a DataLoader worker's error arrives with its traceback as the message
        return str(error).rsplit(f"{BadInput.__module__}.BadInput: ")[-1]
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) and cfg is not None:
        for path in data_files(cfg, "train", "val", "test"):
            if path.endswith(".json") and os.path.isfile(path) and not _is_json(path):
                return f"the annotation file {path} is not valid JSON: {error}"
    if isinstance(error, FileNotFoundError) or (isinstance(error, (TypeError, ValueError)) and _is_ours(error)):
        return str(error)
    return None


def _is_json(path: str) -> bool:
    try:
        json.loads(Path(path).read_bytes())
    except ValueError:
        return False
    return True


def _is_ours(error: BaseException | None) -> bool:
    """Whether a check in this package raised the error, or the one that mmengine's registry wrapped into it."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(PACKAGE):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_truncated(image: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end marker. Decoders fill the missing part with grey and say nothing."""
    if image.startswith(b"\xff\xd8"):
        return not _ends(image)
    return image.startswith(b"\x89PNG") and b"IEND" not in image


def _ends(jpeg: bytes) -> bool:
    """Whether the end marker comes, walking from marker to marker. A phone's film behind it is no part."""
    at = 2
    while 0 <= (at := jpeg.find(b"\xff", at)) < len(jpeg) - 1:
        kind = jpeg[at + 1]
        if kind == 0xD9:
            return True
        if kind == 0xFF:  # a filling byte
            at += 1
        elif kind in (0x00, 0x01) or 0xD0 <= kind <= 0xD8:  # of a scan's data, or a marker without a length
            at += 2
        else:
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return False


def _strict(load: Callable) -> Callable:
    def transform(self, results: dict) -> dict | None:
        path = results["img_path"]
        try:
            loaded = load(self, results)
        except Exception as error:
            raise BadInput(f"cannot read the image {path}: {type(error).__name__} {error}") from error
        if loaded is not None and os.path.isfile(path) and is_truncated(Path(path).read_bytes()):
            raise BadInput(f"the image {path} is truncated: replace it or leave it out")
        return loaded

    return transform


# Under these command lines mmcv's loader names the file it cannot read. Replaced in the class itself, as mmdet, mmseg
# and mmpretrain each find it through a registry of their own.
LoadImageFromFile.transform = _strict(LoadImageFromFile.transform)
