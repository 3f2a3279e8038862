"""tools/train.py and tools/test.py as a user runs them, on a tiny dataset."""

import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from conftest import on_folder, run, start
from PIL import Image

pytestmark = pytest.mark.heavy
TRAIN, CONFIG = "tools/train.py", "configs/tic_retinanet.py"
QUICK = ["train_dataloader.batch_size=2", "default_hooks.logger.interval=1", "train_cfg.val_interval=1"]
ONE = dict(val_dataloader__dataset__indices=1)
QUICK += ["model.test_cfg.score_thr=0"]


def options(folder, **settings):
    return ["--cfg-options", *on_folder(folder), *QUICK, *(f"{k.replace('__', '.')}={v}" for k, v in settings.items())]


def meta(path):
    return torch.load(path, map_location="cpu", weights_only=False)["meta"]


def test_train_resume_and_test(trees, tmp_path):
    work = tmp_path / "work"
    command = [TRAIN, CONFIG, "--work-dir", work]
    code, out, err = run(*command, *options(trees, train_cfg__max_epochs=1))
    assert code == 0, err
    assert "coco/bbox_mAP_50" in out.splitlines()[-1]
    assert (work / "curves.png").stat().st_size > 5000
    assert list(work.glob("*/vis_data/vis_image/*.png")), "no pictures of predictions beside the truth"

    code, out, err = run(*command, "--resume", *options(trees, train_cfg__max_epochs=2))
    assert code == 0, err
    assert "Epoch(train) [1]" not in out and "Epoch(train) [2][3/3]" in out.replace("  ", " ")
    saved = torch.load(work / "epoch_2.pth", map_location="cpu", weights_only=False)
    assert saved["meta"]["iter"] == 6
    assert {int(s["step"]) for s in saved["optimizer"]["state"].values()} == {6}

    code, out, err = run("tools/test.py", CONFIG, work / "epoch_2.pth", "--work-dir", work, *options(trees))
    assert code == 0 and "coco/bbox_mAP_50" in out.splitlines()[-1], err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_to_resume_from(trees, tmp_path, number):
    work = tmp_path / "work"
    command = [TRAIN, CONFIG, "--work-dir", work]
    process = start(*command, *options(trees, train_cfg__max_epochs=500))
    for line in process.stdout:
        if "Epoch(train)" in line and "[2][1/3]" in line.replace(" ", ""):
            break
    os.killpg(process.pid, number)  # as a terminal and `timeout` do: the data loader's workers get it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"{work}/interrupted.pth" in out and "--resume" in out
    stopped = meta(work / "interrupted.pth")
    assert stopped["iter"] > 3

    if number == signal.SIGINT:
        return  # one of the two is resumed
    epochs = stopped["epoch"] + 1
    code, out, err = run(*command, "--resume", *options(trees, train_cfg__max_epochs=epochs))
    assert code == 0, err
    assert meta(work / f"epoch_{epochs}.pth")["iter"] == stopped["iter"] + 3


def test_a_truncated_image_is_named_and_nothing_is_lost(trees, tmp_path):
    """Found in the second epoch, as when a disk fills while training runs."""
    work, picture = tmp_path / "work", trees / "train" / "3.jpg"
    process = start(TRAIN, CONFIG, "--work-dir", work, *options(trees, train_cfg__max_epochs=500))
    for line in process.stdout:
        if "Epoch(train)" in line:
            picture.write_bytes(picture.read_bytes()[:-700])
            break
    out, err = process.communicate(timeout=120)
    line = one_line(process.returncode, err)
    assert str(picture) in line and "truncated" in line
    assert f"{work}/interrupted.pth" in out and meta(work / "interrupted.pth")["iter"] > 0


def test_two_processes_train(trees, tmp_path):
    """Every parameter takes part, or DistributedDataParallel would complain; both see half of the pictures."""
    work = tmp_path / "work"
    code, out, err = run(
        "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29511 + int(time.time()) % 1000,
        TRAIN, CONFIG, "--work-dir", work, "--launcher", "pytorch",
        *options(trees, train_cfg__max_epochs=1, train_dataloader__batch_size=1),
    )  # fmt: skip
    assert code == 0, err[-3000:]
    assert "[1][3/3]" in out.replace(" ", "") and "coco/bbox_mAP_50" in out
    assert "unused" not in err and "bucket" not in err and (work / "epoch_1.pth").is_file()


def test_bfloat16(trees, tmp_path):
    settings = options(trees, train_cfg__max_epochs=1, train_dataloader__dataset__indices=2, **ONE)
    code, out, err = run(TRAIN, CONFIG, "--amp", "--work-dir", tmp_path / "work", *settings)
    assert code == 0 and not re.search(r"loss\w*: (nan|inf)", out), err[-3000:]


RUN = """
custom_imports = dict(imports=["tic_backbone.openmmlab"])
backbone = dict(type="TiC", arch="nano", out_indices=({stage},))
norm = dict(mean=[127.0] * 3, std=[60.0] * 3)
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3))
val_cfg, test_cfg = dict(), dict()
"""
CLASSIFY = """
_base_ = "mmpretrain::_base_/default_runtime.py"
model = dict(type="ImageClassifier", backbone=backbone, neck=dict(type="GlobalAveragePooling"),
             head=dict(type="LinearClsHead", num_classes=2, in_channels=256))
data_preprocessor = dict(num_classes=2, **norm)
data = dict(type="CustomDataset", data_root="{folder}", pipeline=[
    dict(type="LoadImageFromFile"), dict(type="Resize", scale=(64, 64)), dict(type="PackInputs")])
train_dataloader = dict(batch_size=2, num_workers=1, sampler=dict(type="DefaultSampler", shuffle=True), dataset=data)
val_dataloader = test_dataloader = dict(train_dataloader, sampler=dict(type="DefaultSampler", shuffle=False))
val_evaluator = test_evaluator = dict(type="Accuracy", topk=1)
train_cfg = dict(by_epoch=True, max_epochs=1)
"""
SEGMENT = """
_base_ = "mmseg::_base_/default_runtime.py"
model = dict(type="EncoderDecoder", data_preprocessor=dict(type="SegDataPreProcessor", size_divisor=32, **norm),
             backbone=backbone, train_cfg=dict(), test_cfg=dict(mode="whole"),
             decode_head=dict(type="FCNHead", in_channels=64, channels=16, num_classes=2, in_index=0))
data = dict(type="BaseSegDataset", data_root="{folder}", metainfo=dict(classes=("a", "b")),
            data_prefix=dict(img_path="img", seg_map_path="map"))
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
train_dataloader = dict(batch_size=1, num_workers=1, sampler=dict(type="DefaultSampler", shuffle=True),
                        dataset=dict(pipeline=load, **data))
val_dataloader = test_dataloader = dict(train_dataloader, sampler=dict(type="DefaultSampler", shuffle=False))
val_evaluator = test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=1)
"""


@pytest.mark.parametrize(
    ("config", "stage", "folders", "metric"),
    [(CLASSIFY, 3, ("cat", "dog"), "accuracy/top1"), (SEGMENT, 1, ("img", "map"), "mIoU")],
)
def test_classification_and_segmentation_train_and_test(config, stage, folders, metric, trees, tmp_path):
    """The same two tools serve the other packages, and their readers name a truncated picture as well."""
    rng, data = np.random.default_rng(0), tmp_path / "data"
    for folder in folders:
        (data / folder).mkdir(parents=True)
        for i in range(3):
            shape, kind, top = ((50 + i, 77), "png", 2) if folder == "map" else ((50 + i, 77, 3), "jpg", 255)
            Image.fromarray(rng.integers(0, top, shape, np.uint8)).save(data / folder / f"{i}.{kind}")
    path, work = tmp_path / "config.py", tmp_path / "work"
    path.write_text((RUN + config).format(folder=data, stage=stage))
    code, out, err = run(TRAIN, path, "--work-dir", work)
    assert code == 0, err[-3000:]
    assert metric in out
    pictures = tmp_path / "pictures"
    code, out, err = run("tools/test.py", path, work / "epoch_1.pth", "--work-dir", work, "--show-dir", pictures)
    assert code == 0 and metric in out, err[-3000:]
    assert [p for p in pictures.rglob("*") if p.suffix in (".png", ".jpg")]

    if config is CLASSIFY:  # which is how weights reach dense prediction
        on_trees = options(trees, train_cfg__max_epochs=1, train_dataloader__dataset__indices=2, **ONE)
        start = ["--backbone", "tic_nano", "--pretrained", work / "epoch_1.pth"]
        code, out, err = run(TRAIN, CONFIG, *start, "--work-dir", tmp_path / "detector", *on_trees)
        assert code == 0 and re.search(r"epoch_1.pth: \d+ tensors loaded, 100% of the model's weights", out), err[
            -3000:
        ]

    picture = data / folders[0] / "1.jpg"
    picture.write_bytes(picture.read_bytes()[:-300])
    code, _, err = run(TRAIN, path, "--work-dir", work)
    assert str(picture) in one_line(code, err)


def one_line(code, err):
    lines = [line for line in err.splitlines() if line.strip() and "Warning" not in line]
    assert code == 1 and lines[-1].startswith("error: ") and "Traceback" not in err, err
    return lines[-1]


def test_wrong_config_path():
    code, _, err = run(TRAIN, "configs/nope.py")
    assert "configs/nope.py" in one_line(code, err)


def test_missing_data_names_the_command(tmp_path):
    code, _, err = run(TRAIN, CONFIG, "--work-dir", tmp_path / "work", *options(tmp_path / "nowhere"))
    assert "nowhere" in one_line(code, err) and "run: make data" in err


def test_annotations_that_are_not_json(trees, tmp_path):
    path = trees / "annotations" / "train.json"
    path.write_text(path.read_text()[:100])
    code, _, err = run(TRAIN, CONFIG, "--work-dir", tmp_path / "work", *options(trees))
    assert str(path) in one_line(code, err)


def test_missing_checkpoint(trees, tmp_path):
    code, _, err = run("tools/test.py", CONFIG, tmp_path / "none.pth", *options(trees))
    assert "none.pth" in one_line(code, err)
