"""Every config builds, learns a step, and stays a short difference from its base."""

import re

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.py"))


def build(cfg):
    init_default_scope(cfg.default_scope)
    from mmdet.registry import MODELS

    return MODELS.build(cfg.model)


def sample(size, classes):
    from mmdet.structures import DetDataSample

    boxes = torch.tensor([[5.0, 8.0, 60.0, 70.0], [30.0, 30.0, 50.0, 52.0]])
    meta = dict(img_shape=size, pad_shape=size, batch_input_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    data = DetDataSample(metainfo=meta)
    data.gt_instances = InstanceData(bboxes=boxes, labels=torch.randint(classes, (2,)))
    return data


@pytest.mark.parametrize("path", CONFIGS)
def test_config_is_short_and_inherits(path):
    lines = (ROOT / path).read_text().splitlines()
    cfg = Config.fromfile(ROOT / path)
    assert len([line for line in lines if line.strip()]) <= 60
    assert any(re.match(r'_base_ = "mm\w+::', line) for line in lines)
    assert cfg.custom_imports.imports == ["tic_backbone.openmmlab"]


@pytest.mark.heavy
@pytest.mark.parametrize("path", CONFIGS)
def test_config_learns_a_step_and_predicts(path):
    """Losses are finite, and every parameter that wants a gradient gets one, as distributed training demands."""
    torch.manual_seed(0)
    model = build(Config.fromfile(ROOT / path)).train()
    size = (128, 160)
    samples = [sample(size, model.bbox_head.num_classes) for _ in range(2)]
    loss, _ = model.parse_losses(model.loss(torch.randn(2, 3, *size), samples))
    loss.backward()
    assert loss.isfinite()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        results = model.eval().predict(torch.randn(1, 3, 97, 131), [sample((97, 131), 1)])
    assert hasattr(results[0], "pred_instances")
