"""Evaluate a checkpoint on its config's test data.

    python tools/test.py configs/tic_retinanet.py work_dirs/tic_retinanet/epoch_24.pth
"""

import argparse
import os
import sys
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.device import is_cuda_available
from mmengine.runner import Runner

from tic_backbone.engine import BadInput, check_data, explain, read_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Test a model")
    parser.add_argument("config", help="path of a config, or package::path")
    parser.add_argument("checkpoint", help="checkpoint that training wrote")
    parser.add_argument("--work-dir", help="where the log goes (default: work_dirs/<config's name>)")
    parser.add_argument("--show-dir", help="draw predictions beside the truth on every image, into this folder of the run")
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
    if not os.path.isfile(args.checkpoint):
        raise BadInput(f"there is no checkpoint {args.checkpoint}")
    cfg.launcher, cfg.load_from, cfg.resume = args.launcher, args.checkpoint, False
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or os.path.join("work_dirs", Path(args.config).stem)
    if not is_cuda_available():
        cfg.merge_from_dict({"env_cfg.dist_cfg.backend": "gloo"})
    if args.show_dir:
        cfg.merge_from_dict({"default_hooks.visualization": dict(draw=True, interval=1, test_out_dir=args.show_dir)})
    check_data(cfg, ("test",))
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
