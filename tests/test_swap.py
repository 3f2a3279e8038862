"""TiC in the place of other backbones, in configs that the packages bring."""

import copy
import functools
import re

import pytest
import torch
from mmengine.hub import get_config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from survey_configs import learn

import tic_backbone.cli  # noqa: F401 - lets mmengine find mmseg's bases
from tic_backbone.openmmlab import swap_backbone

MASK_RCNN = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
MASK2FORMER = "mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py"
CONVNEXT = "mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py"
SWIN = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
RESNET = "mmpretrain::resnet/resnet50_8xb32_in1k.py"
FINETUNED_VIT = "mmpretrain::mae/benchmarks/vit-base-p16_8xb128-coslr-100e_in1k.py"
# What each config must say after the swap: stages, and who reads their channels (nano: 32, 64, 128, 256)
REWIRED = {
    MASK_RCNN: ((0, 1, 2, 3), {"neck.in_channels": [32, 64, 128, 256]}),
    "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py": (
        (1, 2, 3),
        {"neck.in_channels": [64, 128, 256], "neck.start_level": 0},
    ),
    "mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py": ((1, 2, 3), {"neck.in_channels": [256, 128, 64]}),
    "mmdet::ssd/ssd300_coco.py": (
        (1, 2),
        {"neck.in_channels": (64, 128), "bbox_head.in_channels": (64, 128, 512, 256, 256, 256)},
    ),
    MASK2FORMER: ((0, 1, 2, 3), {"panoptic_head.in_channels": [32, 64, 128, 256]}),
    "mmdet::detr/detr_r50_8xb2-150e_coco.py": ((3,), {"neck.in_channels": [256]}),
    "mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py": (
        (2,),
        {"rpn_head.in_channels": 128, "roi_head.bbox_head.in_channels": 128},
    ),
    "mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py": (
        (0, 2, 3),
        {"decode_head.in_channels": 256, "decode_head.in_index": 2, "decode_head.c1_in_channels": 32}
        | {"auxiliary_head.in_channels": 128, "auxiliary_head.in_index": 1},
    ),
    "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py": (
        (0, 1, 2, 3),
        {"decode_head.in_channels": [32, 64, 128, 256], "auxiliary_head.in_channels": 128},
    ),
    "mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py": (
        (2, 3),
        {"decode_head.in_channels": 256, "decode_head.in_index": 1, "auxiliary_head.in_index": 0},
    ),
    RESNET: ((3,), {"neck.type": "GlobalAveragePooling", "head.in_channels": 256}),
    "mmpretrain::vgg/vgg11_8xb32_in1k.py": ((3,), {"head.type": "LinearClsHead", "head.num_classes": 1000}),
    "mmpretrain::mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.py": ((3,), {"neck.in_channels": 256}),
}
REFUSED = {
    "mmdet::detectors/detectors_htc-r50_1x_coco.py": "RFP",
    "mmdet::cornernet/cornernet_hourglass104_10xb5-crop511-210e-mstest_coco.py": "hourglass",
    "mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py": "shared_head",
    "mmseg::vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py": "MultiLevelNeck",
    "mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py": "branch",
    "mmpretrain::mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py": "MAE",
    "mmpretrain::blip/blip-base_8xb32_retrieval.py": "no `backbone`",
}


@functools.cache
def read_once(name):
    return get_config(name)


def read(name):
    return copy.deepcopy(read_once(name))


@pytest.mark.parametrize("name", REWIRED)
def test_what_depends_on_the_backbone_is_rewired(name):
    stages, expected = REWIRED[name]
    cfg = swap_backbone(read(name), "tic_nano")
    assert cfg.model.backbone == dict(type="TiC", arch="nano", out_indices=stages)
    assert {path: find(cfg.model, path) for path in expected} == expected


def find(part, path):
    for key in path.split("."):
        part = (part[0] if isinstance(part, list) else part)[key]
    return part


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", [name for name in REWIRED if re.search("retinanet|ssd|dc5|unet|deeplabv3|vgg|moco", name)]
)
def test_swapped_models_learn(name):
    learn(swap_backbone(read(name), "nano", depths=(1, 1, 1, 1)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_in_a_sentence(name):
    with pytest.raises(ValueError, match=REFUSED[name]) as error:
        swap_backbone(read(name), "tic_tiny")
    assert "\n" not in str(error.value)


def test_the_old_config_stays_as_it_is_and_only_readers_change():
    old = read(MASK_RCNN)
    new = swap_backbone(old, "tic-small", drop_path_rate=0.2, kernel_size=5)
    assert old.to_dict() == read(MASK_RCNN).to_dict()
    assert new.model.backbone == dict(
        type="TiC", arch="small", out_indices=(0, 1, 2, 3), drop_path_rate=0.2, kernel_size=5
    )
    assert "torchvision" in old.pretty_text and "torchvision" not in new.pretty_text
    assert new.custom_imports.imports[-1] == "tic_backbone.openmmlab"
    for key in ("rpn_head", "roi_head", "test_cfg"):
        assert new.model[key] == old.model[key]
    assert {**new.model.neck, "in_channels": None} == {**old.model.neck, "in_channels": None}
    assert new.train_dataloader == old.train_dataloader and new.optim_wrapper == old.optim_wrapper


def test_wrong_variants_and_fields_are_errors():
    with pytest.raises(ValueError, match=r"'resnet50'.*tic_nano"):
        swap_backbone(read(MASK_RCNN), "resnet50")
    with pytest.raises(TypeError, match="kernal_size"):
        swap_backbone(read(MASK_RCNN), "nano", kernal_size=5)


def test_weights_of_the_old_backbone_are_forgotten():
    cfg = read(RESNET)
    cfg.load_from, cfg.model.pretrained, cfg.model.init_cfg = "resnet.pth", "resnet.pth", dict(type="Pretrained")
    cfg.model.backbone.with_cp = True
    new = swap_backbone(cfg, "nano")
    assert "load_from" not in new and not {"pretrained", "init_cfg"} & {*new.model}
    assert new.model.backbone.with_cp  # memory is the user's concern, and stays


def test_grey_images_stay_grey():
    assert swap_backbone(read("mmpretrain::lenet/lenet5_mnist.py"), "nano").model.backbone.in_channels == 1


def optimized(cfg):
    """(model, {parameter's name: its group in the optimizer})"""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return model, {name: group_of[id(p)] for name, p in model.named_parameters()}


def test_norms_that_were_spared_from_decay_still_are():
    model, groups = optimized(swap_backbone(read(MASK2FORMER), "nano", depths=(1, 1, 1, 1)))
    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    own = [name for name in groups if name.startswith("backbone.")]
    assert all(groups[name]["lr"] == pytest.approx(1e-5) for name in own)  # a tenth of the heads', as before
    spared = [name for name in own if groups[name]["weight_decay"] == 0]
    assert spared == [name for name in own if name.rsplit(".", 1)[0] in norms]


@pytest.mark.parametrize("config", [CONVNEXT, SWIN])
def test_rules_by_constructor_or_name_spare_all_norms(config):
    cfg = swap_backbone(read(config), "nano", depths=(1, 1, 1, 1))
    cfg.optim_wrapper.type = "OptimWrapper"  # some need a GPU
    model, groups = optimized(cfg)
    norms = [n for n, module in model.backbone.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) > 10
    assert all(groups[f"backbone.{name}.weight"]["weight_decay"] == 0 for name in norms)
    assert groups["backbone.stages.1.1.mlp.fc1.weight"]["weight_decay"] > 0


def test_other_channels_reach_the_neck():
    narrow = dict(channels=(16, 32, 48, 64), head_dim=16)
    swapped = swap_backbone(read("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"), "tiny", **narrow)
    assert swapped.model.neck.in_channels == [32, 48, 64]


def test_stages_cannot_be_chosen():
    with pytest.raises(ValueError, match=r"out_indices=\(3,\)"):
        swap_backbone(read("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"), "tiny", out_indices=(3,))


def test_layerwise_decay_knows_the_layers():
    _, groups = optimized(swap_backbone(read(FINETUNED_VIT), "nano", depths=(1, 2, 1, 1)))
    order = ["stem.0", "stages.0.1.pos", "stages.1.0.1", "stages.1.2.pos", "stages.2.0.1", "stages.3.1.pos", "norms.3"]
    scales = [groups[f"backbone.{name}.weight"]["lr_scale"] for name in order]
    assert scales == sorted({*scales})
    assert groups["backbone.stages.1.0.1.weight"]["lr_scale"] == groups["backbone.stages.1.1.pos.weight"]["lr_scale"]
    assert groups["head.fc.weight"]["lr_scale"] == groups["backbone.norms.3.weight"]["lr_scale"] == 1
