"""RetinaNet with TiC on aerial photos of trees, from random weights, in minutes on two cores without a GPU."""

_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["tic_backbone.openmmlab"])
prepare_data = "make data"

norm = dict(type="GN", num_groups=16)  # from random weights, neck and head need norms too
crowns = dict(type="AnchorGenerator", scales=[2, 2.6, 3.4, 4.5, 6], ratios=[1.0], strides=[8, 16, 32])  # they are round
boxes = dict(reg_decoded_bbox=True, loss_bbox=dict(_delete_=True, type="GIoULoss", loss_weight=2.0))
head = dict(num_classes=1, in_channels=96, feat_channels=96, stacked_convs=2, norm_cfg=norm, **boxes)
model = dict(
    backbone=dict(_delete_=True, type="TiC", arch="nano", out_indices=(1, 2, 3), drop_path_rate=0.05),
    neck=dict(in_channels=[64, 128, 256], out_channels=96, start_level=0, num_outs=3, norm_cfg=norm),
    bbox_head=dict(anchor_generator=dict(_delete_=True, **crowns), **head),
    test_cfg=dict(max_per_img=200, nms=dict(iou_threshold=0.4)),
)

load, own_size = dict(type="LoadImageFromFile"), dict(type="Resize", scale_factor=1.0, keep_ratio=True)
train_pipeline = [
    load,
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomChoiceResize", scales=[(side, side) for side in (344, 368, 400, 432, 464)], keep_ratio=True),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackDetInputs"),
]
test_pipeline = [load, own_size, *_base_.test_pipeline[2:]]
data = dict(data_root="data/neon_trees/", metainfo=dict(classes=("Tree",)), filter_cfg=None)
splits = ("train", "val", "test")
train, val, test = (dict(ann_file=f"annotations/{s}.json", data_prefix=dict(img=f"{s}/"), **data) for s in splits)
train_dataloader = dict(batch_size=2, num_workers=1, dataset=dict(pipeline=train_pipeline, **train))
val_dataloader, test_dataloader = (dict(num_workers=1, dataset=dict(pipeline=test_pipeline, **s)) for s in (val, test))
val_evaluator, test_evaluator = (dict(ann_file=split["data_root"] + split["ann_file"]) for split in (val, test))

optimizer = dict(_delete_=True, type="AdamW", lr=7e-4, weight_decay=0.05)
optim_wrapper, train_cfg = dict(optimizer=optimizer, clip_grad=dict(max_norm=5)), dict(max_epochs=16, val_interval=2)
warmup = dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50)
cosine = dict(type="CosineAnnealingLR", eta_min_ratio=0.01, begin=0, end=16, by_epoch=True, convert_to_iter_based=True)
param_scheduler = [warmup, cosine]
draw = dict(draw=True, interval=1)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2), logger=dict(interval=10), visualization=draw)
