"""DINO with four scales and TiC-tiny on COCO at data/coco, 12 epochs, with DINO's own optimizer.

That is AdamW with a decay of 1e-4 and a tenth of the rate for the backbone, which expects a pretrained one.
"""

_base_ = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"
custom_imports = dict(imports=["tic_backbone.openmmlab"])

model = dict(
    backbone=dict(_delete_=True, type="TiC", arch="tiny", out_indices=(1, 2, 3), drop_path_rate=0.2),
    neck=dict(in_channels=[192, 384, 768]),
)
