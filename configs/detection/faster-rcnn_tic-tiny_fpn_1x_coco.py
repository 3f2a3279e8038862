"""Faster R-CNN with TiC-tiny on COCO at data/coco: mmdet's 1x schedule with the optimizer that transformers use."""

_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["tic_backbone.openmmlab"])

model = dict(
    backbone=dict(_delete_=True, type="TiC", arch="tiny", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0),
)
