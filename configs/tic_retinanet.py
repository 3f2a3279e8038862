"""RetinaNet with TiC on aerial photos of trees, from random weights, in minutes on two cores without a GPU."""

_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["tic_backbone.openmmlab"])
prepare_data = "python tools/prepare_trees.py"
norm = dict(type="GN", num_groups=16)  # from random weights, the neck and the head need norms too

model = dict(
    data_preprocessor=dict(pad_size_divisor=1),
    backbone=dict(_delete_=True, type="TiC", arch="nano", out_indices=(1, 2, 3), drop_path_rate=0.05),
    neck=dict(in_channels=[64, 128, 256], out_channels=96, start_level=0, num_outs=3, norm_cfg=norm),
    bbox_head=dict(
        num_classes=1, in_channels=96, feat_channels=96, stacked_convs=2, norm_cfg=norm, reg_decoded_bbox=True,
        anchor_generator=dict(octave_base_scale=2, ratios=[1.0], strides=[8, 16, 32]),
        loss_bbox=dict(_delete_=True, type="GIoULoss", loss_weight=2.0),
    ),
    test_cfg=dict(max_per_img=200, nms=dict(iou_threshold=0.4)),
)  # fmt: skip

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomResize", scale=(400, 400), ratio_range=(0.7, 1.4), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(288, 288), allow_negative_crop=True),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale_factor=1.0, keep_ratio=True),  # every photo at its own size
    *_base_.test_pipeline[2:],
]
data = dict(data_root="data/neon_trees/", metainfo=dict(classes=("Tree",)))
train_dataloader = dict(
    batch_size=4, num_workers=1,
    dataset=dict(ann_file="annotations/train.json", data_prefix=dict(img="train/"), pipeline=train_pipeline,
                 filter_cfg=None, **data),
)  # fmt: skip
val_dataloader = dict(
    num_workers=1,
    dataset=dict(ann_file="annotations/val.json", data_prefix=dict(img="val/"), pipeline=test_pipeline, **data),
)
test_dataloader = dict(
    num_workers=1,
    dataset=dict(ann_file="annotations/test.json", data_prefix=dict(img="test/"), pipeline=test_pipeline, **data),
)
val_evaluator = dict(ann_file="data/neon_trees/annotations/val.json")
test_evaluator = dict(ann_file="data/neon_trees/annotations/test.json")

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0),
    clip_grad=dict(max_norm=5),
)
train_cfg = dict(max_epochs=24, val_interval=4)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, begin=0, end=24, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2), logger=dict(interval=10), visualization=dict(draw=True, interval=1))
