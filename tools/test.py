"""Evaluate a checkpoint on its config's test data.

python tools/test.py configs/tic_retinanet.py work_dirs/tic_retinanet/epoch_16.pth --show-dir pictures
"""

import argparse

from mmengine.config import Config
from mmengine.runner import Runner

from tic_backbone.cli import argument_parser, check_data, checked_checkpoint, read_config, readable_errors


def parse_args() -> argparse.Namespace:
    parser = argument_parser("Test a model")
    parser.add_argument("checkpoint", help="checkpoint that training wrote")
    parser.add_argument("--show-dir", help="draw predictions beside the truth on every image, into this folder")
    return parser.parse_args()


def configure(args: argparse.Namespace) -> Config:
    """The config as it will run."""
    cfg = read_config(args)
    check_data(cfg, "test")
    cfg.load_from, cfg.resume = checked_checkpoint(args.checkpoint), False
    if args.show_dir:
        drawing = {
            "mmdet": dict(type="DetVisualizationHook", draw=True, interval=1, test_out_dir=args.show_dir),
            "mmseg": dict(type="SegVisualizationHook", draw=True, interval=1),
            "mmpretrain": dict(type="VisualizationHook", enable=True, interval=1, out_dir=args.show_dir),
        }
        cfg.merge_from_dict({"default_hooks.visualization": drawing[cfg.default_scope]})
        if cfg.default_scope == "mmseg":  # whose hook draws where its visualizer saves
            cfg.visualizer.save_dir = args.show_dir
    return cfg


def main() -> None:
    args = parse_args()
    with readable_errors():
        cfg = configure(args)
    with readable_errors(cfg):
        Runner.from_cfg(cfg).test()


if __name__ == "__main__":
    main()
