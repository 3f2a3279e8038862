"""Measure and draw the effective receptive field of backbones (Luo et al. 2016) on photos.

    python tools/erf.py tic_tiny swin_tiny_patch4_window7_224 convnext_tiny --photos FOLDER --size 512
    python tools/erf.py configs/tic_retinanet.py configs/tic_retinanet.py@epoch_16.pth --photos FOLDER

A model is timm's name of one or an OpenMMLab config (its backbone is taken), after an @ with a checkpoint, without
which the weights are random; or a contestant of tools/experiments by its name, or a *.weights.pth that its training
left. The field is how much each pixel of
the input moves the token at the centre of the last map: absolute values of the gradient, added over colours and photos.
The table says how many pixels a side the square around that token has that holds 20, 50, 95 and 99 % of it. Writes
erf.md and erf.png.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from tic_backbone.cli import BadInput, load_backbone, readable_errors, to_tensor
from tic_backbone.inspection import receptive_field, side_of_square

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
from contestants import CONTESTANTS
from run import trained

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm

SHARES = (20, 50, 95, 99)  # percent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL[@CHECKPOINT]")
    parser.add_argument("--photos", type=Path, required=True, help="a folder")
    parser.add_argument("--size", type=int, default=512, help="photos are cut to a square of so many px (default: 512)")
    parser.add_argument("--number", type=int, default=20, help="of photos, the first of the folder (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/erf"))
    return parser.parse_args(argv)


def read_photos(folder: Path, size: int, number: int) -> list[torch.Tensor]:
    """The middle of each photo as (3, size, size), RGB from 0 to 1; a smaller photo is scaled up first."""
    photos: list[torch.Tensor] = []
    for path in sorted(folder.rglob("*")):
        if len(photos) == number:
            break
        try:
            photo = Image.open(path).convert("RGB")
        except (UnidentifiedImageError, OSError):
            continue
        ratio = size / min(*photo.size, size)
        photo = photo.resize([max(round(side * ratio), size) for side in photo.size])
        left, top = (photo.width - size) // 2, (photo.height - size) // 2
        photos.append(to_tensor(photo.crop((left, top, left + size, top + size))))
    if not photos:
        raise BadInput(f"there are no photos in {folder}")
    return photos


def load(model: str, size: int) -> Callable:
    """A function from images to their last map, (N, C, h, w)."""
    if model.endswith(".weights.pth") or model in CONTESTANTS:
        torch.manual_seed(0)
        net = CONTESTANTS[model](10).eval() if model in CONTESTANTS else trained(Path(model))[1]
        return lambda photos: net.features(2 * photos - 1)  # as run.py's pictures
    name, _, checkpoint = model.partition("@")
    return load_backbone(name, checkpoint, size)[1]


def table(fields: dict[str, tuple[torch.Tensor, tuple[float, float]]]) -> str:
    lines = ["| model | " + " | ".join(f"{share} %" for share in SHARES) + " |", "|---" * (len(SHARES) + 1) + "|"]
    for model, (field, place) in fields.items():
        sides = [side_of_square(field, place, share / 100) for share in SHARES]
        lines.append(f"| {title(model)} | " + " | ".join(map(str, sides)) + " |")
    return "\n".join(lines) + "\n"


def title(model: str) -> str:
    if model.endswith(".weights.pth"):
        run = torch.load(model, weights_only=True)["run"]
        return f"{run['contestant']}, trained (seed {run['seed']})"
    name, _, checkpoint = model.partition("@")
    return (name if name in CONTESTANTS else Path(name).name.removesuffix(".py")) + (", trained" if checkpoint else "")


def draw(fields: dict[str, tuple[torch.Tensor, tuple[float, float]]], path: Path) -> None:
    columns = min(len(fields), 4)
    rows = -(-len(fields) // columns)
    size = (2.6 * columns, 2.9 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (model, (field, _)) in zip(axes.flat, fields.items()):
        axis.imshow((field / field.max()).clamp(min=1e-4), norm=LogNorm(1e-4, 1), cmap="magma")
        axis.set_title(title(model), fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with readable_errors():
        photos = read_photos(args.photos, args.size, args.number)
        fields = {}
        for model in args.models:
            bar = tqdm(photos, title(model), leave=False, disable=None)
            fields[model] = receptive_field(load(model, args.size), bar)
    args.out.mkdir(parents=True, exist_ok=True)
    text = f"{len(photos)} photos of {args.size} x {args.size} px; sides of squares in px.\n\n{table(fields)}"
    (args.out / "erf.md").write_text(text)
    draw(fields, args.out / "erf.png")
    print(text)


if __name__ == "__main__":
    main()
