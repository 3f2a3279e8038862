"""Train any mmengine config: detection, segmentation, classification.

    python tools/train.py configs/tic_retinanet.py
    torchrun --nproc_per_node 8 tools/train.py configs/detection/retinanet_tic-tiny_fpn_1x_coco.py --launcher pytorch
"""

import argparse
import sys

from mmengine.config import Config
from mmengine.device import is_cuda_available
from mmengine.runner import Runner

from tic_backbone.cli import argument_parser, check_data, explain, read_config
from tic_backbone.engine import InterruptHook, save_interrupted


def parse_args() -> argparse.Namespace:
    parser = argument_parser("Train a model", epilog="A run that was stopped goes on with --resume.")
    parser.add_argument(
        "--resume", nargs="?", const="auto", help="go on from this checkpoint, by default the work dir's latest"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision: float16 on GPUs, bfloat16 on CPUs")
    return parser.parse_args()


def configure(args: argparse.Namespace) -> Config:
    """The config as it will run."""
    cfg = read_config(args)
    if args.resume:
        cfg.resume, cfg.load_from = True, None if args.resume == "auto" else args.resume
    if args.amp:
        gpu = dict(type="AmpOptimWrapper", loss_scale="dynamic")
        cfg.optim_wrapper.update(gpu if is_cuda_available() else dict(type="BFloat16OptimWrapper"))
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), dict(type="CurvesHook")]
    check_data(cfg, "train", "val")
    return cfg


def main() -> None:
    args, cfg, runner, interrupt = parse_args(), None, None, InterruptHook()
    try:
        cfg = configure(args)
        runner = Runner.from_cfg(cfg)
        runner.register_hook(interrupt)
        runner.train()
    except Exception as error:
        line = "interrupted" if interrupt.signal else explain(error, cfg)
        if line is None:
            raise
        if runner is not None and runner.iter > 0 and runner.model.training:
            line += f"\n{save_interrupted(runner, runner.iter)}"
        sys.exit(f"error: {line}")


if __name__ == "__main__":
    main()
