"""Train any mmengine config: detection, segmentation, classification.

python tools/train.py configs/tic_retinanet.py
torchrun --nproc_per_node 8 tools/train.py configs/detection/retinanet_tic-tiny_fpn_1x_coco.py --launcher pytorch
"""

import argparse

from mmengine.config import Config
from mmengine.device import is_cuda_available
from mmengine.runner import find_latest_checkpoint

from tic_backbone.cli import BadInput, argument_parser, check_data, checked_checkpoint, read_config, readable_errors
from tic_backbone.engine import train


def parse_args() -> argparse.Namespace:
    parser = argument_parser("Train a model", epilog="A run that was stopped goes on with --resume.")
    parser.add_argument(
        "--resume", nargs="?", const="auto", help="go on from this checkpoint, by default the work dir's latest if any"
    )
    parser.add_argument("--pretrained", help="start the TiC backbone from its weights in this checkpoint, of any task")
    parser.add_argument("--amp", action="store_true", help="mixed precision: float16 on GPUs, bfloat16 on CPUs")
    return parser.parse_args()


def configure(args: argparse.Namespace) -> Config:
    """The config as it will run."""
    cfg = read_config(args)
    check_data(cfg, "train", "val")
    if args.pretrained:
        backbone = (cfg.model.get("detector") or cfg.model).get("backbone") or {}
        if backbone.get("type") != "TiC":
            raise BadInput(f"--pretrained is for TiC, the config's backbone is {backbone.get('type')}: add --backbone")
        backbone.init_cfg = {**(backbone.get("init_cfg") or {}), "type": "Pretrained", "checkpoint": args.pretrained}
    if args.resume and args.resume != "auto":
        cfg.resume, cfg.load_from = True, args.resume
    elif args.resume and find_latest_checkpoint(cfg.work_dir):  # else a first run, which load_from may begin
        cfg.resume, cfg.load_from = True, None
    if cfg.get("load_from"):
        cfg.load_from = checked_checkpoint(cfg.load_from)
    if args.amp and is_cuda_available():
        cfg.optim_wrapper.type = "AmpOptimWrapper"
    elif args.amp:
        if "roi_head" in (cfg.model.get("detector") or cfg.model):
            raise BadInput("--amp: mmcv's RoIAlign has no bfloat16 on CPUs, leave --amp out here")
        for key in ("loss_scale", "dtype", "use_fsdp"):  # of AmpOptimWrapper
            cfg.optim_wrapper.pop(key, None)
        cfg.optim_wrapper.type = "BFloat16OptimWrapper"
        known = (cfg.get("custom_imports") or {}).get("imports", [])
        known = [known] if isinstance(known, str) else known
        cfg.custom_imports = dict(imports=[*known, "tic_backbone.engine"])  # for whoever runs the config that is saved
    return cfg


def main() -> None:
    args = parse_args()
    with readable_errors():
        cfg = configure(args)
    with readable_errors(cfg):
        train(cfg)


if __name__ == "__main__":
    main()
