"""Mask R-CNN with TiC-tiny on COCO at data/coco: mmdet's 3x config of Swin-T, with many scales and crops."""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["tic_backbone.openmmlab"])
pretrained = None  # the base names Swin's weights here

model = dict(backbone=dict(_delete_=True, type="TiC", arch="tiny", drop_path_rate=0.2))
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, norm_decay_mult=0, bias_decay_mult=0))
