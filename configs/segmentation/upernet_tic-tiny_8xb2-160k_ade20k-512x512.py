"""UPerNet with TiC-tiny on ADE20K at data/ade: mmseg's config of Swin-T, whose maps have the same channels."""

_base_ = [
    "./_base_/find_mmseg.py",
    "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
]
custom_imports = dict(imports=["tic_backbone.openmmlab"])
checkpoint_file = None  # the base names Swin's weights here

# From a classifier's weights: init_cfg=dict(type="Pretrained", checkpoint=..., prefix="backbone.") in the backbone.
model = dict(backbone=dict(_delete_=True, type="TiC", arch="tiny", drop_path_rate=0.3))
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0, bias_decay_mult=0),
)
