"""RetinaNet with TiC-tiny on COCO, every photo in its own resolution, in training and in testing.

mmdet groups a batch by aspect ratio, upright with upright, and pads to the largest in it.
"""

_base_ = "./retinanet_tic-tiny_fpn_1x_coco.py"

# mmdet divides predicted boxes by a scale factor that only Resize notes: by 1 it copies the photo as it is.
own_size = dict(type="Resize", scale_factor=1.0, keep_ratio=True)
train_pipeline = [step for step in _base_.train_pipeline if step["type"] != "Resize"]
test_pipeline = [own_size if step["type"] == "Resize" else step for step in _base_.test_pipeline]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
