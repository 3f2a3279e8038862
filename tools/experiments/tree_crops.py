"""The default job's detector on fixed crops of 256 x 256 px: 20 epochs of batches of 5, as many steps and pixels as 8
epochs of whole photos."""

_base_ = "../../configs/tic_retinanet.py"

crop = dict(type="RandomCrop", crop_size=(256, 256), allow_negative_crop=True)
pipeline = [*_base_.train_pipeline[:-1], crop, _base_.train_pipeline[-1]]
train_dataloader = dict(batch_size=5, dataset=dict(pipeline=pipeline))
train_cfg = dict(max_epochs=20, val_interval=5)
param_scheduler = [_base_.warmup, dict(_base_.cosine, end=20)]
