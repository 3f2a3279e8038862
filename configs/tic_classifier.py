"""TiC-nano learns to read handwritten digits, from random weights, in minutes on two cores without a GPU."""

_base_ = "mmpretrain::resnet/resnet18_8xb16_cifar10.py"
custom_imports = dict(imports=["tic_backbone.openmmlab"])
prepare_data = "make data JOB=classifier"

# As a detector's backbone: init_cfg=dict(type="Pretrained", checkpoint=..., prefix="backbone.") in the backbone there.
model = dict(
    backbone=dict(_delete_=True, type="TiC", arch="nano", out_indices=(3,), drop_path_rate=0.05),
    head=dict(in_channels=256),
)

load = dict(type="LoadImageFromFile")
train_pipeline = [load, dict(type="RandomCrop", crop_size=32, padding=4), dict(type="PackInputs")]
test_pipeline = [load, dict(type="PackInputs")]
data = dict(_delete_=True, type="CustomDataset", data_root="data/digits/")
train_dataloader = dict(
    batch_size=32, num_workers=1, dataset=dict(data_prefix="train", pipeline=train_pipeline, **data)
)
val_dataloader = dict(batch_size=64, num_workers=1, dataset=dict(data_prefix="test", pipeline=test_pipeline, **data))
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=5)
)
train_cfg = dict(max_epochs=24)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, begin=0, end=24, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=2),
    logger=dict(interval=10),
    visualization=dict(enable=True, interval=100, rescale_factor=8),
)
