"""What mmengine's training loop gets from this project: a checkpoint when interrupted, curves, bfloat16 on CPUs."""

import json
import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner


class InterruptHook(Hook):
    """On Ctrl-C or SIGTERM finish the iteration, save a checkpoint and leave; on the second Ctrl-C leave at once.

    A validation is finished first: until its end averaged weights may stand in for the trained ones. Only the main
    process acts. The launcher ends the others, which a lone exit could leave waiting in a collective.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        self.signal: int | None = None
        self.process = os.getpid()

    def before_run(self, runner: Runner) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def after_run(self, runner: Runner) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self._leave(runner, iterations=runner.iter + 1)

    def after_val_epoch(self, runner: Runner, metrics=None) -> None:
        self._leave(runner, iterations=runner.iter)

    def _note(self, number: int, frame) -> None:
        if os.getpid() != self.process:  # a data loader's worker, forked with this handler: the main process decides
            if number == signal.SIGTERM:
                os._exit(128 + number)
        elif self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.signal = number
            os.write(2, b"\nstopping as soon as a checkpoint is saved; Ctrl-C again stops at once\n")

    def _leave(self, runner: Runner, iterations: int) -> None:
        if self.signal is not None and is_main_process():
            runner.logger.info(f"Interrupted. {save_interrupted(runner, iterations)}")
            raise SystemExit(128 + self.signal)


def train(cfg: Config) -> None:
    """Train, and save what was trained if anything stops it."""
    runner, interrupt = Runner.from_cfg(cfg), InterruptHook()
    runner.register_hook(CurvesHook())
    runner.register_hook(interrupt)
    try:
        runner.train()
    except Exception:
        if runner.iter > 0 and runner.model.training and is_main_process():
            why = "Interrupted" if interrupt.signal else "Stopped by an error"
            runner.logger.error(f"{why}. {save_interrupted(runner, runner.iter)}")
        if interrupt.signal is None:
            raise
        raise SystemExit(128 + interrupt.signal) from None  # the signal killed a worker or another process first


def save_interrupted(runner: Runner, iterations: int) -> str:
    """Save all that --resume needs after `iterations` optimizer steps, and say so in a sentence.

    On resuming, an epoch that had begun is begun again. To be called last, and not while validating, when averaged
    weights may stand in for the trained ones.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or a data loader's dying worker would stop the saving
    path = Path(runner.work_dir, "interrupted.pth")
    part = path.with_suffix(".part")  # an earlier one stays whole until this one is
    runner.save_checkpoint(runner.work_dir, part.name, meta=dict(epoch=runner.epoch, iter=iterations))
    part.replace(path)
    path.with_name("last_checkpoint").write_text(str(path))
    return f"What was trained is in {path}; the same command with --resume goes on from it."


class CurvesHook(Hook):
    """Draw loss and validation metrics of all runs in the work dir so far into ``curves.png``."""

    priority = "LOWEST"

    def after_val_epoch(self, runner: Runner, metrics=None) -> None:
        self._draw(runner)

    def after_train(self, runner: Runner) -> None:
        self._draw(runner)

    def _draw(self, runner: Runner) -> None:
        if is_main_process():
            losses, metrics = read_curves(sorted(Path(runner.work_dir).glob("*/vis_data/scalars.json")))
            plot_curves(losses, metrics, Path(runner.work_dir, "curves.png"))


Curves = dict[str, dict[int, float]]  # by name, over steps


def read_curves(logs: list[Path]) -> tuple[Curves, Curves]:
    """Training losses and validation metrics. Where a resumed run repeats steps, the later log counts."""
    losses, metrics = defaultdict(dict), defaultdict(dict)
    for log in logs:
        for line in log.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed
                continue
            for name, value in record.items():
                if "iter" in record and "loss" in name:  # only training counts iterations
                    losses[name][record["step"]] = value
                elif "iter" not in record and name not in ("step", "time", "data_time"):
                    metrics[name][record["step"]] = value
    return dict(losses), dict(metrics)


def plot_curves(losses: Curves, metrics: Curves, path: Path) -> None:
    """Losses on the left, metrics on the right; pycocotools' -1 stands for none."""
    metrics = {name: curve for name, curve in metrics.items() if min(curve.values()) >= 0}
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

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield
