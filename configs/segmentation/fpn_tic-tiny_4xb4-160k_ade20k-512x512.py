"""Semantic FPN with TiC-tiny on ADE20K at data/ade, 160k iterations with the optimizer that transformers use."""

_base_ = ["./_base_/find_mmseg.py", "mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py"]
custom_imports = dict(imports=["tic_backbone.openmmlab"])

model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type="TiC", arch="tiny", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0),
)
param_scheduler = [  # the base's ends at 1e-4
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=0.9, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]
