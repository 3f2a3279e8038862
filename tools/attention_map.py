"""Draw, for a position of a photo, where each head of a TiC layer looks.

    python tools/attention_map.py configs/tic_retinanet.py@epoch_16.pth photo.png --at 320 200 --layer -1
    python tools/attention_map.py tic_tiny photo.jpg --at 320 200

One panel a head: the photo, the token that asks (green), and over the tokens of its window their weights. With the
cyclic shift, a key also holds features of tokens half a window away. A title says what share went to the zeros beyond
the border. The model is a config or timm's name of a TiC, after an @ its checkpoint, without which the weights are
random.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from PIL import Image, UnidentifiedImageError

from tic_backbone import MSAConv2d
from tic_backbone.cli import BadInput, load_backbone, readable_errors, to_tensor
from tic_backbone.inspection import Window, window_weights

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL[@CHECKPOINT]")
    parser.add_argument("photo", type=Path)
    parser.add_argument("--at", type=int, nargs=2, metavar=("X", "Y"), required=True, help="px of the photo")
    parser.add_argument("--layer", type=int, default=-1, help="of the MSA-Convs, in the order they run (default: last)")
    parser.add_argument("--out", type=Path, default=Path("attention.png"))
    return parser.parse_args(argv)


def look(model: str, photo: Image.Image, at: tuple[int, int], layer: int) -> tuple[Window, int, int]:
    """The window of the token that lies at px (x, y), and the strides in px of the layer's tokens and of its keys."""
    x, y = at
    if not (0 <= x < photo.width and 0 <= y < photo.height):
        raise BadInput(f"--at {x} {y} is outside of the photo of {photo.width} x {photo.height}")
    name, _, checkpoint = model.partition("@")
    backbone, run = load_backbone(name, checkpoint)
    layers = [module for module in backbone.modules() if isinstance(module, MSAConv2d)]
    if not -len(layers) <= layer < len(layers):
        raise BadInput(f"--layer {layer}: {model} has {len(layers)} layers of MSA-Conv")
    seen = []
    layers[layer].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        run(to_tensor(photo)[None])
    sides = list(zip((photo.height, photo.width), seen[0].shape[2:]))
    stride = next(s for s in (1, 2, 4, 8, 16, 32) if all(-(-side // s) <= tokens for side, tokens in sides))
    window = window_weights(layers[layer], seen[0], y // stride, x // stride)
    return window, stride, stride * layers[layer].inter_pool


def draw(photo: Image.Image, at: tuple[int, int], window: Window, stride: int, cell: int, path: Path) -> None:
    heads = len(window.weights)
    columns = min(heads, 4 if heads <= 8 else 8)
    rows = -(-heads // columns)
    size = (2.6 * columns, 0.4 + 2.6 * rows * photo.height / photo.width + 0.3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for head, axis in zip(range(heads), axes.flat):
        weights, tokens, inside = window.weights[head], window.tokens, window.inside
        axis.imshow(photo.convert("L").convert("RGB"), alpha=0.6)
        for weight, (row, column) in zip(weights[inside].tolist(), tokens[inside].tolist()):
            color = matplotlib.colormaps["inferno"](weight / weights[inside].max().item())
            axis.add_patch(Rectangle((column * cell, row * cell), cell, cell, color=color, alpha=0.75, lw=0))
        corner = (at[0] // stride * stride, at[1] // stride * stride)
        axis.add_patch(Rectangle(corner, stride, stride, fill=False, color="lime", lw=1.5))
        beyond = weights[~inside].sum().item()
        axis.set_title(f"head {head}" + (f", {beyond:.0%} beyond" if beyond >= 0.005 else ""), fontsize=8)
        axis.set(xlim=(0, photo.width), ylim=(photo.height, 0))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with readable_errors():
        try:
            photo = Image.open(args.photo).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise BadInput(f"cannot read the photo {args.photo}: {error}") from error
        window, stride, cell = look(args.model, photo, args.at, args.layer)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(photo, args.at, window, stride, cell, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
