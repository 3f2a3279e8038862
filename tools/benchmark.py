"""Time MSA-Conv and TiC against their peers, in turns, and draw what they cost as images grow.

    python tools/benchmark.py                                     # what a laptop does in 3 minutes
    python tools/benchmark.py --sizes 224 512 800x1344 2048 --rounds 7 --train --out docs/benchmark

Operators: the backends that run here, and Swin's window attention (timm's, with partition and reverse), at the shapes
of TiC-tiny's stages. Backbones: TiC-tiny and timm's Swin-T, ConvNeXt-T and ViT-S/16, random weights. All contestants
take part in every round, in turns; the first round warms up and is left out. The ratio to Swin is the median over the
rounds. Peak memory is what a process of the contestant's own adds to its start. Writes benchmark.csv, benchmark.md and
benchmark.png.
"""

import argparse
import csv
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tic_backbone import VARIANTS, TiC, msa_conv2d
from tic_backbone.complexity import complexity
from tic_backbone.ops import BACKENDS, choose_backend

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STAGES = ((768, 7), (384, 14), (192, 28), (96, 56))  # channels and side of TiC-tiny's maps at 224
WINDOW, HEAD = 7, 32
SWIN = {"operator": "Swin's windows", "backbone": "Swin-T"}
PEERS = {
    "Swin-T": ("swin_tiny_patch4_window7_224", dict(strict_img_size=False)),
    "ConvNeXt-T": ("convnext_tiny", {}),
    "ViT-S/16": ("vit_small_patch16_224", dict(dynamic_img_size=True)),
}


@dataclass
class Row:
    """One contestant on one input; times in ms."""

    kind: str
    name: str
    mode: str
    batch: int
    height: int
    width: int
    median: float
    fastest: float
    slowest: float
    to_swin: float | None  # None where Swin does not take part
    peak_mb: float | None
    parameters: float | None = None  # millions
    gmacs: float | None = None  # for the batch


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("operator", "backbone"))
    parser.add_argument("--models", nargs="+", default=["TiC-tiny", *PEERS], choices=["TiC-tiny", *PEERS])
    parser.add_argument("--sizes", nargs="+", type=_size, default=[(224, 224), (448, 448)], help="side or HxW, pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", action="store_true", help="time the backbones' forward and backward too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("work_dirs/benchmark"))
    parser.add_argument("--peak-of", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def operators(device: str) -> dict[str, Callable]:
    """By name functions of qkv, (N, H, W, 3 C), to (N, H, W, C)."""
    names = [name for name in BACKENDS if _runs(name, device)]
    return {**{name: _operator(name) for name in names}, SWIN["operator"]: window_attention}


def _runs(backend: str, device: str) -> bool:
    try:
        choose_backend(backend, device)
    except ValueError:
        return False
    return True


def _operator(backend: str) -> Callable:
    def run(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.permute(0, 3, 1, 2).chunk(3, 1)
        return msa_conv2d(q, k, v, WINDOW, groups=q.shape[1] // HEAD, backend=backend).permute(0, 2, 3, 1)

    return run


def window_attention(qkv: torch.Tensor) -> torch.Tensor:
    """Swin's, with its table of position biases as zeros and without its shift."""
    _, h, w, channels = qkv.shape
    groups = channels // 3 // HEAD
    windows = window_partition(qkv, (WINDOW, WINDOW)).reshape(-1, WINDOW**2, 3, groups, HEAD).permute(2, 0, 3, 1, 4)
    bias = qkv.new_zeros(1, groups, WINDOW**2, WINDOW**2)
    out = F.scaled_dot_product_attention(*windows.unbind(0), bias)
    return window_reverse(out.transpose(1, 2).reshape(-1, WINDOW, WINDOW, channels // 3), (WINDOW, WINDOW), h, w)


def backbone(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "TiC-tiny":
        return TiC("tiny")
    arch, options = PEERS[name]
    return timm.create_model(arch, num_classes=0, global_pool="", **options)


def gmacs(name: str, batch: int, size: tuple[int, int]) -> float:
    """TiC's by formula, the peers' as torch counts their matrix products and convolutions; for the batch."""
    if name == "TiC-tiny":
        return batch * complexity(VARIANTS["tiny"], *size)[-1].macs / 1e9
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(name).eval()(torch.empty(batch, 3, *size))
    return counter.get_total_flops() / 2e9


def step(function: Callable, x: torch.Tensor, mode: str, args: argparse.Namespace) -> None:
    context = torch.autocast(x.device.type, torch.bfloat16) if args.bf16 else nullcontext()
    with torch.set_grad_enabled(mode == "training"), context:
        outs = function(x)
    if mode == "training":
        sum(out.float().mean() for out in (outs if isinstance(outs, tuple) else (outs,))).backward()
        function.zero_grad() if isinstance(function, nn.Module) else setattr(x, "grad", None)
    if x.is_cuda:
        torch.cuda.synchronize()


def inputs(kind: str, batch: int, height: int, width: int, channels: int, args: argparse.Namespace) -> torch.Tensor:
    torch.manual_seed(0)
    device, dtype = args.device, torch.bfloat16 if args.bf16 else torch.float32  # as autocast's projections give it
    if kind == "backbone":
        return torch.rand(batch, 3, height, width, device=device)
    return torch.randn(batch, height, width, 3 * channels, device=device, dtype=dtype, requires_grad=True)


def rounds(functions: dict[str, Callable], x: torch.Tensor, mode: str, args: argparse.Namespace) -> dict[str, list]:
    """Of each contestant the ms of every round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in tqdm(range(args.rounds + 1), f"{mode} {tuple(x.shape)}", leave=False):
        for name, function in functions.items():
            start = time.perf_counter()
            step(function, x, mode, args)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: values[1:] for name, values in times.items()}


def peaks(kind: str, name: str, mode: str, shapes: list, args: argparse.Namespace) -> list[float]:
    """MB that a process of its own adds for each of the (batch, height, width, channels), whose costs grow."""
    job = json.dumps([kind, name, mode, shapes])
    command = [sys.executable, __file__, "--peak-of", job, "--device", args.device, "--threads", str(args.threads)]
    done = subprocess.run([*command, *(["--bf16"] * args.bf16)], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]  # as where memory ran out
        raise SystemExit(f"error: {name} in {mode} on {shapes}: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_peaks(args: argparse.Namespace) -> list[float]:
    kind, name, mode, shapes = args.peak_of
    function = operators(args.device)[name] if kind == "operator" else backbone(name).to(args.device)
    if isinstance(function, nn.Module):
        function.train(mode == "training")
    before, found = _memory(args.device), []
    for shape in shapes:
        x = inputs(kind, *shape, args)
        step(function, x, mode, args)
        found.append(_memory(args.device) - before)
    return found


def _memory(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # where ru_maxrss starts with the peak of the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def compare(kind: str, mode: str, functions: dict[str, Callable], shapes: list, args: argparse.Namespace) -> list[Row]:
    peak = {name: peaks(kind, name, mode, shapes, args) for name in functions}
    rows = []
    for i, (batch, height, width, channels) in enumerate(shapes):
        for function in functions.values():
            if isinstance(function, nn.Module):
                function.train(mode == "training")
        times = rounds(functions, inputs(kind, batch, height, width, channels, args), mode, args)
        for name, values in times.items():
            ratios = [own / swin for own, swin in zip(values, times.get(SWIN[kind], ()))]
            spread = statistics.median(values), min(values), max(values)
            to_swin = statistics.median(ratios) if ratios else None
            row = Row(kind, name, mode, batch, height, width, *spread, to_swin, peak[name][i])
            if kind == "backbone":
                row.parameters = sum(p.numel() for p in functions[name].parameters()) / 1e6
                row.gmacs = gmacs(name, batch, (height, width))
            rows.append(row)
    return rows


def machine(args: argparse.Namespace) -> str:
    """The device, by name."""
    if args.device.startswith("cuda"):
        return torch.cuda.get_device_name(args.device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {args.threads} threads"


def markdown(rows: list[Row], args: argparse.Namespace) -> str:
    dtype = "bfloat16 autocast" if args.bf16 else "float32"
    text = (
        f"Measured on {machine(args)}; torch {torch.__version__}, {dtype}, median of {args.rounds} rounds in turns.\n"
    )
    for kind, mode in dict.fromkeys((row.kind, row.mode) for row in rows):
        text += f"\n| {kind}, {mode} | input | ms (fastest to slowest) | x Swin's time | images/s | peak MB "
        text += "| M parameters | GMACs |\n"
        text += "|---|---|---|---|---|---|---|---|\n"
        for r in rows:
            if (r.kind, r.mode) == (kind, mode):
                text += (
                    f"| {r.name} | {r.batch} x {r.height} x {r.width} | {r.median:.1f} ({r.fastest:.1f} to "
                    f"{r.slowest:.1f}) | {'' if r.to_swin is None else f'{r.to_swin:.2f}'} | "
                    f"{1e3 * r.batch / r.median:.2f} | {r.peak_mb:.0f} | "
                )
                text += f"{r.parameters:.1f} | {r.gmacs:.2f} |\n" if r.parameters else "| |\n"
    return text


def draw(rows: list[Row], args: argparse.Namespace) -> None:
    """Time and memory over pixels, of the backbones in inference."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name in dict.fromkeys(r.name for r in rows):
        points = sorted((r.height * r.width / 1e6, r.median / r.batch, r.peak_mb) for r in rows if r.name == name)
        for axis, i in zip(axes, (1, 2)):
            axis.plot(
                [p[0] for p in points], [p[i] for p in points], "o-", label=name, lw=2.5 if "TiC" in name else 1.2
            )
    for axis, title in zip(axes, ("ms an image", "MB at the peak")):
        axis.set(xscale="log", yscale="log", xlabel="megapixels", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"Inference on {machine(args)}", fontsize=10)
    figure.savefig(args.out / "benchmark.png", dpi=110)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(json.dumps(measure_peaks(args)))
        return
    rows = []
    if args.only != "backbone":
        shapes = [(4, side, side, channels) for channels, side in STAGES]
        for mode in ("inference", "training"):
            rows += compare("operator", mode, operators(args.device), shapes, args)
    if args.only != "operator":
        models = {name: backbone(name).to(args.device) for name in args.models}
        shapes = [(args.batch, *size, 3) for size in sorted(args.sizes, key=lambda s: s[0] * s[1])]
        for mode in ("inference", *(["training"] * args.train)):
            rows += compare("backbone", mode, models, shapes, args)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "benchmark.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, asdict(rows[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows)
    (args.out / "benchmark.md").write_text(markdown(rows, args))
    if drawn := [row for row in rows if row.kind == "backbone" and row.mode == "inference"]:
        draw(drawn, args)
    print(markdown(rows, args))


if __name__ == "__main__":
    main()
