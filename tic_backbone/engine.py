"""What the command lines add to mmengine's runner: readable errors, a checkpoint when interrupted, curves.

Importing this module registers the hooks, the strict image loader and bfloat16 training on CPUs.
"""

import json
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mmcv.transforms import LoadImageFromFile as _LoadImageFromFile
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, TRANSFORMS
from mmengine.runner import Runner


class BadInput(Exception):
    """Something the user gave is wrong; the message is one line that names it and the way out."""


@TRANSFORMS.register_module(force=True)
class LoadImageFromFile(_LoadImageFromFile):
    """mmcv's loader, which names the file that it cannot read and refuses one whose end is missing."""

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


@HOOKS.register_module()
class InterruptHook(Hook):
    """On Ctrl-C or SIGTERM finish the iteration, save a checkpoint and leave; on the second Ctrl-C leave at once.

    During validation the checkpoint comes at its end: until then averaged weights may stand in for the trained ones.
    Only the main process acts. The launcher ends the others, which a lone exit could leave waiting in a collective.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        self.signal: int | None = None

    def before_run(self, runner: Runner) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._note)

    def after_run(self, runner: Runner) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self._leave(runner, iterations=runner.iter + 1)

    def after_val_epoch(self, runner: Runner, metrics=None) -> None:
        self._leave(runner, iterations=runner.iter)

    def _note(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def _leave(self, runner: Runner, iterations: int) -> None:
        if self.signal is not None and is_main_process():
            path = save_interrupted(runner, iterations)
            runner.logger.info(f"Interrupted. Saved {path}; the same command with --resume goes on from it.")
            raise SystemExit(128 + self.signal)


def save_interrupted(runner: Runner, iterations: int) -> str:
    """Save all that --resume needs after `iterations` optimizer steps. An epoch begun is begun again on resuming."""
    runner.save_checkpoint(runner.work_dir, "interrupted.pth", meta=dict(epoch=runner.epoch, iter=iterations))
    path = os.path.join(runner.work_dir, "interrupted.pth")
    Path(runner.work_dir, "last_checkpoint").write_text(path)
    return path


@HOOKS.register_module()
class CurvesHook(Hook):
    """Draw loss and validation metrics of all runs in the work dir so far into ``curves.png``."""

    priority = "LOWEST"

    def after_val_epoch(self, runner: Runner, metrics=None) -> None:
        self._draw(runner)

    def after_train(self, runner: Runner) -> None:
        self._draw(runner)

    def _draw(self, runner: Runner) -> None:
        if is_main_process():
            curves = read_curves(sorted(Path(runner.work_dir).glob("*/vis_data/scalars.json")))
            plot_curves(curves, Path(runner.work_dir, "curves.png"))


def read_curves(logs: list[Path]) -> dict[str, dict[int, float]]:
    """Each logged scalar over its step. Where a resumed run repeats steps, the later log counts."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for log in logs:
        for line in log.read_text().splitlines():
            record = json.loads(line)
            for name, value in record.items():
                if isinstance(value, (int, float)) and "step" in record:
                    curves[name][record["step"]] = value
    return dict(curves)


def plot_curves(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Losses over iterations on the left, validation metrics (whose names have a slash) over their steps on the right."""
    losses = {name: curve for name, curve in curves.items() if "loss" in name and "/" not in name}
    metrics = {name: curve for name, curve in curves.items() if "/" in name and min(curve.values()) >= 0}
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, group, title in zip(figure.subplots(1, 2), (losses, metrics), ("training loss", "validation")):
        for name, curve in group.items():
            steps = sorted(curve)
            axes.plot(steps, [curve[s] for s in steps], marker="." if len(steps) < 100 else "", label=name)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if group:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision where there is no GPU: autocast to bfloat16, which needs no loss scaling."""

    def optim_context(self, model: torch.nn.Module):
        context = super().optim_context(model)
        return torch.autocast("cpu", torch.bfloat16) if isinstance(context, nullcontext) else context


def read_config(path: str) -> Config:
    """A config by path or as ``mmdet::...``, ``mmpretrain::...``; a `BadInput` where that fails."""
    try:
        return Config.fromfile(path)
    except FileNotFoundError as error:
        raise BadInput(f"there is no config {path}: {error}".splitlines()[0]) from error
    except Exception as error:
        raise BadInput(f"cannot read the config {path}: {type(error).__name__} {error}".splitlines()[0]) from error


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


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Raise `BadInput` if data of `splits` ("train", "val", "test") is not there, with the command that prepares it."""
    for split in splits:
        for path in data_files(cfg.get(f"{split}_dataloader")):
            if "://" not in path and not os.path.exists(path):
                way = f"run: {cfg.prepare_data}" if "prepare_data" in cfg else "see the README for where data belongs"
                raise BadInput(f"the {split} data {path} is not there; {way}")


def explain(error: BaseException, cfg: Config) -> str | None:
    """The line to print in place of a traceback, or None if the error is not one of the user's input."""
    if isinstance(error, BadInput):  # a DataLoader worker's error arrives with its traceback as the message
        return str(error).strip().splitlines()[-1].removeprefix(f"{BadInput.__module__}.BadInput: ")
    if isinstance(error, json.JSONDecodeError):
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
