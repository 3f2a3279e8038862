"""Put TiC into every config that mmdet, mmsegmentation and mmpretrain bring, and see which of them learn a step.

    python tools/survey_configs.py --out work_dirs/survey --table docs/swapped_configs.md

Each config is read, its backbone swapped, the model built, and run forward and backward on two made-up images; every
weight of TiC must get a gradient. TiC has one block a stage here, which changes nothing for necks and heads. Models
that are equal after the swap run once. Results are kept in the output folder; a survey stopped by Ctrl-C writes its
table all the same, and goes on when started again.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import re
import signal
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from tqdm import tqdm

import tic_backbone.cli  # noqa: F401 - lets mmengine find mmseg's bases
from tic_backbone.openmmlab import swap_backbone

PACKAGES = ("mmdet", "mmseg", "mmpretrain")
SIDE = 128  # px, of the made-up images
SECONDS = 120  # for one config
OUTCOMES = {
    "served": "learns a step with TiC",
    "refused": "`swap_backbone` says why it cannot",
    "no backbone": "the model has no backbone to swap",
    "not tried": "does not run here, on made-up images, with its own backbone either",
    "failed": "swapped, but does not learn",
    "pending": "not run yet: the survey was stopped before",
}

PENDING = dict(outcome="pending", reason="")


def config_files(package: str) -> list[Path]:
    """The configs of an installed package that describe a whole training, without those that others inherit."""
    root = Path(find_spec(package).origin).parent / ".mim" / "configs"
    return [path for path in sorted(root.rglob("*.py")) if "_base_" not in path.parts and path.parts[-2] != "common"]


def prepare(path: Path) -> tuple[Config | None, str, str]:
    """(swapped config, outcome, reason) of the config at `path`; without a config the outcome is known already."""
    try:
        cfg = Config.fromfile(path)
        model = cfg.model
    except Exception as error:
        return None, "not tried", f"does not read: {_line(error)}"
    if not isinstance((model.get("detector") or model).get("backbone"), dict):
        return None, "no backbone", f"model of type {model.get('type')}"
    if "language_model" in model:
        return None, "not tried", "builds only with a language model's weights, which are downloaded"
    if model.type == "ImageClassifier" and not model.get("head"):
        return None, "not tried", "gives features, trains nothing"
    try:
        return swap_backbone(cfg, "tic_nano", depths=(1, 1, 1, 1)), "", ""
    except ValueError as error:
        return None, "refused", _line(error)
    except Exception as error:
        return None, "failed", _reason(error)


def model_key(path: Path) -> dict:
    """The outcome of the config at `path`, or a key that it shares with all whose models are equal after the swap."""
    cfg, outcome, reason = prepare(path)
    if cfg is None:
        return dict(outcome=outcome, reason=reason)
    model = {key: value for key, value in cfg.model.items() if key not in ("data_preprocessor", "test_cfg")}
    return dict(key=hashlib.sha1(repr((cfg.get("default_scope"), model)).encode()).hexdigest())


def outcome(path: Path) -> dict:
    """Whether the config at `path` learns a step with TiC; no try if it does not with its own backbone either."""
    try:
        learn(prepare(path)[0])
    except TimeoutError:
        raise
    except Exception as error:
        reason = _reason(error)
        try:
            learn(Config.fromfile(path))
        except Exception as own:
            return dict(outcome="not tried", reason=f"{reason}; its own backbone fails here too: {_reason(own)}")
        return dict(outcome="failed", reason=reason)
    return dict(outcome="served", reason="")


def learn(cfg: Config) -> None:
    """One step forward and backward; an AssertionError if a weight of TiC gets no gradient."""
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope")):
        torch.manual_seed(0)
        _learn(cfg)


def _learn(cfg: Config) -> None:
    cfg.model.setdefault("data_preprocessor", cfg.get("data_preprocessor"))  # as mmengine's runner does
    if "size" in (cfg.model.data_preprocessor or {}):  # to which it would pad
        cfg.model.data_preprocessor.size = (SIDE, SIDE)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    if "checkpoint" not in str(cfg.model):  # some weights are memory as it was found before this
        model.init_weights()
    owner = model.detector if hasattr(model, "detector") else model
    inputs = SAMPLES[cfg.default_scope](cfg.model)
    if isinstance(inputs["inputs"][0], torch.ByteTensor):
        inputs = owner.data_preprocessor(inputs, True)
    loss, _ = model.parse_losses(model(**inputs, mode="loss"))
    assert loss.isfinite(), f"the loss is {loss}"
    loss.backward()
    without = [name for name, p in owner.backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient for {without}"


def detection(model: dict) -> dict:
    """A batch with boxes, masks, a semantic map and proposals, which each detector takes its part of."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    for count in ("iter", "epoch"):  # which some heads and preprocessors ask the runner for
        MessageHub.get_current_instance().update_info(count, 0)
    neck = model.get("neck") or {}
    side = 320 if isinstance(neck, dict) and neck.get("type") == "SSDNeck" else SIDE  # it shrinks to a map of one token
    boxes = torch.tensor([[8.0, 10.0, 90.0, 100.0], [40.0, 30.0, 80.0, 60.0]])
    masks = np.zeros((2, side, side), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    samples = []
    for _ in range(2):
        size = (side, side)
        meta = dict(img_id=0, img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), flip=False, border=[1, 1, 1, 1])
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.zeros(2, dtype=torch.long))
        if "mask" in str(model).lower():
            sample.gt_instances.masks = BitmapMasks(masks, *size)
        sample.ignored_instances = InstanceData(bboxes=boxes[:0])
        sample.gt_sem_seg = PixelData(sem_seg=torch.zeros(1, *size, dtype=torch.long))
        sample.proposals = InstanceData(bboxes=boxes + 2, scores=torch.ones(2))
        samples.append(sample)
    return dict(
        inputs=[torch.randint(0, 255, (3, side, side), dtype=torch.uint8) for _ in samples], data_samples=samples
    )


def segmentation(model: dict) -> dict:
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(SIDE, SIDE), ori_shape=(SIDE, SIDE)))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 2, (1, SIDE, SIDE)))
        sample.gt_edge_map = PixelData(data=torch.randint(0, 2, (1, SIDE, SIDE)))
        samples.append(sample)
    return dict(
        inputs=[torch.randint(0, 255, (3, SIDE, SIDE), dtype=torch.uint8) for _ in samples], data_samples=samples
    )


def classification(model: dict) -> dict:
    """A batch with labels; for learners without labels a list of views of each image."""
    from mmpretrain.structures import DataSample

    size = (2, model.backbone.get("in_channels", 3), 224, 224)  # the only size of some other backbones
    if model.type != "ImageClassifier":
        views = sum(model.get("num_crops", [8])) if model.type == "SwAV" else 2
        return dict(inputs=[torch.randn(size) for _ in range(views)], data_samples=None)
    samples = [DataSample(), DataSample()]
    for sample in samples:
        if model.head.type.startswith(("MultiLabel", "CSRA")):
            sample.set_gt_score(torch.eye(model.head.num_classes)[0])
        else:
            sample.set_gt_label(0)
    return dict(inputs=[*torch.randint(0, 255, size, dtype=torch.uint8)], data_samples=samples)


SAMPLES = dict(mmdet=detection, mmseg=segmentation, mmpretrain=classification)


def _line(error: Exception) -> str:
    line = " ".join(f"{type(error).__name__}: {error}".removeprefix("ValueError: ").split())
    return re.sub(r"/\S*/", "", line)[:200]  # without this machine's folders


def _reason(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{_line(error)} ({Path(where.filename).name}:{where.lineno})"


def _start_worker() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, _too_long)


def _too_long(number: int, frame) -> None:
    raise TimeoutError(f"not done after {SECONDS} seconds")


def _work(job: tuple[Callable, str, Path]) -> dict:
    function, name, path = job
    signal.alarm(SECONDS)
    try:
        return dict(name=name, **function(path))
    except TimeoutError as error:
        return dict(name=name, outcome="not tried", reason=str(error))
    finally:
        signal.alarm(0)


def run(function: Callable, jobs: dict[str, Path], results: Path, processes: int) -> dict[str, dict]:
    """The result of `function` for every named job; those that the file `results` holds are not run again."""
    results.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {result["name"] for result in done}
    rest = [(function, name, path) for name, path in jobs.items() if name not in known]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the workers, for operators that do not ask torch
    context = multiprocessing.get_context("spawn")
    with (
        suppress(KeyboardInterrupt),
        results.open("a") as file,
        context.Pool(processes, _start_worker, maxtasksperchild=100) as pool,
    ):
        for result in tqdm(pool.imap_unordered(_work, rest), total=len(rest), desc=function.__name__):
            file.write(json.dumps(result) + "\n")
            file.flush()
            done.append(result)
    return {result["name"]: result for result in done if result["name"] in jobs}


def table(results: list[dict]) -> Iterator[str]:
    """The results as Markdown."""
    yield "# Which configs TiC can be swapped into\n"
    yield "Made by `tools/survey_configs.py`, which swaps TiC into each config that the installed packages bring and"
    yield "runs one step forward and backward. The packages' versions are in `requirements.txt`.\n"
    counts = defaultdict(Counter)
    for result in results:
        counts[result["config"].split("::")[0]][result["outcome"]] += 1
    yield "| package | " + " | ".join(OUTCOMES) + " | served, of those that could be tried |"
    yield "|---" * (len(OUTCOMES) + 2) + "|"
    for package in PACKAGES:
        count = counts[package]
        tried = count["served"] + count["refused"] + count["failed"]
        share = f"{count['served'] / tried:.1%}" if tried else ""
        yield f"| {package} | " + " | ".join(str(count[outcome]) for outcome in OUTCOMES) + f" | {share} |"
    yield ""
    yield from (f"* **{outcome}**: {meaning}." for outcome, meaning in OUTCOMES.items())
    for outcome in OUTCOMES:
        folders = defaultdict(lambda: defaultdict(list))
        for result in sorted(results, key=lambda r: r["config"]):
            if result["outcome"] == outcome:
                folders[result["config"].rsplit("/", 1)[0]][result["reason"]].append(result["config"])
        yield f"\n## {outcome.capitalize()}\n"
        yield "| configs | number | reason |" if outcome != "served" else "| configs | number |"
        yield "|---|---|---|" if outcome != "served" else "|---|---|"
        for folder, reasons in folders.items():
            for reason, names in reasons.items():
                what = f"`{folder}`" if len(reasons) == 1 or len(names) > 3 else ", ".join(f"`{n}`" for n in names)
                yield f"| {what} | {len(names)} |" + (f" {reason} |" if outcome != "served" else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("work_dirs/survey"), help="folder of the results")
    parser.add_argument("--table", type=Path, help="write the table to this file")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="only configs whose name contains this")
    args = parser.parse_args()
    jobs = {}
    for package in PACKAGES:
        for path in config_files(package):
            name = f"{package}::{path.as_posix().split('/.mim/configs/')[1]}"
            if args.only in name:
                jobs[name] = path
    swapped = run(model_key, jobs, args.out / "swapped.jsonl", args.processes)
    sharing = Counter(result["key"] for result in swapped.values() if "key" in result).most_common()
    first = {result.get("key"): jobs[name] for name, result in reversed(swapped.items())}
    unique = {key: first[key] for key, _ in sharing}  # those that stand for most configs first
    outcomes = run(outcome, unique, args.out / "outcomes.jsonl", args.processes)
    results = [
        {**(outcomes.get(result["key"], PENDING) if "key" in result else result), "config": name}
        for name, result in swapped.items()
    ]
    text = "\n".join(table(results)) + "\n"
    if args.table:
        args.table.write_text(text)
    print("\n".join(text.splitlines()[4:10]))


if __name__ == "__main__":
    main()
