"""Train any mmengine config: detection, segmentation, classification.

    python tools/train.py configs/tic_retinanet.py
    torchrun --nproc_per_node 8 tools/train.py configs/detection/retinanet_tic-tiny_fpn_1x_coco.py --launcher pytorch
"""

import argparse
import os
import sys
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.device import is_cuda_available
from mmengine.runner import Runner

from tic_backbone.engine import check_data, explain, read_config, save_interrupted


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a model", epilog="A run that was stopped goes on with --resume.")
    parser.add_argument("config", help="path of a config, or package::path, as mmdet::retinanet/...")
    parser.add_argument("--work-dir", help="where logs and checkpoints go (default: work_dirs/<config's name>)")
    parser.add_argument(
        "--resume", nargs="?", const="auto", help="go on from this checkpoint, by default the work dir's latest"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision: float16 on GPUs, bfloat16 on CPUs")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="override settings, as key=value")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    return args


def configure(args: argparse.Namespace) -> Config:
    """The config as it will run."""
    cfg = read_config(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or os.path.join("work_dirs", Path(args.config).stem)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else args.resume
    if args.amp:
        gpu = dict(type="AmpOptimWrapper", loss_scale="dynamic")
        cfg.optim_wrapper.merge(gpu if is_cuda_available() else dict(type="BFloat16OptimWrapper"))
    if not is_cuda_available():
        cfg.merge_from_dict({"env_cfg.dist_cfg.backend": "gloo"})
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), dict(type="InterruptHook"), dict(type="CurvesHook")]
    check_data(cfg, ("train", "val"))
    return cfg


def main() -> None:
    args, cfg, runner = parse_args(), None, None
    try:
        cfg = configure(args)
        runner = Runner.from_cfg(cfg)
        runner.train()
    except Exception as error:
        line = explain(error, cfg)
        if line is None:
            raise
        if runner is not None and runner.iter > 0:
            line += f"\nWhat was trained is in {save_interrupted(runner, runner.iter)}; --resume goes on from it."
        sys.exit(f"error: {line}")


if __name__ == "__main__":
    main()
