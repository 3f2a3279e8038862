"""TiC-base on ImageNet-1K at data/imagenet: mmpretrain's recipe of Swin-B, 300 epochs at 224, weights averaged."""

_base_ = "mmpretrain::swin_transformer/swin-base_16xb64_in1k.py"
custom_imports = dict(imports=["tic_backbone.openmmlab"])

model = dict(backbone=dict(_delete_=True, type="TiC", arch="base", out_indices=(3,), drop_path_rate=0.5))
custom_hooks = [dict(type="EMAHook", momentum=4e-5, priority="ABOVE_NORMAL")]  # as mmpretrain has it for DeiT
