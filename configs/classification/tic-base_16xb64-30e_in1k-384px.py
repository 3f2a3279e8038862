"""TiC-base, trained at 224 x 224 by tic-base_16xb64_in1k.py, goes on for 30 epochs at 384 x 384 with Swin's recipe."""

_base_ = "./tic-tiny_16xb64-30e_in1k-384px.py"
load_from = "work_dirs/tic-base_16xb64_in1k/epoch_300.pth"

model = dict(backbone=dict(arch="base", drop_path_rate=0.5), head=dict(in_channels=1024))
custom_hooks = [dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
