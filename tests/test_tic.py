"""The backbone by what it promises: sizes, strides, gradients, switches, errors."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tic_backbone import VARIANTS, TiC, TiCConfig
from tic_backbone.tic import Block, make_config

SMALL = dict(channels=(16, 32, 48, 64), depths=(2, 1, 2, 1), head_dim=16, kernel_size=3)


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    return TiC("nano").eval()


def ceil_div(size, stride):
    return -(-size // stride)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_announce_their_maps(name):
    with torch.device("meta"):
        model = TiC(name)
        maps = model(torch.empty(2, 3, 96, 64))
    assert model.out_strides == (4, 8, 16, 32)
    announced = zip(model.out_channels, model.out_strides)
    assert [tuple(m.shape) for m in maps] == [(2, c, 96 // s, 64 // s) for c, s in announced]


@pytest.mark.parametrize(("name", "millions"), [("nano", 3), ("tiny", 28), ("small", 50), ("base", 88)])
def test_variants_have_their_size(name, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in TiC(name).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.12)


@settings(deadline=None, max_examples=25)
@given(size=st.tuples(st.integers(32, 260), st.integers(32, 260)), data=st.data())
def test_any_size_gives_exact_strides(nano, size, data):
    if data.draw(st.booleans()):
        size = (32 + size[0] % 33, size[1] * 5)
    with torch.no_grad():
        maps = nano(torch.randn(1, 3, *size))
    assert [m.shape[2:] for m in maps] == [(ceil_div(size[0], s), ceil_div(size[1], s)) for s in (4, 8, 16, 32)]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (32, 640), (101, 64)])
@pytest.mark.parametrize("switches", [{}, {"cyclic_shift": False}, {"inter_pool": False}])
def test_every_parameter_gets_a_gradient(size, switches):
    torch.manual_seed(0)
    model = TiC(SMALL, **switches).train()
    sum(m.square().sum() for m in model(torch.randn(2, 3, *size))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    # Distributed training copies gradients whose layout is not their parameter's, and warns.
    assert [name for name, p in model.named_parameters() if p.grad.stride() != p.stride()] == []


def test_padding_of_a_batch_does_not_explode_gradients():
    """A norm of exact zeros multiplies gradients by eps ** -0.5; padded images bring such zeros."""
    torch.manual_seed(0)
    model, norms = TiC("nano", out_indices=(3,)), []
    whole = torch.randn(1, 3, 128, 128)
    padded = whole.clone()
    padded[..., 64:] = 0
    for image in (whole, padded):
        model.zero_grad()
        (model(image)[-1] * torch.arange(256.0).view(-1, 1, 1).cos()).sum().backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    assert norms[1] < 10 * norms[0]


@pytest.mark.parametrize("out_indices", [(0,), (1, 3), (0, 2), (2,)])
def test_nothing_is_built_that_is_not_asked_for(out_indices):
    """Parameters without gradients stop distributed training."""
    model = TiC(SMALL, out_indices=list(out_indices))
    maps = model(torch.randn(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [SMALL["channels"][i] for i in out_indices]
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_out_indices_only_choose_maps():
    torch.manual_seed(0)
    full, x = TiC(SMALL).eval(), torch.randn(1, 3, 64, 96)
    part = TiC(SMALL, out_indices=(1, 3)).eval()
    part.load_state_dict({k: v for k, v in full.state_dict().items() if k in part.state_dict()})
    for got, expected in zip(part(x), full(x)[1::2]):
        torch.testing.assert_close(got, expected)


def test_weights_do_not_know_a_size(nano):
    """Nothing but parameters: no table, no buffer, no stored resolution."""
    assert {*nano.state_dict()} == {name for name, _ in nano.named_parameters()}
    assert list(nano.buffers()) == []


def test_switches_off_mean_plain_msa_conv():
    plain = TiC(SMALL, cyclic_shift=False, inter_pool=False)
    layers = [m for m in plain.modules() if type(m).__name__ == "MSAConv2d"]
    assert all(m.cyclic_shift == 0 and m.inter_pool == 1 for m in layers)
    both = TiC(SMALL)
    both.load_state_dict(plain.state_dict())  # neither mechanism has parameters
    layers = [m for m in both.modules() if type(m).__name__ == "MSAConv2d"]
    assert all(m.cyclic_shift == m.kernel_size[0] // 2 == 1 for m in layers)
    assert [m.inter_pool for m in layers] == [1, 2, 1, 1, 2, 1]
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(plain(x)[0], both(x)[0])


def test_checkpointing_changes_neither_output_nor_gradient():
    x, results = torch.randn(2, 3, 64, 48), []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = TiC(SMALL, with_cp=with_cp, drop_path_rate=0.3).train()
        torch.manual_seed(1)
        maps = model(x)
        sum(m.square().sum() for m in maps).backward()
        results.append([*maps, *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results):
        torch.testing.assert_close(recomputed, plain)


def test_drop_path_drops_whole_samples_of_large_maps_without_gradients():
    torch.manual_seed(0)
    block = Block(16, make_config(SMALL), index=0, drop_path=0.5).train()
    block.pos, block.attn = nn.Identity(), nn.Identity()
    x = torch.randn(1, 16, 96, 64).expand(8, -1, -1, -1)
    with torch.no_grad():
        out = block(x)
    assert 1 < len(out.unique(dim=0)) <= 4  # either residual, both or none


def test_weights_go_into_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = TiC(SMALL)
    safetensors.save_file(model.state_dict(), tmp_path / "w.safetensors")
    TiC(SMALL).load_state_dict(safetensors.load_file(tmp_path / "w.safetensors"))


@pytest.mark.filterwarnings("ignore:Converting a tensor", "ignore:`torch.jit.trace")
def test_traced_without_gradients_it_serves_other_sizes():
    model = TiC(SMALL).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.rand(1, 3, 256, 256), check_trace=False)
        x = torch.rand(2, 3, 320, 192)
        for got, want in zip(traced(x), model(x)):
            torch.testing.assert_close(got, want)


def test_drop_path_grows_linearly():
    model = TiC("nano", drop_path_rate=0.2)
    rates = [m.rate for m in model.modules() if type(m).__name__ == "DropPath"]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.2, 12))


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_stages_neither_learn_nor_drop(frozen):
    model = TiC(SMALL, frozen_stages=frozen, drop_path_rate=0.5)
    assert model.train() is model and model.eval() is model
    model.train()
    still = [model.stem, *model.stages[:frozen]] if frozen else []
    moving = [*model.stages[frozen:], model.norms] if frozen else [model]
    assert not any(p.requires_grad for module in still for p in module.parameters())
    assert all(p.requires_grad for module in moving for p in module.parameters())
    assert not any(m.training for module in still for m in module.modules())
    assert all(m.training for module in moving for m in module.modules())
    sum(m.square().sum() for m in model(torch.randn(1, 3, 64, 64))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32(nano, dtype):
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = nano(x)
        with torch.autocast("cpu", dtype):
            maps = nano(x)
    for got, want in zip(maps, expected):
        assert (got.float() - want).abs().mean() < 0.05


@pytest.mark.heavy
def test_compiles_once_for_every_size():
    torch._dynamo.reset()
    model = TiC(channels=(16, 32), depths=(2, 2), arch=SMALL, out_indices=(0, 1)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((96, 128), (67, 200), (224, 97)):
            x = torch.randn(2, 3, *size)
            for got, expected in zip(compiled(x), model(x)):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.heavy
def test_exports_with_dynamic_batch_height_and_width():
    """From 65 pixels a side on: below, torch.export would specialise on the single token of the last pooled map."""
    sides = {0: torch.export.Dim("n", min=1), **{i: torch.export.Dim(f"side{i}", min=65) for i in (2, 3)}}
    model = TiC(SMALL).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=(sides,)).module()
    for shape in ((1, 3, 65, 66), (3, 3, 97, 250), (1, 3, 224, 130)):
        x = torch.randn(shape)
        with torch.no_grad():
            for got, expected in zip(program(x), model(x)):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_config_is_read_from_a_name_or_fields():
    assert TiC("nano", kernel_size=5).config == dataclasses.replace(VARIANTS["nano"], kernel_size=5)
    assert TiC(SMALL).config == TiC(TiCConfig(**SMALL)).config == TiCConfig(**SMALL)


@pytest.mark.parametrize(
    ("error", "words", "arch", "fields"),
    [
        (TypeError, "kernal_size", "tiny", {"kernal_size": 3}),
        (TypeError, "channels", {"depths": (1, 1)}, {}),
        (ValueError, "arch='huge'", "huge", {}),
        (ValueError, "(0, 4)", "tiny", {"out_indices": (0, 4)}),
        (ValueError, "(-1,)", "tiny", {"out_indices": (-1,)}),
        (ValueError, "(2, 1)", "tiny", {"out_indices": (2, 1)}),
        (ValueError, "()", "tiny", {"out_indices": ()}),
        (TypeError, "got 3", "tiny", {"out_indices": 3}),
        (ValueError, "frozen_stages=5", "tiny", {"frozen_stages": 5}),
        (ValueError, "frozen_stages=-1", "tiny", {"frozen_stages": -1}),
        (ValueError, "got 6", "tiny", {"kernel_size": 6}),
        (ValueError, "head_dim=36", "tiny", {"head_dim": 36}),
        (ValueError, "drop_path_rate=1.5", "tiny", {"drop_path_rate": 1.5}),
        (ValueError, "(2, 2)", "tiny", {"depths": (2, 2)}),
        (TypeError, "got (7, 7)", "tiny", {"kernel_size": (7, 7)}),
        (TypeError, "got 1.5", "tiny", {"frozen_stages": 1.5}),
        (ValueError, "in_channels=0", "tiny", {"in_channels": 0}),
        (ValueError, "mlp_ratio=-1", "tiny", {"mlp_ratio": -1}),
        (ValueError, "triton2", "tiny", {"backend": "triton2"}),
    ],
)
def test_bad_arguments_are_named(error, words, arch, fields):
    with pytest.raises(error) as info:
        TiC(arch, **fields)
    assert words in str(info.value).replace("self.", "")


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 3, 31, 64), (1, 3, 64, 8)])
def test_bad_images_are_named(nano, shape):
    with pytest.raises(ValueError) as info:
        nano(torch.zeros(shape))
    assert str(shape) in str(info.value) or str(shape[2:]) in str(info.value)
