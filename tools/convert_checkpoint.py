"""Take the plain weights out of a checkpoint, or TiC's weights out of a Swin Transformer's.

    python tools/convert_checkpoint.py work_dirs/tic_retinanet/epoch_16.pth backbone.safetensors --prefix backbone.
    python tools/convert_checkpoint.py swin_tiny_patch4_window7_224.pth tic-tiny.safetensors --from swin

Reading, loading and mapping are in `tic_backbone.checkpoint`; what has no place in TiC is printed.
"""

import argparse
import re

from tic_backbone.checkpoint import from_swin, strip_prefix, write_checkpoint
from tic_backbone.cli import readable_errors
from tic_backbone.openmmlab import read_mm_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="IN", help="checkpoint, path or address: torch.save's or .safetensors")
    parser.add_argument("target", metavar="OUT", help="file to write, .safetensors or .pth")
    parser.add_argument("--prefix", help="take only the weights under this prefix, and drop it: backbone.")
    parser.add_argument("--from", dest="architecture", choices=["swin"], help="map another network's weights to TiC's")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with readable_errors():
        weights = read_mm_checkpoint(args.source)
        if args.prefix:
            weights = strip_prefix(weights, args.prefix)
        left = []
        if args.architecture == "swin":
            weights, left = from_swin(weights)
        write_checkpoint(weights, args.target)
    numbers = sum(value.numel() for value in weights.values())
    print(f"{args.target}: {len(weights)} tensors, {numbers / 1e6:.1f} M numbers")
    if left:
        kinds = dict.fromkeys(re.sub(r"\d+", "*", name) for name in left)
        print(f"{len(left)} tensors have no place in TiC: {', '.join(kinds)}")


if __name__ == "__main__":
    main()
