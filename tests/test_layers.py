"""MSAConv2d beside the nn.Conv2d it replaces, and the two mechanisms by what they bring within reach."""

import pytest
import torch
from torch import nn

from tic_backbone import MSAConv2d, layers, msa_conv2d
from tic_backbone.layers import (
    MLP,
    DropPath,
    LayerNorm2d,
    Linear2d,
    PositionConv,
    by_chunks,
    inter_pool,
)
from tic_backbone.ops.shift import DIRECTIONS


@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), ((5, 3), (1, 2)), (7, 2)])
def test_output_size_is_the_convolutions(kernel, dilation, stride):
    msa = MSAConv2d(6, 8, kernel, stride, dilation=dilation, groups=4)
    conv = nn.Conv2d(6, 8, kernel, stride, padding=msa.padding, dilation=dilation, groups=2)
    x = torch.randn(2, 6, 13, 10)
    assert msa(x).shape == conv(x).shape


@pytest.mark.parametrize(
    "kwargs", [{}, {"groups": 8}, {"groups": 2}, {"cyclic_shift": 3, "groups": 4}, {"inter_pool": 2}]
)
@pytest.mark.parametrize("bias", [True, False])
def test_every_parameter_learns(kwargs, bias):
    msa = MSAConv2d(4, 8, 3, bias=bias, **kwargs)
    assert (msa.kv.bias is not None) == bias
    msa(torch.randn(1, 4, 9, 9)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in msa.parameters())


def test_padding_other_than_same_is_refused():
    for padding in ("same", 4, (4, 4), [4, 4]):
        MSAConv2d(4, 4, 5, padding=padding, dilation=2)
    for padding in (0, 2, (4, 2), "valid"):
        with pytest.raises(ValueError, match=r"must be 'same' or \(4, 4\)"):
            MSAConv2d(4, 4, 5, padding=padding, dilation=2)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"groups": 3}, "groups=3"),
        ({"kernel_size": 4}, "got 4"),
        ({"padding_mode": "reflect"}, "reflect"),
        ({"cyclic_shift": -1}, "cyclic_shift=-1"),
        ({"cyclic_shift": 0.5}, "cyclic_shift=0.5"),
        ({"inter_pool": 0}, "inter_pool=0"),
        ({"backend": "nope"}, "nope"),
    ],
)
def test_bad_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        MSAConv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, **kwargs})


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"\(1, 5, 8, 8\)"):
        MSAConv2d(4, 4, 3)(torch.zeros(1, 5, 8, 8))


def test_plain_backends_have_all_of_torch_s_derivatives():
    """Forward mode, against finite differences; C has no part in them."""
    msa = MSAConv2d(10, 10, 3, groups=2, cyclic_shift=1, backend="reference").double()
    x, v = torch.randn(2, 1, 10, 4, 5, dtype=torch.float64)
    _, tangent = torch.func.jvp(msa, (x,), (v,))
    torch.testing.assert_close(tangent, (msa(x + 1e-6 * v) - msa(x - 1e-6 * v)) / 2e-6, rtol=1e-5, atol=1e-7)


def reach(msa, size, token):
    """(H, W) booleans: the tokens whose change changes the output at `token`."""
    x = torch.randn(1, msa.in_channels, size, size, dtype=torch.float64, requires_grad=True)
    msa.double()(x)[0, :, token[0], token[1]].sum().backward()
    return x.grad[0].abs().sum(0) > 0


def test_plain_window_reaches_its_kernel_and_no_further():
    seen = reach(MSAConv2d(4, 4, (3, 5), dilation=(2, 1)), 11, (5, 5))
    assert sorted(seen.nonzero().tolist()) == [[i, j] for i in (3, 5, 7) for j in (3, 4, 5, 6, 7)]


def test_shift_brings_the_diagonal_windows_within_reach():
    length, at = 3, (7, 8)
    seen = reach(MSAConv2d(10, 10, 3, groups=2, cyclic_shift=length), 16, at)
    windows = {
        (at[0] + length * down + a, at[1] + length * right + b)
        for down, right in DIRECTIONS
        for a in (-1, 0, 1)
        for b in (-1, 0, 1)
    }
    assert {tuple(t) for t in seen.nonzero().tolist()} == windows


def test_shift_wraps_around_the_border():
    seen = reach(MSAConv2d(10, 10, 1, groups=2, cyclic_shift=2), 8, (0, 7))
    assert {tuple(t) for t in seen.nonzero().tolist()} == {(0, 7), (6, 5), (2, 1), (6, 1), (2, 5)}


def test_every_head_looks_in_every_direction():
    """Where each key brings in what lies `length` away, along the diagonals of each of the window's tokens."""
    msa = MSAConv2d(10, 10, 3, groups=2, cyclic_shift=3)
    x = torch.randn(1, 10, 16, 16, requires_grad=True)
    heads = []
    msa.proj = nn.Identity()
    for head in msa(x)[0, :, 7, 8].chunk(2):
        heads.append(torch.autograd.grad(head.sum(), x, retain_graph=True)[0][0].abs().sum(0) > 0)
    assert torch.equal(*heads) and heads[0].sum() == 5 * 9


def test_pool_averages_real_tokens_only():
    pooled = inter_pool(torch.arange(15.0).reshape(1, 1, 3, 5), 2)
    assert pooled[0, 0].tolist() == [[3, 5, 6.5], [10.5, 12.5, 14]]


def test_pooled_window_reaches_ratio_times_as_far():
    seen = reach(MSAConv2d(4, 4, 3, inter_pool=2), 12, (5, 6))
    assert sorted(seen.nonzero().tolist()) == [[i, j] for i in range(2, 8) for j in range(4, 10)]


def test_pooling_before_the_projection_is_pooling_after_it():
    """Keys and values are averages of the tokens' own keys and values."""
    msa, x = MSAConv2d(4, 8, 3, inter_pool=2), torch.randn(2, 4, 7, 9)
    k, v = inter_pool(msa.kv(x), 2).chunk(2, 1)
    expected = msa.proj(msa_conv2d(msa.q(x), k, v, 3, key_stride=2, backend="reference"))
    torch.testing.assert_close(msa(x), expected)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 8, 9, 12).permute(0, 3, 1, 2),
        torch.randn(2, 12, 8, 9),
        torch.randn(2, 24, 8, 9)[:, 12:],
        torch.randn(100, 12, 1, 1),
        torch.randn(1, 12, 1, 100),
    ],
    ids=["channels-last", "channels-first", "slice", "one token", "one row"],
)
def test_linear_layer_is_the_same_by_both_libraries(x, onednn, monkeypatch):
    """Values, channels-last memory, first and second derivatives, whatever the map's memory is like."""
    monkeypatch.setattr(layers, "_AVX2", onednn)
    layer = Linear2d(12, 20)
    assert layer._convolves(x) == onednn
    x = x.clone().requires_grad_()
    out, wanted = layer(x), torch.einsum("nchw,dc->ndhw", x, layer.weight) + layer.bias[:, None, None]
    torch.testing.assert_close(out, wanted)
    assert out.is_contiguous(memory_format=torch.channels_last)
    inputs = (x, *layer.parameters())
    grads = [torch.autograd.grad(y.square().mean(), inputs, create_graph=True) for y in (out, wanted)]
    torch.testing.assert_close(*grads)
    second = [torch.autograd.grad(dx.square().mean(), inputs[:2]) for dx, *_ in grads]
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("shape", [(0, 12, 5, 6), (1, 1, 16, 16)], ids=["empty", "one channel"])
def test_linear_layer_of_odd_maps(shape):
    layer, x = Linear2d(shape[1], 20), torch.randn(shape, requires_grad=True)
    out = layer(x)
    assert out.shape == (shape[0], 20, *shape[2:]) and out.is_contiguous(memory_format=torch.channels_last)
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_linear_layer_under_vmap():
    layer, x = Linear2d(12, 20), torch.randn(3, 2, 12, 8, 9)
    torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(part) for part in x]))


def test_channels_last_stays_channels_last():
    x = torch.randn(2, 8, 12, 12).contiguous(memory_format=torch.channels_last)
    shifted = MSAConv2d(8, 8, 3, groups=4, cyclic_shift=2)
    for layer in (MSAConv2d(8, 8, 3, groups=4), shifted, MLP(8, 16), LayerNorm2d(8)):
        assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(4, 4), (7, 6), (5, 9)])
@pytest.mark.parametrize("ratio", [2, 3])
def test_pooling_is_the_same_in_a_graph_for_all_sizes(size, ratio):
    x = torch.randn(2, 4, *size)
    compiled = torch.compile(lambda x: inter_pool(x, ratio), backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), inter_pool(x, ratio))


def test_position_convolution_adds_to_its_input():
    conv, x = PositionConv(6), torch.randn(2, 6, 5, 7)
    expected = x + torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1, groups=6)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_chunks_change_nothing(memory_format):
    """More than one chunk, the last one not full; with gradients the whole goes through at once."""
    mlp = MLP(8, 16)
    x = torch.randn(2, 8, 50, 61).contiguous(memory_format=memory_format)
    sizes = []
    with torch.no_grad():
        out = by_chunks(lambda t: sizes.append(t.numel() // 8) or t + mlp(t), x)
    assert len(sizes) > 2 and sum(sizes) == 2 * 50 * 61
    torch.testing.assert_close(out, x + mlp(x))
    assert by_chunks(lambda t: sizes.append(0) or t + mlp(t), x).requires_grad and sizes.count(0) == 1


def test_drop_path_keeps_the_mean_and_whole_samples():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3, 3)
    dropped = DropPath(0.3)(x).flatten(1)
    assert all(len(set(sample.tolist())) == 1 for sample in dropped[:50])
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(DropPath(0.3).eval()(x), x)
