"""msa_conv2d against loops that follow the definition word by word, and its backends against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tic_backbone import choose_backend, msa_conv2d
from tic_backbone.ops import BACKENDS
from tic_backbone.ops.tiled import TILE


def qkv(shape, key_stride=(1, 1), dtype=torch.float64, seed=0):
    """Random q, k, v that want gradients; k and v on the grid `key_stride` coarser."""
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    coarse = (n, c, -(-h // key_stride[0]), -(-w // key_stride[1]))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in (shape, coarse, coarse)]


def attend_by_loops(q, k, v, kernel, stride, dilation, groups, key_stride):
    """The definition, one query at a time."""
    n, c, h, w = q.shape
    out = torch.zeros(n, c, -(-h // stride[0]), -(-w // stride[1]), dtype=q.dtype)
    zero = torch.zeros(c // groups, dtype=q.dtype)
    for b in range(n):
        for g in range(groups):
            part = slice(g * c // groups, (g + 1) * c // groups)
            for oi in range(out.shape[2]):
                for oj in range(out.shape[3]):
                    i, j = oi * stride[0], oj * stride[1]
                    scores, values = [], []
                    for a in range(-(kernel[0] // 2), kernel[0] // 2 + 1):
                        for e in range(-(kernel[1] // 2), kernel[1] // 2 + 1):
                            y, x = i // key_stride[0] + a * dilation[0], j // key_stride[1] + e * dilation[1]
                            inside = 0 <= y < k.shape[2] and 0 <= x < k.shape[3]
                            key = k[b, part, y, x] if inside else zero
                            values.append(v[b, part, y, x] if inside else zero)
                            scores.append((q[b, part, i, j] * key).sum() * (c // groups) ** -0.5)
                    out[b, part, oi, oj] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "groups", "key_stride"),
    [
        ((5, 4), (3, 3), (1, 1), (1, 1), 1, (1, 1)),
        ((5, 4), (3, 5), (1, 1), (1, 1), 4, (1, 1)),
        ((6, 7), (3, 3), (2, 3), (1, 1), 2, (1, 1)),
        ((7, 6), (3, 3), (1, 1), (2, 3), 2, (1, 1)),
        ((5, 7), (3, 3), (1, 1), (1, 1), 2, (2, 2)),
        ((7, 5), (1, 3), (2, 2), (1, 2), 2, (3, 2)),
        ((2, 2), (5, 7), (1, 1), (1, 1), 2, (1, 1)),
    ],
)
def test_backends_follow_the_definition(backend, size, kernel, stride, dilation, groups, key_stride):
    q, k, v = qkv((2, 4, *size), key_stride)
    out = msa_conv2d(
        q, k, v, kernel, stride=stride, dilation=dilation, groups=groups, key_stride=key_stride, backend=backend
    )
    torch.testing.assert_close(out, attend_by_loops(q, k, v, kernel, stride, dilation, groups, key_stride))


small = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 2 * TILE + 3), st.integers(1, 2 * TILE + 3)),
    kernel=st.tuples(st.sampled_from([1, 3, 5, 7, 9, 11]), st.sampled_from([1, 3, 5, 7])),
    stride=small,
    dilation=small,
    groups=st.sampled_from([1, 2, 3, 6]),
    key_stride=small,
    seed=st.integers(0, 99),
)
def test_tiled_equals_reference_with_all_gradients(size, kernel, stride, dilation, groups, key_stride, seed):
    results = []
    weight = torch.randn(2, 6, -(-size[0] // stride[0]), -(-size[1] // stride[1]), dtype=torch.float64)
    for backend in ("reference", "tiled"):
        inputs = qkv((2, 6, *size), key_stride, seed=seed)
        out = msa_conv2d(
            *inputs, kernel, stride=stride, dilation=dilation, groups=groups, key_stride=key_stride, backend=backend
        )
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_derivatives(backend):
    inputs = qkv((1, 4, 5, 6), (2, 1))
    assert torch.autograd.gradcheck(
        lambda q, k, v: msa_conv2d(q, k, v, 3, groups=2, key_stride=(2, 1), backend=backend), inputs
    )


def test_padded_keys_take_softmax_mass():
    """With equal scores everywhere the corner of a 3 x 3 window keeps the 4 / 9 of its real values."""
    q, v = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    out = msa_conv2d(q, q, v, 3)
    assert out[0, 0, 0, 0].item() == pytest.approx(4 / 9)
    assert out[0, 0, 1, 1].item() == pytest.approx(1)


def test_groups_attend_on_their_own():
    """Heads are the standard form on their channels; a single channel a group is the depthwise form."""
    q, k, v = qkv((2, 6, 9, 9))
    for groups in (2, 6):
        parts = [msa_conv2d(*t, 3) for t in zip(*(x.chunk(groups, 1) for x in (q, k, v)))]
        torch.testing.assert_close(msa_conv2d(q, k, v, 3, groups=groups), torch.cat(parts, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_format_changes_nothing(backend):
    q, k, v = qkv((2, 8, 11, 13), dtype=torch.float32)
    expected = msa_conv2d(q, k, v, 5, groups=2, backend=backend)
    channels_last = [x.contiguous(memory_format=torch.channels_last) for x in (q, k, v)]
    strided = [torch.stack([x, x], -1).transpose(2, 3)[..., 0].transpose(2, 3) for x in (q, k, v)]
    for other in (channels_last, strided):
        torch.testing.assert_close(msa_conv2d(*other, 5, groups=2, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(backend, dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv((2, 16, 12, 9), dtype=torch.float32)]
    out = msa_conv2d(*inputs, 7, groups=2, backend=backend)
    assert out.dtype == dtype
    full = [x.detach().float().requires_grad_() for x in inputs]
    expected = msa_conv2d(*full, 7, groups=2, backend="reference")
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    for got, want in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), full)):
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


def test_coarse_grid_ratio_is_inferred_where_sizes_decide_it():
    q, k, v = qkv((1, 2, 9, 8), (2, 2))
    torch.testing.assert_close(msa_conv2d(q, k, v, 3), msa_conv2d(q, k, v, 3, key_stride=2))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_backward_keeps_nothing_of_window_size(backend):
    """Tiles keep a few copies of q, k, v; the reference, 49 of k and v. The count is of bytes saved by autograd."""
    q, k, v = qkv((1, 32, 56, 56), dtype=torch.float32)
    saved = {}

    def note(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = msa_conv2d(q, k, v, 7, groups=2, backend=backend)
    copies = sum(saved.values()) / (out.nbytes)
    assert copies > 49 if backend == "reference" else copies < 12, copies


@pytest.mark.heavy
def test_compiles_whole_for_changing_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: msa_conv2d(q, k, v, 5, groups=2), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for size in ((20, 24), (33, 17), (9, 40)):
        q, k, v = qkv((1, 8, *size), dtype=torch.float32)
        torch.testing.assert_close(compiled(q, k, v), msa_conv2d(q, k, v, 5, groups=2))


Q = torch.zeros(2, 6, 8, 8)


@pytest.mark.parametrize(
    ("error", "words", "args", "kwargs"),
    [
        (ValueError, "(6, 8, 8)", (Q[0], Q, Q, 3), {}),
        (ValueError, "(2, 6, 4, 8)", (Q, Q[:, :, :4], Q, 3), {}),
        (ValueError, "(2, 3, 8, 8)", (Q, Q[:, :3], Q[:, :3], 3), {}),
        (TypeError, "torch.float64", (Q, Q, Q.double(), 3), {}),
        (TypeError, "torch.int64", (Q.long(), Q.long(), Q.long(), 3), {}),
        (TypeError, "list", ([1], Q, Q, 3), {}),
        (ValueError, "groups=4", (Q, Q, Q, 3), {"groups": 4}),
        (ValueError, "groups=0", (Q, Q, Q, 3), {"groups": 0}),
        (ValueError, "got 4", (Q, Q, Q, 4), {}),
        (ValueError, "got 0", (Q, Q, Q, 0), {}),
        (ValueError, "got (3, -1)", (Q, Q, Q, (3, -1)), {}),
        (TypeError, "got 3.0", (Q, Q, Q, 3.0), {}),
        (TypeError, "got (3, 3, 3)", (Q, Q, Q, (3, 3, 3)), {}),
        (ValueError, "stride", (Q, Q, Q, 3), {"stride": 0}),
        (ValueError, "dilation", (Q, Q, Q, 3), {"dilation": -1}),
        (ValueError, "(5, 8)", (Q, Q[:, :, :5], Q[:, :, :5], 3), {}),
        (ValueError, "key_stride=3", (Q, Q[:, :, :4], Q[:, :, :4], 3), {"key_stride": 3}),
        (ValueError, "empty", (Q[:0], Q[:0], Q[:0], 3), {}),
        (ValueError, "'cuda'", (Q, Q, Q, 3), {"backend": "cuda"}),
    ],
)
def test_bad_input_is_named(error, words, args, kwargs):
    with pytest.raises(error) as info:
        msa_conv2d(*args, **kwargs)
    assert words in str(info.value)


def test_choice_of_backend_has_a_reason():
    for name in ("auto", *BACKENDS):
        chosen, reason = choose_backend(name)
        assert chosen in BACKENDS and reason


@pytest.mark.heavy
@pytest.mark.parametrize(("stride", "key_stride"), [(1, 1), (2, 1), (1, 2)])
def test_exports_for_every_size(stride, key_stride):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return msa_conv2d(q, k, v, 5, stride=stride, key_stride=key_stride, groups=2)

    h, w = torch.export.Dim("h", min=3), torch.export.Dim("w", min=3)
    coarse = {0: torch.export.Dim("n", min=1), 2: h, 3: w}
    fine = coarse if key_stride == 1 else {**coarse, 2: key_stride * h, 3: key_stride * w}
    example = [x.detach() for x in qkv((2, 8, 20, 26), (key_stride, key_stride), dtype=torch.float32)]
    program = torch.export.export(Attention(), tuple(example), dynamic_shapes=(fine, coarse, coarse)).module()
    for shape in ((1, 8, 6, 8), (3, 8, 34, 18)):
        x = [t.detach() for t in qkv(shape, (key_stride, key_stride), dtype=torch.float32)]
        torch.testing.assert_close(program(*x), Attention()(*x))
