"""Train the contestants of a study under one budget, and keep a line of JSON for every run.

    python tools/experiments/run.py ablation --data cifar10.zip --seeds 0 1 2 --processes 2

Data: a folder or a zip with `train/<class>/*` and `test/<class>/*` pictures, such as CIFAR-10 written out as files; all
are scaled to --side. With --mosaic M the task is a dense one: M x M pictures are laid side by side, and every token of
the last map must name the class of the picture it lies in. With --zoom every training batch has a size of its own. Runs
whose line is in --out already are skipped; one that was stopped goes on after its last epoch. Trained weights lie
beside --out, as *.weights.pth. The contestants share seeds, order of pictures, augmentation (padded crops and flips),
schedule and budget.
"""

import argparse
import functools
import hashlib
import json
import math
import multiprocessing
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from contestants import CONTESTANTS, STRIDE, STUDIES

from tic_backbone.ops import native

SETTINGS = ("data", "side", "mosaic", "zoom", "epochs", "steps", "batch", "lr")
KEY = ("contestant", "seed", *SETTINGS)  # what a run is


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=[*STUDIES, "all"], nargs="?", default="all", help="whose contestants to run")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("work_dirs/experiments/results.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="these contestants, instead of a study's")
    parser.add_argument("--side", type=int, default=32, help="of the pictures, in pixels")
    parser.add_argument("--mosaic", type=int, default=1, help="pictures in a row and in a column; 1: classify pictures")
    parser.add_argument("--zoom", type=float, default=1.0, help="scale each training batch by 1 / ZOOM to ZOOM")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="batches an epoch, drawn from all pictures")
    parser.add_argument("--batch", type=int, default=64, help="pictures, laid out in mosaics or not")
    parser.add_argument("--lr", type=float, default=2e-3, help="at the peak of the one cycle")
    parser.add_argument("--processes", type=int, default=1, help="runs side by side, of one thread each")
    args = parser.parse_args()
    if args.zoom < 1:
        parser.error(f"--zoom {args.zoom:g} must be at least 1")
    if args.batch % args.mosaic**2:
        parser.error(f"{args.batch} pictures make no whole mosaics of {args.mosaic} x {args.mosaic}")
    if args.side % (2 * STRIDE):
        parser.error(
            f"--side {args.side} must divide by {2 * STRIDE}, for every contestant's map to end with a picture"
        )
    if unknown := set(args.only or ()) - CONTESTANTS.keys():
        parser.error(f"no contestant {sorted(unknown)}; there are {list(CONTESTANTS)}")
    return args


def pictures(source: Path, side: int, cache: Path, splits: tuple[str, ...] = ("train", "test")) -> dict:
    """x and y of each split: (N, side, side, 3) bytes and (N,) class numbers; decoded once into `cache`."""
    if not cache.exists():
        found: dict[str, list] = {split: [] for split in splits}
        labels: set[str] = set()  # of both splits, for their numbers to be the same whichever is read
        for split, label, opened in _files(source):
            labels.add(label)
            if split in found:
                picture = Image.open(opened()).convert("RGB")
                crop = min(picture.size)
                left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
                picture = picture.crop((left, top, left + crop, top + crop))
                found[split].append((label, np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))))
        classes = sorted(labels)
        if len(classes) < 2 or not all(found.values()):
            raise SystemExit(
                f"error: no pictures of several classes under {'/<class>/ and '.join(splits)}/<class>/ in {source}"
            )
        arrays = {}
        for split, items in found.items():
            arrays[f"{split}_x"] = np.stack([picture for _, picture in items])
            arrays[f"{split}_y"] = np.array([classes.index(label) for label, _ in items])
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache.with_suffix(".part.npz"), **arrays)
        cache.with_suffix(".part.npz").rename(cache)
    return dict(np.load(cache))


def cache_file(folder: Path, source: Path, side: int, what: str) -> Path:
    """Where `pictures` keeps those of a source; another one of the same name has its own."""
    known = hashlib.sha256(str((source.resolve(), source.stat().st_mtime)).encode()).hexdigest()[:8]
    return folder / f"{source.stem}-{known}-{what}-{side}.npz"


def _files(source: Path) -> Iterator[tuple[str, str, Callable]]:
    """Split, class and a function that opens it, of every picture of a folder or zip."""
    if source.is_dir():
        opens = {path.as_posix(): path.open for path in sorted(source.rglob("*")) if path.is_file()}
    else:
        archive = zipfile.ZipFile(source)
        opens = {name: functools.partial(archive.open, name) for name in sorted(archive.namelist())}
    suffixes = Image.registered_extensions()
    for name, opened in tqdm(opens.items(), "decoding"):
        *_, split, label, file = ("", "", *name.split("/"))
        if split in ("train", "test") and not file.startswith("._") and Path(file).suffix.lower() in suffixes:
            yield split, label, functools.partial(opened, "rb") if source.is_dir() else opened


def to_batch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Crops of the pictures padded by an eighth, half of them flipped."""
    n, _, side, _ = x.shape
    pad = side // 8
    x = F.pad(x, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=generator).tolist()
    flip = (torch.rand(n, generator=generator) < 0.5).tolist()
    crops = (x[i, :, t : t + side, s : s + side] for i, (t, s) in enumerate(zip(top, left)))
    return torch.stack([crop.flip(2) if f else crop for crop, f in zip(crops, flip)])


def zoomed(x: torch.Tensor, zoom: float, mosaic: int, generator: torch.Generator) -> torch.Tensor:
    """The mosaics scaled by one factor, as likely above 1 as below it, such that every picture has whole tokens."""
    if zoom == 1:
        return x
    unit = mosaic * 2 * STRIDE
    factor = zoom ** (2 * torch.rand((), generator=generator).item() - 1)
    side = max(round(x.shape[2] * factor / unit), 1) * unit
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True)


def task(x: torch.Tensor, y: torch.Tensor, mosaic: int) -> tuple[torch.Tensor, torch.Tensor]:
    """N pictures and classes to N / mosaic^2 mosaics and their maps of classes (row by row, left to right)."""
    y = y.unflatten(0, (-1, mosaic, mosaic))
    x = x.unflatten(0, (-1, mosaic, mosaic)).permute(0, 3, 1, 4, 2, 5)  # (N', channels, row, height, column, width)
    return x.flatten(4, 5).flatten(2, 3), y


def scores(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is compared: (M, classes) and (M,), for every token of a mosaic or once for a picture that fills the map.

    With `padding`, so many rows and columns of zeros lie below and right of x, as in a batch with larger pictures; the
    tokens there do not count.
    """
    out = model(F.pad(x, (0, padding, 0, padding)))
    out = out[:, :, : -(-x.shape[2] // STRIDE), : -(-x.shape[3] // STRIDE)]
    if y.shape[-1] == 1:
        return out.mean((2, 3)), y.flatten()
    y = y.repeat_interleave(out.shape[2] // y.shape[1], 1).repeat_interleave(out.shape[3] // y.shape[2], 2)
    return out.permute(0, 2, 3, 1).flatten(0, 2), y.flatten()


@torch.no_grad()
def predictions(
    model: torch.nn.Module, x: np.ndarray, y: np.ndarray, mosaic: int, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The predicted and the true class of all that is compared, (M,) each."""
    model.eval()
    order = np.random.default_rng(0).permutation(len(x))  # mosaics of many classes, the same for all contestants
    found = []
    for picked in np.array_split(order[: len(x) // mosaic**2 * mosaic**2].reshape(-1, mosaic**2), -(-len(x) // 400)):
        picked = picked.flatten()
        out, target = scores(model, *task(to_batch(x[picked]), torch.from_numpy(y[picked]), mosaic), padding)
        found.append((out.argmax(1), target))
    model.train()
    return tuple(torch.cat(part) for part in zip(*found))


def accuracy(predicted: torch.Tensor, true: torch.Tensor) -> float:
    return (predicted == true).double().mean().item()


def train(job: dict) -> dict:
    """One run to its end, from its last epoch on; the job with results."""
    torch.set_num_threads(1)
    data = pictures(Path(job["source"]), job["side"], Path(job["cache"]))
    torch.manual_seed(job["seed"])
    model = CONTESTANTS[job["contestant"]](int(data["train_y"].max()) + 1)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [dict(params=matrices, weight_decay=0.05), dict(params=others, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, lr=job["lr"])
    steps = job["epochs"] * job["steps"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, job["lr"], steps, pct_start=0.2)
    curve, seconds, kept = [], 0.0, Path(job["checkpoint"])
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        curve, seconds = state["curve"], state["seconds"]
    for epoch in range(len(curve), job["epochs"]):
        start, losses = time.process_time(), []  # what else the machine does leaves it alone
        generator = torch.Generator().manual_seed(1000 * job["seed"] + epoch)
        order = torch.randperm(len(data["train_x"]), generator=generator)
        for i in range(job["steps"]):
            picked = order[torch.arange(i * job["batch"], (i + 1) * job["batch"]) % len(order)].numpy()
            x = augment(to_batch(data["train_x"][picked]), generator)
            x, y = task(x, torch.from_numpy(data["train_y"][picked]), job["mosaic"])
            loss = F.cross_entropy(*scores(model, zoomed(x, job["zoom"], job["mosaic"], generator), y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds += time.process_time() - start
        loss = sum(losses) / len(losses)
        last = epoch + 1 == job["epochs"] or not math.isfinite(loss)
        part = slice(None, None, 1 if last else 10)  # on the way, of every tenth picture
        tested = accuracy(*predictions(model, data["test_x"][part], data["test_y"][part], job["mosaic"]))
        curve.append([round(loss, 4), tested])
        if not math.isfinite(loss):
            break
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict())
        torch.save({**state, "curve": curve, "seconds": seconds}, kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
    about = {name: job[name] for name in KEY}
    torch.save({"run": about, "model": model.state_dict()}, kept.with_suffix(".weights.pth"))
    kept.unlink(missing_ok=True)
    return {
        **about,
        "parameters": sum(p.numel() for p in model.parameters()),
        "final": curve[-1][1],
        "best": max(accuracy for _, accuracy in curve),
        "curve": curve,
        "seconds": round(seconds),
        "commit": job["commit"],
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def trained(path: Path) -> tuple[dict, torch.nn.Module]:
    """What run the *.weights.pth at `path` are of, and its network, in eval mode."""
    kept = torch.load(path, weights_only=True)
    run, weights = kept["run"], kept["model"]
    model = CONTESTANTS[run["contestant"]](len(weights["head.weight"]))
    model.load_state_dict(weights)
    return run, model.eval()


def commit() -> str:
    """Of the code that runs, with a + where files differ from it; empty outside a repository."""
    here, git = Path(__file__).parent, shutil.which("git")
    out = [
        subprocess.run(["git", *command], cwd=here, capture_output=True, text=True).stdout.strip() if git else ""
        for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "..", "../../tic_backbone"))
    ]
    return out[0] + "+" * bool(out[1])


def main() -> None:
    args = parse_args()
    if not args.data.exists():
        raise SystemExit(f"error: there is no {args.data}; it must hold train/<class>/ and test/<class>/ pictures")
    if not args.data.is_dir() and not zipfile.is_zipfile(args.data):
        raise SystemExit(f"error: {args.data} is neither a folder nor a zip of pictures")
    if reason := native.unavailable():
        raise SystemExit(f"error: contestants need a C compiler, without which none of the times compare: {reason}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    cache = cache_file(args.out.parent, args.data, args.side, "all")
    pictures(args.data, args.side, cache)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {tuple(line[k] for k in KEY) for line in done}
    settings = {**{name: getattr(args, name) for name in SETTINGS}, "data": args.data.stem}
    jobs = []
    for seed in args.seeds:  # outermost, so that what is done of a campaign is whole rounds
        for contestant in args.only or STUDIES.get(args.study, CONTESTANTS):
            job = {"contestant": contestant, "seed": seed, **settings}
            if tuple(job[k] for k in KEY) not in known:
                name = "_".join(str(job[k]) for k in KEY).replace(" ", "-").replace("/", "-")
                checkpoint = args.out.parent / f"{name}.pth"
                source = dict(source=str(args.data), cache=str(cache), checkpoint=str(checkpoint), commit=commit())
                jobs.append({**job, **source})
    context = multiprocessing.get_context("spawn")
    with args.out.open("a") as file, ProcessPoolExecutor(args.processes, context, max_tasks_per_child=1) as pool:
        try:
            futures = [pool.submit(train, job) for job in jobs]
            for future in tqdm(as_completed(futures), args.study, len(jobs)):
                result = future.result()
                file.write(json.dumps(result) + "\n")
                file.flush()
                tqdm.write(f"{result['contestant']}, seed {result['seed']}: {result['final']:.4f}")
        except BrokenProcessPool:
            raise SystemExit("error: a process was killed; the same command goes on after its last epoch") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
