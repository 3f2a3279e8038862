"""TiC by timm's contract: what create_model promises of every model, on every variant."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.models import FeatureInfo, create_feature_extractor, group_parameters
from timm.optim import param_groups_layer_decay

import tic_backbone.timm
from tic_backbone import VARIANTS, TiC
from tic_backbone.checkpoint import load_weights

NAMES = [f"tic_{arch}" for arch in VARIANTS]
SMALL = dict(channels=(16, 32, 48, 64), depths=(2, 1, 2, 1), head_dim=16, kernel_size=3)


def create(name="tic_nano", **kwargs):
    """A model without storage and, unless asked otherwise, with few blocks: shapes and existence at no cost."""
    with torch.device("meta"):
        return timm.create_model(name, **{"depths": (1, 2, 1, 1), **kwargs})


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("tic_nano", **{**SMALL, "num_classes": 5, **kwargs}).eval()


def images(h=64, w=64, channels=3, device="cpu"):
    return torch.randn(2, channels, h, w, generator=torch.Generator().manual_seed(0)).to(device)


def without_gradient(model):
    return [name for name, p in model.named_parameters() if p.grad is None]


# Registry and configuration


def test_variants_are_registered_without_weights():
    assert {*timm.list_models("tic_*")} == {*NAMES} == {*tic_backbone.timm.__all__}
    assert timm.list_models("tic_*", pretrained=True) == []
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        create(pretrained=True)


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_tells_the_truth(name):
    model, variant = create(name, depths=None), VARIANTS[name.removeprefix("tic_")]
    assert (model.config.channels, model.config.depths) == (variant.channels, variant.depths)
    cfg, state = model.default_cfg, model.state_dict()
    assert state[cfg["classifier"] + ".weight"].shape[0] == cfg["num_classes"] == model.num_classes == 1000
    assert state[cfg["first_conv"] + ".weight"].shape[1] == cfg["input_size"][0] == model.in_chans == 3
    assert next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d)) is model.get_submodule(cfg["first_conv"])
    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert not cfg["fixed_input_size"] and not cfg["url"]


def test_fields_reach_the_backbone():
    fields = dict(kernel_size=5, cyclic_shift=False, inter_pool=False, mlp_ratio=2.0, drop_path_rate=0.3, with_cp=True)
    config = create(**fields, in_chans=1, drop_rate=0.2).config
    assert {**fields, "in_channels": 1}.items() <= vars(config).items()
    assert config.channels == VARIANTS["nano"].channels


@pytest.mark.parametrize("wrong", [{"kernal_size": 3}, {"img_size": 224}, {"out_indices": (1,)}, {"in_channels": 1}])
def test_other_arguments_are_type_errors(wrong):
    with pytest.raises(TypeError, match=next(iter(wrong))):
        create(**wrong)


def test_image_channels_and_sizes_are_checked():
    model = small(in_chans=1)
    assert model(images(33, 47, channels=1)).shape == (2, 5)
    for shape in ((2, 3, 64, 64), (1, 64, 64), (2, 1, 31, 64)):
        with pytest.raises(ValueError, match="images"):
            model(torch.zeros(shape))


# Head


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (33, 97)])
def test_head_shapes(name, size):
    x, grid = images(*size, device="meta"), tuple(-(-s // 32) for s in size)
    model = create(name, num_classes=10)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, *grid)
    assert model(x).shape == model.forward_head(features).shape == (2, 10)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    for num_classes, pool, expected in [
        (0, "avg", (2, model.num_features)),
        (0, "", (2, model.num_features, *grid)),
        (10, "", (2, 10, *grid)),
        (7, "max", (2, 7)),
    ]:
        other = create(name, num_classes=num_classes, global_pool=pool)
        model.reset_classifier(num_classes, pool)
        assert other.forward_head(features).shape == model.forward_head(features).shape == expected
        assert other.num_classes == model.num_classes == num_classes
        assert [p.shape for p in other.parameters()] == [p.shape for p in model.parameters()]


def test_head_is_pooling_and_a_linear_layer():
    model, x = small(), images()
    features = model.forward_features(x)
    pooled = features.mean((2, 3))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    dense = small(global_pool="")
    torch.testing.assert_close(dense(x), torch.nn.functional.conv2d(features, *dense.get_classifier().parameters()))


def test_reset_keeps_mode_dtype_and_pooling():
    model = small(global_pool="max", drop_rate=0.3).to(torch.float64)
    for training in (True, False):
        model.train(training).reset_classifier(3)
        assert all(m.training == training for m in model.modules())
        assert model.head.global_pool.pool_type == "max" and model.head.drop.p == 0.3
        assert model(images().double()).dtype == torch.float64
    model.reset_classifier(0)
    model.reset_classifier(4, "avg")
    assert model(images().double()).dtype == torch.float64
    model = timm.create_model("tic_nano", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_drop_rate_is_the_heads_alone():
    model = small(drop_rate=0.5).train()
    features = model.forward_features(images())
    torch.testing.assert_close(model.forward_features(images()), features)
    assert not torch.equal(model.forward_head(features), model.forward_head(features))
    assert torch.equal(model.eval().forward_head(features), model.forward_head(features))


# Gradients


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(num_classes=42),
        dict(num_classes=0),
        dict(num_classes=0, global_pool=""),
        dict(features_only=True),
        dict(features_only=True, out_indices=(1, 2)),
        dict(features_only=True, out_indices=(0,)),
    ],
)
def test_every_parameter_gets_a_gradient(name, kwargs):
    """Parameters without one stop distributed training."""
    model = create(name, **kwargs).train()
    out = model(images(device="meta"))
    sum(o.mean() for o in (out if isinstance(out, list) else [out])).backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.heavy) for name in NAMES[1:])])
def test_forward_and_backward_are_finite(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=42).train()
    logits = model(images(96, 70))
    logits.square().sum().backward()
    assert logits.shape == (2, 42) and logits.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_checkpointing_recomputes_and_changes_nothing():
    results, calls = [], []
    for enable in (False, True):
        model = small(drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        calls.append(0)
        for module in model.modules():
            if type(module).__name__ == "MSAConv2d":
                module.register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
        torch.manual_seed(1)
        logits = model(images())
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain)
    assert calls == [6, 12]
    model.set_grad_checkpointing(False)
    assert not model.config.with_cp


def test_frozen_stages_stay_frozen():
    model = small(frozen_stages=2).train()
    model.reset_classifier(3)
    model(images()).sum().backward()
    assert {n.split(".")[0] for n in without_gradient(model)} == {"stem", "stages"}
    assert not model.stages[1].training and model.stages[2].training and model.head.training


# Maps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("out_indices", [None, (0, 2), (1,), (-1,), (-3, -2), 2])
def test_feature_info_announces_the_maps(name, out_indices):
    model = create(name, features_only=True, **({} if out_indices is None else {"out_indices": out_indices}))
    maps = model(images(70, 97, device="meta"))
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    assert [m.shape for m in maps] == [(2, c, -(-70 // s), -(-97 // s)) for c, s in zip(channels, strides, strict=True)]
    stages = {None: [0, 1, 2, 3], 2: [2, 3]}.get(out_indices) or [i % 4 for i in out_indices]
    assert strides == [4 * 2**i for i in stages]
    assert len(model.model.stages) == max(stages) + 1


def test_maps_are_the_cores_before_their_norms():
    model, core, x = small(), TiC(SMALL).eval(), images(64, 90)
    load_weights(core, model.state_dict())
    features = timm.create_model("tic_nano", features_only=True, **SMALL).eval()
    missing, _ = features.model.load_state_dict(model.state_dict(), strict=False)
    assert missing == [] and len(features.model.norms) == 0
    for got, norm, expected in zip(features(x), core.norms.values(), core(x), strict=True):
        torch.testing.assert_close(norm(got), expected)
    torch.testing.assert_close(model.forward_features(x), core(x)[-1])


@pytest.mark.parametrize("feature_cls", ["hook", "fx"])
def test_other_feature_extractors_agree(feature_cls):
    model = small(features_only=True, out_indices=(1, 3))
    other = small(features_only=True, out_indices=(1, 3), feature_cls=feature_cls)
    for got, expected in zip(other(images()), model(images()), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("indices", "stages"), [(None, [0, 1, 2, 3]), (2, [2, 3]), ([1], [1]), ([0, -2], [0, 2])])
def test_intermediates(indices, stages):
    model, x = small(), images(64, 48)
    features, maps = model.forward_intermediates(x)
    assert FeatureInfo(model.feature_info, 4).channels() == [m.shape[1] for m in maps]
    torch.testing.assert_close(features, model.forward_features(x))
    got, chosen = model.forward_intermediates(x, indices)
    torch.testing.assert_close(got, features)
    torch.testing.assert_close(chosen, [maps[i] for i in stages])
    chosen = model.forward_intermediates(x, indices, norm=True, intermediates_only=True)
    torch.testing.assert_close(chosen, [features if i == 3 else maps[i] for i in stages])
    for stage in model.stages[max(stages) + 1 :]:
        stage.register_forward_pre_hook(lambda *_: pytest.fail("a stage ran that is not needed"))
    chosen = model.forward_intermediates(x, indices, stop_early=True, intermediates_only=True)
    torch.testing.assert_close(chosen, [maps[i] for i in stages])


def test_intermediates_refuse_what_they_cannot_give():
    model = small()
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(images(), output_fmt="NLC")
    for indices in ([4], [-5], 5):
        with pytest.raises(AssertionError, match="out of range"):
            model.forward_intermediates(images(), indices)


@pytest.mark.parametrize(("indices", "stages"), [([0, 1], [0, 1]), ([-2], [2]), (1, [3]), ([3, 1], [3, 1])])
@pytest.mark.parametrize("prune_norm", [False, True])
@pytest.mark.parametrize("prune_head", [False, True])
def test_pruning_leaves_what_is_needed(indices, stages, prune_norm, prune_head):
    model, x, whole = small(), images(), 3 in stages
    features, maps = model.forward_intermediates(x)
    logits = model(x)
    assert model.prune_intermediate_layers(indices, prune_norm, prune_head) == stages
    got, chosen = model.forward_intermediates(x, stages)
    torch.testing.assert_close(chosen, [maps[i] for i in sorted(stages)])
    torch.testing.assert_close(got, features if whole and not prune_norm else maps[max(stages)])
    assert len(model.stages) == max(stages) + 1 and len(model.norms) == (whole and not prune_norm)
    if whole and not prune_norm and not prune_head:
        torch.testing.assert_close(model(x), logits)
    if prune_head or not whole:
        torch.testing.assert_close(model(x), got)
        assert model.num_classes == 0
    assert model.num_features == model.head_hidden_size == got.shape[1]
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)


# Layer-wise decay


def test_layers_are_stem_blocks_head():
    model = create(depths=None)
    layer = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert {*layer} == {name for name, _ in model.named_parameters()}
    assert {*layer.values()} == {*range(1 + sum(model.config.depths) + 1)}
    assert {name for name, i in layer.items() if i == 0} == {n for n in layer if n.startswith("stem.")}
    assert {name for name, i in layer.items() if i == 13} == {"head.fc.weight", "head.fc.bias"}
    assert layer["stages.1.0.1.weight"] == layer["stages.1.1.pos.weight"] == layer["stages.0.2.pos.weight"] + 1
    assert layer["norms.3.weight"] == layer["stages.3.2.pos.weight"] == 12
    assert [*layer.values()] == sorted(layer.values())


def test_coarse_layers_are_stem_stages_head():
    model = create()
    layer = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    numbers = {"stem": 0, "stages.0": 1, "stages.1": 2, "stages.2": 3, "stages.3": 4, "norms.3": 4, "head.fc": 5}
    assert layer == {name: next(i for prefix, i in numbers.items() if name.startswith(prefix)) for name in layer}


def test_layer_decay_groups():
    model = small()
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {*scale} == {id(p) for p in model.parameters()}
    assert scale[id(model.head.fc.weight)] == 1 and scale[id(model.stem[0].weight)] == 0.5**7
    assert all((decay[id(p)] > 0) == (p.dim() > 1) for p in model.parameters())


# Weights, graphs, imports


def test_weights_travel_to_the_core_and_back(tmp_path):
    model, core = small(), TiC(SMALL, out_indices=(3,))
    assert load_weights(core, model.state_dict()).unexpected == ("head.fc.weight", "head.fc.bias")
    assert load_weights(model, core.state_dict()).missing == ("head.fc.weight", "head.fc.bias")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    again = small(drop_rate=0.1, checkpoint_path=str(tmp_path / "w.pth"))
    torch.testing.assert_close(again(images()), model(images()))


def test_fine_tuning_from_a_file_draws_a_new_classifier(tmp_path):
    source = small(num_classes=1000, in_chans=3)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    overlay = dict(file=str(tmp_path / "w.pth"))
    model = small(num_classes=4, in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    assert model(images(channels=1)).shape == (2, 4)
    torch.testing.assert_close(model.stem[0].weight, source.stem[0].weight.sum(1, keepdim=True))
    torch.testing.assert_close(model.stages[3][1].mlp.fc1.weight, source.stages[3][1].mlp.fc1.weight)


def test_fx_traces_it():
    model = small()
    graph = create_feature_extractor(model, {"stages.1": "map", "norms.3": "features", "head": "logits"})
    for size in ((64, 64), (45, 100)):
        out = graph.eval()(images(*size))
        features, maps = model.forward_intermediates(images(*size))
        for got, expected in zip(out.values(), (maps[1], features, model(images(*size))), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.heavy
def test_import_needs_timm_but_not_openmmlab():
    code = "import sys, tic_backbone.timm; print([m for m in sys.modules if m.split('.')[0] in ('mmengine', 'mmcv')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
