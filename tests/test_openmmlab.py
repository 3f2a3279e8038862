"""TiC as the three packages build it: from their registries, with init_cfg, in their optimizers' eyes."""

import subprocess
import sys

import mmdet.registry
import mmpretrain.registry
import mmseg.registry
import pytest
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS

import tic_backbone
from tic_backbone.openmmlab import MSAConv2d, load_pretrained, read_mm_checkpoint

SMALL = dict(channels=(16, 32, 48, 64), depths=(1, 1, 1, 1), head_dim=16, kernel_size=3)


def build(**kwargs):
    return MODELS.build(dict(type="TiC", arch=SMALL, **kwargs))


@pytest.mark.parametrize("package", [mmdet, mmseg, mmpretrain])
def test_every_package_builds_it(package):
    model = package.registry.MODELS.build(dict(type="TiC", arch="nano", out_indices=(1, 3)))
    assert isinstance(model, BaseModule) and isinstance(model, tic_backbone.TiC)
    assert [m.shape[1] for m in model(torch.randn(1, 3, 64, 64))] == [64, 256]


def test_core_imports_torch_alone():
    """The core must work, and stay fast to import, where nothing else is installed."""
    code = "import sys, tic_backbone; print([m for m in sys.modules if m.split('.')[0] in ('mmengine','mmcv','timm')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_pretrained_loads_under_a_prefix(tmp_path):
    source = build()
    weights = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": {**weights, "head.fc.weight": torch.zeros(2)}}, tmp_path / "w.pth")
    model = build(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "w.pth"), prefix="backbone."))
    model.init_weights()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_pretrained_of_a_whole_training_state_loads(tmp_path):
    """mmengine's checkpoints hold more than tensors: log history, scalars, random states."""
    from mmengine.logging import MessageHub

    hub = MessageHub.get_instance("test")
    hub.update_scalar("train/loss", torch.tensor(1.0))
    source = build()
    torch.save({"state_dict": source.state_dict(), "message_hub": hub.state_dict()}, tmp_path / "w.pth")
    model = build(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "w.pth")))
    model.init_weights()
    assert torch.equal(model.stem[0].weight, source.stem[0].weight)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.detector.backbone."])
def test_pretrained_finds_its_prefix(tmp_path, prefix):
    source = build()
    torch.save({prefix + name: value for name, value in source.state_dict().items()}, tmp_path / "w.pth")
    report = load_pretrained(model := build(), str(tmp_path / "w.pth"))
    assert report.matched == 1 and not report.unexpected
    assert torch.equal(model.stem[0].weight, source.stem[0].weight)


def test_pretrained_of_a_part_must_be_asked_for(tmp_path):
    part = {name: value + 1 for name, value in build().state_dict().items() if name.startswith("stages.0.")}
    torch.save(part, tmp_path / "w.pth")
    cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "w.pth"))
    with pytest.raises(ValueError, match="at least 90% must match"):
        build(init_cfg=cfg).init_weights()
    model = build(init_cfg=dict(cfg, min_matched=0))
    model.init_weights()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in part.items())


@pytest.mark.parametrize("content", [{}, {"layer1.weight": torch.zeros(3)}])
def test_pretrained_of_something_else_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    model = build(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "w.pth")))
    with pytest.raises(ValueError, match="0%"):
        model.init_weights()


class Getattr:
    """What mmengine's own list of safe names lets through: `getattr`, and with it everything."""

    def __reduce__(self):
        return getattr, (getattr, "__self__")


def test_a_history_opens_no_other_door(tmp_path):
    torch.save({"state_dict": {}, "message_hub": Getattr()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth"):
        read_mm_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("cfg", [dict(type="Kaiming"), dict(type="Pretrained", checkpiont="x")])
def test_other_init_cfg_is_refused(cfg):
    with pytest.raises(ValueError, match=r"type='Pretrained', checkpoint="):
        build(init_cfg=cfg)


def test_msa_conv_is_a_convolution_layer():
    """conv_cfg in any model that takes one: the sizes are those of the convolutions it replaces."""
    from mmcv.cnn import ConvModule
    from mmdet.models import FPN, ResNet

    cfg = dict(type="MSAConv2d")
    module = ConvModule(8, 16, 3, stride=2, padding=1, conv_cfg=cfg, norm_cfg=dict(type="BN"))
    assert module(torch.randn(2, 8, 17, 13)).shape == (2, 16, 9, 7)
    resnet = ResNet(18, base_channels=8, conv_cfg=cfg)
    resnet.init_weights()
    maps = resnet(torch.randn(2, 3, 67, 64))
    assert [m.shape[1:] for m in maps] == [(8, 17, 16), (16, 9, 8), (32, 5, 4), (64, 3, 2)]
    sum(m.sum() for m in maps).backward()
    fpn = FPN([8, 16], 8, num_outs=2, conv_cfg=dict(**cfg, heads=4))
    assert {m.groups for m in fpn.modules() if isinstance(m, MSAConv2d)} == {4}
    assert [m.shape for m in fpn(maps[:2])] == [(2, 8, 17, 16), (2, 8, 9, 8)]


def test_msa_conv_in_a_mask_head_bears_a_batch_without_proposals():
    from mmdet.models import FCNMaskHead

    channels = dict(in_channels=16, conv_out_channels=16, num_classes=3)
    head = FCNMaskHead(num_convs=2, **channels, conv_cfg=dict(type="MSAConv2d"))
    masks = head(torch.zeros(0, 16, 14, 14))
    assert masks.shape == (0, 3, 28, 28)
    masks.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.convs.parameters())  # as DDP needs it


def test_misspelt_argument_is_a_type_error():
    with pytest.raises(TypeError, match="out_indexes"):
        build(out_indexes=(1,))


def test_init_weights_keeps_random_weights_without_init_cfg():
    model = build()
    before = model.stem[0].weight.clone()
    model.init_weights()
    assert torch.equal(model.stem[0].weight, before)


def test_layers_are_stem_blocks_and_the_rest():
    model = MODELS.build(dict(type="TiC", arch="nano", depths=(1, 2, 1, 1)))
    depth = {name: model.get_layer_depth(f"backbone.{name}", "backbone.") for name in model.state_dict()}
    assert {total for _, total in depth.values()} == {7}
    layers = {name: layer for name, (layer, _) in depth.items()}
    assert [*layers.values()] == sorted(layers.values()) and {*layers.values()} == {*range(7)}
    assert {layer for name, layer in layers.items() if name.startswith("stages.1.")} == {2, 3}
    assert {layer for name, layer in layers.items() if name.startswith("stages.1.0.")} == {2}
    assert model.get_layer_depth("head.fc.weight", "backbone.") == (6, 7)


def test_maps_are_what_mmcvs_operators_take():
    """Deformable convolutions refuse channels-last memory."""
    assert all(out.is_contiguous() for out in build()(torch.randn(2, 3, 64, 64)))
