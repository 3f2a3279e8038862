"""TiC-tiny, trained at 224 x 224 by tic-tiny_16xb64_in1k.py, goes on for 30 epochs at 384 x 384 with Swin's recipe."""

_base_ = "./tic-tiny_16xb64_in1k.py"
load_from = "work_dirs/tic-tiny_16xb64_in1k/epoch_300.pth"

train_pipeline = [dict(s, scale=384) if s["type"] == "RandomResizedCrop" else s for s in _base_.train_pipeline]
whole = dict(type="Resize", scale=384, backend="pillow", interpolation="bicubic")
test_pipeline = [_base_.test_pipeline[0], whole, _base_.test_pipeline[-1]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=4e-5, weight_decay=1e-8))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=4e-7, by_epoch=True, begin=5),
]
train_cfg = dict(max_epochs=30)
