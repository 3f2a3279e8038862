"""TiC-tiny on ImageNet-1K at data/imagenet: mmpretrain's recipe of Swin-T, 300 epochs at 224."""

_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"
custom_imports = dict(imports=["tic_backbone.openmmlab"])

# On other data, from these weights: init_cfg=dict(type="Pretrained", checkpoint=..., prefix="backbone.") in backbone.
model = dict(backbone=dict(_delete_=True, type="TiC", arch="tiny", out_indices=(3,), drop_path_rate=0.2))
