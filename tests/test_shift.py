"""cyclic_shift against loops that follow its definition, on every path."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tic_backbone import cyclic_shift
from tic_backbone.ops import native, shift

needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=f"native: {native.unavailable()}")


@pytest.fixture(params=["plain", pytest.param("native", marks=needs_native)])
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "unavailable", lambda: "not in this test")


def shift_by_loops(x, groups, length):
    """The definition, one number at a time."""
    c, h, w = x.shape[1:]
    out, width = torch.empty_like(x), c // groups
    runs = [r for r in range(5) for _ in range(width // 5 + (r < width % 5))]
    for channel in range(c):
        down, right = shift.DIRECTIONS[runs[channel % width]]
        for i in range(h):
            for j in range(w):
                out[:, channel, i, j] = x[:, channel, (i + down * length) % h, (j + right * length) % w]
    return out


@pytest.mark.parametrize(
    ("shape", "groups", "length"),
    [((2, 20, 5, 7), 2, 1), ((1, 16, 4, 3), 1, 3), ((1, 12, 2, 9), 4, 5), ((1, 6, 3, 3), 6, 1), ((1, 7, 1, 1), 1, 2)],
)
def test_it_follows_the_definition(path, shape, groups, length):
    x = torch.randn(shape)
    out = cyclic_shift(x, groups, length)
    assert torch.equal(out, shift_by_loops(x, groups, length))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(cyclic_shift(x, groups, 0), x)


@needs_native
@settings(deadline=None, max_examples=50)
@given(
    groups=st.integers(1, 4),
    width=st.integers(1, 17),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    length=st.integers(0, 20),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["channels first", "channels last", "half of a map", "strided"]),
)
def test_native_and_plain_are_equal_with_gradients(groups, width, size, length, dtype, layout):
    x = torch.randn(2, groups * width, *size).to(dtype)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "half of a map":
        x = torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[1]
    elif layout == "strided":
        x = torch.stack([x, x], 2)[:, :, 0]
    grad, results = torch.randn(size[0], 2, size[1], groups * width).to(dtype).permute(1, 3, 0, 2), []
    for unavailable in (native.unavailable, lambda: "not in this test"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "unavailable", unavailable)
            leaf = x.detach().requires_grad_()
            out = cyclic_shift(leaf, groups, length)
        results.append((out, *torch.autograd.grad(out, leaf, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_gradients_are_derivatives(path):
    x = torch.randn(1, 10, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cyclic_shift(x, 2, 1), x)
    assert torch.autograd.gradgradcheck(lambda x: cyclic_shift(x, 2, 1), x)


@pytest.mark.parametrize("shape", [(0, 10, 3, 4), (2, 10, 0, 4)])
def test_nothing_is_shifted_to_nothing(path, shape):
    assert cyclic_shift(torch.zeros(shape), 2, 1).shape == shape


@pytest.mark.parametrize(("shape", "groups"), [((2, 10, 3, 4), 3), ((10, 3, 4), 2), ((2, 10, 3, 4), 0)])
def test_bad_input_is_named(path, shape, groups):
    with pytest.raises(ValueError, match=f"groups={groups}, got {re.escape(str(shape))}"):
        cyclic_shift(torch.zeros(shape), groups, 1)


def test_a_length_that_is_no_int_is_named(path):
    with pytest.raises(TypeError, match=r"got 0\.5"):
        cyclic_shift(torch.zeros(1, 10, 3, 4), 2, 0.5)


def test_one_channel_a_head_stays(path):
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(cyclic_shift(x, 4, 2), x)


@needs_native
def test_native_passes_torch_s_checks_of_operators():
    x = torch.randn(2, 12, 4, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.tic_backbone.cyclic_shift_native.default, (x, 2, [0, 0, 1, 1, -1, 1]))


@pytest.mark.heavy
def test_compiles_and_exports_for_every_size(path):
    torch._dynamo.reset()
    sides = {2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}

    class Shift(torch.nn.Module):
        def forward(self, x):
            return cyclic_shift(x, 2, 3)

    functions = [
        torch.compile(Shift(), fullgraph=True, dynamic=True, backend="aot_eager"),
        torch.export.export(Shift(), (torch.randn(2, 10, 8, 9),), dynamic_shapes=(sides,)).module(),
    ]
    for size in ((9, 12), (4, 31)):
        x = torch.randn(2, 10, *size)
        assert all(torch.equal(function(x), cyclic_shift(x, 2, 3)) for function in functions)
