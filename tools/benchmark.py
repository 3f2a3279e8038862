"""Time the backends of msa_conv2d against each other, in turns.

    python tools/benchmark.py --channels 96 --size 56 --groups 3 --kernel-size 7

Prints each backend's median over the rounds for forward alone and for forward with backward, their ratio to the
reference round by round, and the memory that each adds at its peak, taken in a process of its own.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch

from tic_backbone import msa_conv2d
from tic_backbone.ops import BACKENDS


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--channels", type=int, default=96)
    parser.add_argument("--size", type=int, nargs="+", default=[56], help="side, or height and width, in tokens")
    parser.add_argument("--kernel-size", type=int, default=7)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak-of", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def inputs(args: argparse.Namespace) -> list[torch.Tensor]:
    """q, k, v as a backbone hands them over: channels last."""
    torch.manual_seed(0)
    shape = (args.batch, args.channels, args.size[0], args.size[-1])
    return [torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_() for _ in "qkv"]


def step(args: argparse.Namespace, qkv: list[torch.Tensor], backend: str, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = msa_conv2d(*qkv, args.kernel_size, groups=args.groups, backend=backend)
        if backward:
            out.sum().backward()


def seconds(args: argparse.Namespace, qkv: list[torch.Tensor], backward: bool) -> dict[str, list[float]]:
    """Of each backend the time of every round; the first round, which warms up, is left out."""
    times: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for _ in range(args.rounds + 1):
        for name in BACKENDS:
            start = time.perf_counter()
            step(args, qkv, name, backward)
            times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def peak(args: argparse.Namespace) -> float:
    """Megabytes that forward and backward add to this process at its peak."""
    qkv = inputs(args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step(args, qkv, args.peak_of, backward=True)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak(args))
        return
    for name in BACKENDS:  # first, since a process inherits the peak of the one that starts it
        command = [sys.executable, *sys.argv, "--peak-of", name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(f"{'peak memory':20} {name:10} {float(out):8.0f} MB")
    qkv = inputs(args)
    for title, backward in (("forward", False), ("forward + backward", True)):
        times = seconds(args, qkv, backward)
        for name, values in times.items():
            ratios = [slow / own for slow, own in zip(times["reference"], values)]
            print(
                f"{title:20} {name:10} median {1e3 * statistics.median(values):8.1f} ms   "
                f"{statistics.median(ratios):5.1f} x the reference's speed ({min(ratios):.1f} to {max(ratios):.1f})"
            )


if __name__ == "__main__":
    main()
