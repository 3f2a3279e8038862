"""Test networks that run.py trained at one size on pictures of other sizes, with nothing changed.

    python tools/experiments/resolution.py work_dirs/experiments/*.weights.pth --data cifar10.zip --scales 0.5 1 2 4

The test pictures are scaled from their own size to --scales times the size of training. Adds a line of JSON for each
network and size to --out, and prints the table of all its lines.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from run import KEY, accuracy, pictures, trained
from tqdm import tqdm


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 0.75, 1, 1.5, 2, 3, 4])
    parser.add_argument("--part", type=int, default=1, help="test on every so many-th picture (default: on all)")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/experiments/resolution.jsonl"))
    return parser.parse_args()


def table(lines: list[dict]) -> str:
    """Top-1 in percent, the mean over seeds, of each contestant at each scale."""
    scales = sorted({line["scale"] for line in lines})
    names = dict.fromkeys((line["contestant"], line["mosaic"]) for line in lines)
    text = "| contestant | mosaic | seeds | " + " | ".join(f"x {scale:g}" for scale in scales) + " |\n"
    text += "|---" * (len(scales) + 3) + "|\n"
    for name in names:
        own = [line for line in lines if (line["contestant"], line["mosaic"]) == name]
        found = ([100 * line["accuracy"] for line in own if line["scale"] == scale] for scale in scales)
        cells = [f"{statistics.mean(tops):.1f}" if tops else "" for tops in found]
        seeds = len({line["seed"] for line in own})
        text += f"| {name[0]} | {name[1]} | {seeds} | " + " | ".join(cells) + " |\n"
    return text


def main() -> None:
    args = parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {tuple(line[k] for k in (*KEY, "scale", "part")) for line in lines}
    with args.out.open("a") as file:
        for path in tqdm(args.weights):
            run, model = trained(path)
            for scale in args.scales:
                line = {**run, "scale": scale, "part": args.part}
                if tuple(line.values()) in known:
                    continue
                side = round(run["side"] * scale)
                data = pictures(args.data, side, args.out.parent / f"{args.data.stem}-test-{side}.npz", ("test",))
                x, y = (data[f"test_{name}"][:: args.part] for name in "xy")
                line["accuracy"] = accuracy(model, x, y, run["mosaic"])
                lines.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
    print(table(lines))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
