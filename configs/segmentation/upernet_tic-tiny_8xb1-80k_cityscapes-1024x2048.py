"""UPerNet with TiC-tiny on Cityscapes at data/cityscapes in its native 1024 x 2048: in crops so large, tested whole."""

_base_ = ["./_base_/find_mmseg.py", "mmseg::upernet/upernet_r50_4xb2-80k_cityscapes-512x1024.py"]
custom_imports = dict(imports=["tic_backbone.openmmlab"])

crop_size = (1024, 2048)
data_preprocessor = dict(size=crop_size)
model = dict(
    pretrained=None,
    data_preprocessor=data_preprocessor,
    backbone=dict(_delete_=True, type="TiC", arch="tiny", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
train_pipeline = [dict(s, crop_size=crop_size) if s["type"] == "RandomCrop" else s for s in _base_.train_pipeline]
train_dataloader = dict(batch_size=1, dataset=dict(pipeline=train_pipeline))

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0),
)
param_scheduler = [  # the base's ends at 1e-4
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=80000),
]
