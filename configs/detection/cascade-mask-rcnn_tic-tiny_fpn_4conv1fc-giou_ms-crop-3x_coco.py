"""Cascade Mask R-CNN with TiC-tiny on COCO at data/coco: heads, scales, crops and 3x schedule of Swin and ConvNeXt.

The base is mmdet's config of ConvNeXt-T, with the same channels; its optimizer decays the rate by ConvNeXt's layers.
"""

_base_ = "mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
custom_imports = dict(imports=["tic_backbone.openmmlab"])
checkpoint_file = None  # the base names ConvNeXt's weights here

model = dict(backbone=dict(_delete_=True, type="TiC", arch="tiny", drop_path_rate=0.2))
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0),
)
