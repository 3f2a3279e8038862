"""Write the TiC backbone of a config, or one of TiC's variants, as an ONNX graph for any batch, height and width.

    python tools/export_onnx.py configs/tic_retinanet.py work_dirs/tic_retinanet/epoch_16.pth tic.onnx
    python tools/export_onnx.py tiny tic-tiny.onnx

The graph takes what the backbone takes, normalized images, from 65 px a side on, and gives its maps. Before this ends
it is compared with the module in onnxruntime, at several sizes. A whole detector with its post-processing is mmdeploy's
business.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.registry import MODELS
from torch import nn
from torch.export import Dim

from tic_backbone import VARIANTS, TiC
from tic_backbone.checkpoint import load_weights, strip_prefix
from tic_backbone.cli import BadInput, argument_parser, read_config, readable_errors
from tic_backbone.openmmlab import read_mm_checkpoint

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18  # the oldest that torch's exporter writes
MIN_SIDE = 65  # px; below, torch.export takes the single token of the last stage's pooled map for a constant
SHAPES = ((1, 65, 1000), (2, 224, 224), (3, 333, 203))  # batch, height, width
TOLERANCE = 1e-3  # on maps that a norm has brought to a deviation of 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Export a TiC backbone to ONNX", epilog=f"CONFIG may be a variant: {', '.join(VARIANTS)}.")
    parser.add_argument("checkpoint", nargs="?", help="weights of the whole model or of the backbone (default: random)")
    parser.add_argument("out", help="the .onnx file to write")
    return parser.parse_intermixed_args(argv)


def build(args: argparse.Namespace) -> TiC:
    """The backbone, in eval mode, with the checkpoint's weights."""
    if args.config in VARIANTS:
        backbone = TiC(args.config)
    else:
        cfg = read_config(args).get("model", {}).get("backbone", {})
        if cfg.get("type") != "TiC":
            raise BadInput(f"{args.config} has the backbone {cfg.get('type')}, not TiC: add --backbone tiny")
        backbone = MODELS.build(cfg)
    if args.checkpoint:
        weights = read_mm_checkpoint(args.checkpoint)
        inside = any(name.startswith("backbone.") for name in weights)
        report = load_weights(backbone, strip_prefix(weights, "backbone.") if inside else weights)
        print(f"{args.checkpoint}:", report)
        if report.missing:
            raise BadInput(f"{args.checkpoint} lacks weights, which would stay random: {report.missing}")
    return backbone.eval()


def export(model: nn.Module, path: str | Path, outputs: list[str], in_channels: int = 3) -> None:
    """Write `model`, which maps images to as many tensors as there are names in `outputs`, weights included."""
    sides = {2: Dim("height", min=MIN_SIDE), 3: Dim("width", min=MIN_SIDE)}
    torch.onnx.export(
        model,
        (torch.randn(2, in_channels, 96, 160),),
        path,
        input_names=["images"],
        output_names=outputs,
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: Dim("batch", min=1), **sides},),
        verbose=False,
    )


def deviation(model: nn.Module, path: str | Path, shape: tuple[int, ...]) -> float:
    """The largest difference between what onnxruntime and what `model` make of random images."""
    import onnxruntime

    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images)
    got = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images.numpy()})
    pairs = zip(got, [expected] if isinstance(expected, torch.Tensor) else expected, strict=True)
    return max((torch.from_numpy(a) - b).abs().max().item() for a, b in pairs)


def main() -> None:
    args = parse_args()
    with readable_errors():
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if missing:
            raise BadInput(f"exporting needs {', '.join(missing)}: {sys.executable} -m pip install {' '.join(missing)}")
        if not os.path.isdir(os.path.dirname(args.out) or "."):
            raise BadInput(f"there is no folder for {args.out}")
        backbone = build(args)
    channels = backbone.config.in_channels
    print("exporting, about ten seconds a block ...", flush=True)
    export(backbone, args.out, [f"stride{s}" for s in backbone.out_strides], channels)
    print(f"{args.out}: {os.path.getsize(args.out) / 1e6:.1f} MB, opset {OPSET}")
    worst = 0.0
    for batch, height, width in SHAPES:
        difference = deviation(backbone, args.out, (batch, channels, height, width))
        print(f"{batch} x {height} x {width}: deviates by {difference:.1e} at most")
        worst = max(worst, difference)
    if not worst < TOLERANCE:
        sys.exit(f"error: {args.out} deviates from the backbone by {worst:.1e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
