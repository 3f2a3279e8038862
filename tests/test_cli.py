"""What the command lines tell their user, without starting them."""

import io

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from tic_backbone.cli import BadInput, LoadImageFromFile, check_data, data_files, is_truncated


@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_truncation_is_seen_wherever_the_file_ends(kind, options):
    picture = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(picture, kind, **options)
    whole = picture.getvalue()
    assert not is_truncated(whole) and not is_truncated(whole + b"\0" * 16)
    assert all(is_truncated(whole[:end]) for end in range(len(whole) // 2, len(whole) - 8, 97))


def test_embedded_thumbnail_does_not_hide_truncation():
    thumb = io.BytesIO()
    Image.new("RGB", (8, 8)).save(thumb, "jpeg")
    picture = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(picture, "jpeg", comment=thumb.getvalue())
    assert not is_truncated(picture.getvalue())
    assert is_truncated(picture.getvalue()[:-100])


@pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff"])
def test_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"photo\.jpg"):
        LoadImageFromFile().transform({"img_path": str(path)})


def test_missing_image_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"photo\.jpg"):
        LoadImageFromFile().transform({"img_path": str(tmp_path / "photo.jpg")})


def test_data_files_of_nested_datasets():
    inner = dict(data_root="a/", ann_file="x.json", data_prefix=dict(img="train/"))
    loader = dict(dataset=dict(type="RepeatDataset", dataset=dict(datasets=[inner, dict(data_root="b/")])))
    assert list(data_files(loader)) == ["a/x.json", "a/train/", "b/"]
    assert list(data_files(None)) == []


def test_check_data_looks_at_the_splits_it_is_given(tmp_path):
    cfg = Config(dict(train_dataloader=dict(dataset=dict(data_root=str(tmp_path / "no"))), test_dataloader=None))
    check_data(cfg, "val", "test")
    with pytest.raises(BadInput, match="README"):
        check_data(cfg, "train")
    cfg.prepare_data = "make data"
    with pytest.raises(BadInput, match="run: make data"):
        check_data(cfg, "train")
