"""Semantic FPN with TiC on a micrograph of cell nuclei, from random weights, in minutes on two cores without a GPU."""

_base_ = ["./segmentation/_base_/find_mmseg.py", "mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py"]
custom_imports = dict(imports=["tic_backbone.openmmlab"])
prepare_data = "make data JOB=segmentor"

model = dict(
    pretrained=None,
    data_preprocessor=dict(mean=[32.0] * 3, std=[24.0] * 3, size=None, size_divisor=32),
    backbone=dict(_delete_=True, type="TiC", arch="nano", drop_path_rate=0.05),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    decode_head=dict(
        in_channels=[64] * 4, channels=64, num_classes=2, norm_cfg=dict(_delete_=True, type="GN", num_groups=16)
    ),
)
load, masks, pack = (dict(type=step) for step in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs"))
crop = dict(type="RandomCrop", crop_size=(160, 160))
flip = dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"])
exposure = dict(type="PhotoMetricDistortion", brightness_delta=8)  # the photo's mean is 32
train_pipeline = [load, masks, crop, flip, exposure, pack]
test_pipeline = [load, masks, pack]
meta = dict(classes=("background", "nucleus"), palette=[[0, 0, 0], [255, 160, 0]])
data = dict(_delete_=True, type="BaseSegDataset", data_root="data/nuclei/", img_suffix=".png", metainfo=meta)
train, val = (dict(img_path=f"images/{split}", seg_map_path=f"masks/{split}") for split in ("train", "val"))
train_dataloader = dict(num_workers=1, dataset=dict(data_prefix=train, pipeline=train_pipeline, **data))
val_dataloader = dict(num_workers=1, dataset=dict(data_prefix=val, pipeline=test_pipeline, **data))
test_dataloader = val_dataloader

optimizer = dict(_delete_=True, type="AdamW", lr=1e-3, weight_decay=0.05)
optim_wrapper = dict(optimizer=optimizer, clip_grad=dict(_delete_=True, max_norm=5))
train_cfg = dict(max_iters=400, val_interval=50)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type="PolyLR", power=0.9, eta_min=0.0, by_epoch=False, begin=40, end=400),
]
checkpoint, draw = dict(interval=50, max_keep_ckpts=2), dict(draw=True, interval=1)
default_hooks = dict(checkpoint=checkpoint, logger=dict(interval=10), visualization=draw)
visualizer = dict(alpha=0.4)
