"""Test networks that run.py trained at one size on pictures of other sizes, with nothing changed.

    python tools/experiments/resolution.py work_dirs/experiments/*.weights.pth --data cifar10.zip --scales 0.5 1 2 4

The test pictures are scaled from their own size to --scales times the size of training. With --pads they also lie, at
the size of training, in a canvas that is larger by those shares, as in a batch with larger pictures. Adds a line of
JSON for each network and condition to --out, and prints the tables of all its lines.
"""

import argparse
import json
from pathlib import Path

from contestants import STRIDE
from report import resolution
from run import KEY, accuracy, cache_file, pictures, predictions, trained
from tqdm import tqdm


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 0.75, 1, 1.5, 2, 3, 4])
    parser.add_argument("--pads", type=float, nargs="*", default=[], help="for example 0.25, of the picture's side")
    parser.add_argument("--part", type=int, default=1, help="test on every so many-th picture (default: on all)")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/experiments/resolution.jsonl"))
    args = parser.parse_args()
    if not args.data.exists():
        parser.error(f"there is no {args.data}")
    return args


def main() -> None:
    args = parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {tuple(line[k] for k in (*KEY, "scale", "pad", "part")) for line in lines}
    with args.out.open("a") as file:
        for path in tqdm(args.weights):
            run, model = trained(path)
            if run["data"] != args.data.stem:
                raise SystemExit(f"error: {path} was trained on {run['data']}, not on {args.data.stem}")
            for scale, pad in [*((scale, 0.0) for scale in args.scales), *((1.0, pad) for pad in args.pads)]:
                line = {**run, "scale": scale, "pad": pad, "part": args.part}
                if tuple(line.values()) in known:
                    continue
                side = round(run["side"] * scale)
                if side % STRIDE:
                    raise SystemExit(f"error: scale {scale:g} makes pictures of {side} px, not of whole tokens")
                data = pictures(args.data, side, cache_file(args.out.parent, args.data, side, "test"), ("test",))
                given = [data[f"test_{name}"][:: args.part] for name in "xy"] + [run["mosaic"]]
                found, true = predictions(model, *given, padding=round(side * run["mosaic"] * pad))
                line["accuracy"] = accuracy(found, true)
                if pad:
                    line["changed"] = 1 - accuracy(found, predictions(model, *given)[0])
                lines.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
    print(resolution(lines))


if __name__ == "__main__":
    main()
