"""TiC-nano on ImageNet-1K at data/imagenet: mmpretrain's recipe of Swin-T, 300 epochs at 224."""

_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"
custom_imports = dict(imports=["tic_backbone.openmmlab"])

model = dict(
    backbone=dict(_delete_=True, type="TiC", arch="nano", out_indices=(3,), drop_path_rate=0.1),
    head=dict(in_channels=256),
)
