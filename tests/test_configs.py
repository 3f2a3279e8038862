"""Every config is a short difference from an installed base, prepares its data, learns a step and predicts."""

import copy
import functools
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.dataset import Compose, pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

CONFIGS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.py") if p.parent.name != "_base_")
BOXES = [[5, 8, 60, 70], [30, 30, 50, 52]]
# What a dataset of each package tells about a photo, and the name of what its models predict
ANNOTATION = {
    "mmdet": lambda mask, zero_is_no_class: dict(
        instances=[dict(bbox=b, bbox_label=0, ignore_flag=0, mask=[np.take(b, [0, 1, 2, 1, 2, 3])]) for b in BOXES]
    ),
    "mmseg": lambda mask, zero_is_no_class: dict(
        seg_map_path=mask, seg_fields=[], label_map=None, reduce_zero_label=zero_is_no_class
    ),
    "mmpretrain": lambda mask, zero_is_no_class: dict(gt_label=7),
}
PREDICTION = dict(mmdet="pred_instances", mmseg="pred_sem_seg", mmpretrain="pred_score")
SIZES = {"native-1x": (97, 131), "384px": (384, 384), "in1k": (224, 224)}  # of a photo of 97 x 131, by config's name
# Two layers of a transformer instead of six, a few queries and regions, small pictures: enough to reach every parameter
SMALL = dict(num_layers=2, num_queries=20, max_per_img=20, num=16, size=(128, 160), scale=(160, 128))


@functools.cache
def read_once(path):
    return Config.fromfile(ROOT / path)


def read(path):
    return copy.deepcopy(read_once(path))


@pytest.fixture(autouse=True)
def like_other_tools(monkeypatch):
    """mmseg's own tools do not know how the forks name its distribution, as tic_backbone.cli does."""
    monkeypatch.setitem(MODULE2PACKAGE, "mmseg", "mmsegmentation")


@pytest.fixture
def photo(tmp_path):
    """Paths of a noisy photo, 131 wide and 97 high, and of a mask of two classes over it."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (97, 131, 3), np.uint8)).save(tmp_path / "photo.png")
    Image.fromarray(rng.integers(0, 2, (97, 131), np.uint8)).save(tmp_path / "mask.png")
    return str(tmp_path / "photo.png"), str(tmp_path / "mask.png")


def prepare(cfg, pipeline, photo):
    image, mask = photo
    about = ANNOTATION[cfg.default_scope](mask, cfg.train_dataloader.dataset.type == "ADE20KDataset")
    return Compose(pipeline)(dict(img_path=image, img_id=1, height=97, width=131, sample_idx=0, **about))


def shrink(node):
    """Put the values of `SMALL`, wherever a config's part has a value of the same type under their names."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, (dict, list)):
            shrink(value)
        elif key in SMALL and type(value) is type(SMALL[key]):
            node[key] = SMALL[key]
    return node


@pytest.mark.parametrize("path", CONFIGS)
def test_config_is_short_and_inherits(path):
    text = (ROOT / path).read_text()
    cfg = read(path)
    assert len(text.splitlines()) <= 40
    assert re.search(r'^_base_ = (\[\s*"\./(segmentation/)?_base_/find_mmseg\.py",\s*)?"(mm\w+::|\./\w)', text, re.M)
    assert cfg.custom_imports.imports == ["tic_backbone.openmmlab"]
    assert "://" not in cfg.pretty_text  # no weights of the base's backbone
    assert all(step.get("eta_min", 0) < cfg.optim_wrapper.optimizer.lr for step in cfg.param_scheduler)


@pytest.mark.parametrize("path", CONFIGS)
def test_config_prepares_a_photo(path, photo):
    cfg = read(path)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            packed = prepare(cfg, loader.dataset.pipeline, photo)
            size = tuple(packed["inputs"].shape[1:])
            assert packed["data_samples"].img_shape[:2] == size
            assert size == next((size for name, size in SIZES.items() if name in path), size)


@pytest.mark.heavy
@pytest.mark.parametrize("path", CONFIGS)
def test_config_learns_a_step_and_predicts(path, photo):
    """Losses are finite, and every parameter that wants a gradient gets one, as distributed training demands."""
    torch.manual_seed(0)
    cfg = read(path)
    cfg.model.setdefault("data_preprocessor", cfg.get("data_preprocessor"))  # as mmengine's runner does
    cfg.model.backbone.depths = (1, 1, 1, 1)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(shrink(cfg.model)).train()
        model.init_weights()
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
        plain = [step for step in cfg.train_dataloader.dataset.pipeline if step["type"].startswith(("Load", "Pack"))]
        data = model.data_preprocessor(pseudo_collate([prepare(cfg, plain, photo)] * 2), True)
        loss, _ = model.parse_losses(model(**data, mode="loss"))
        loss.backward()
        assert loss.isfinite()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        assert isinstance(optimizer, torch.optim.AdamW)
        data = pseudo_collate([prepare(cfg, shrink(cfg.test_dataloader.dataset.pipeline), photo)])
        with torch.no_grad():
            results = model.eval().test_step(data)
    assert PREDICTION[cfg.default_scope] in results[0]
