"""Evaluate a checkpoint on its config's test data.

    python tools/test.py configs/tic_retinanet.py work_dirs/tic_retinanet/epoch_24.pth --show-dir pictures
"""

import argparse
import os
import sys

from mmengine.config import Config
from mmengine.runner import Runner

from tic_backbone.cli import BadInput, argument_parser, check_data, explain, read_config


def parse_args() -> argparse.Namespace:
    parser = argument_parser("Test a model")
    parser.add_argument("checkpoint", help="checkpoint that training wrote")
    parser.add_argument("--show-dir", help="draw every image's predictions into this folder of the run's work dir")
    return parser.parse_args()


def configure(args: argparse.Namespace) -> Config:
    """The config as it will run."""
    cfg = read_config(args)
    if not os.path.isfile(args.checkpoint):
        raise BadInput(f"there is no checkpoint {args.checkpoint}")
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show_dir:
        cfg.merge_from_dict({"default_hooks.visualization": dict(draw=True, interval=1, test_out_dir=args.show_dir)})
    check_data(cfg, "test")
    return cfg


def main() -> None:
    args, cfg = parse_args(), None
    try:
        cfg = configure(args)
        Runner.from_cfg(cfg).test()
    except Exception as error:
        line = explain(error, cfg)
        if line is None:
            raise
        sys.exit(f"error: {line}")


if __name__ == "__main__":
    main()
