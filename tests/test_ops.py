"""msa_conv2d against loops that follow the definition word by word, and its backends against each other."""

import itertools

import pytest
import torch
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

from tic_backbone import choose_backend, msa_conv2d
from tic_backbone.ops import BACKENDS, native
from tic_backbone.ops.tiled import TILE

needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=f"native: {native.unavailable()}")
IN_FLOAT64 = ("reference", "tiled")
RUNNING = [*IN_FLOAT64, pytest.param("native", marks=needs_native)]


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


@pytest.mark.parametrize("backend", RUNNING)
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
        ((3, 7), (5, 3), (1, 2), (2, 1), 4, (1, 2)),
    ],
)
def test_backends_follow_the_definition(backend, size, kernel, stride, dilation, groups, key_stride):
    inputs = qkv((2, 4, *size), key_stride, torch.float64 if backend in IN_FLOAT64 else torch.float32)
    options = dict(stride=stride, dilation=dilation, groups=groups, key_stride=key_stride)
    expected = attend_by_loops(*inputs, kernel, **options)
    torch.testing.assert_close(msa_conv2d(*inputs, kernel, **options, backend=backend), expected)


small = st.tuples(st.integers(1, 3), st.integers(1, 3))


@pytest.mark.parametrize("backend", RUNNING[1:])
@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 2 * TILE + 3), st.integers(1, 40)),
    kernel=st.tuples(st.sampled_from([1, 3, 5, 7, 9, 11]), st.sampled_from([1, 3, 5, 7, 9, 17])),
    stride=small,
    dilation=small,
    heads=st.sampled_from([(1, 6), (2, 3), (3, 8), (2, 11), (1, 33), (6, 1), (2, 16)]),
    key_stride=small,
    seed=st.integers(0, 99),
)
def test_backends_equal_reference_with_all_gradients(backend, size, kernel, stride, dilation, heads, key_stride, seed):
    (groups, width), results = heads, []
    options = dict(stride=stride, dilation=dilation, groups=groups, key_stride=key_stride)
    shape = (2, groups * width, *size)
    weight = torch.randn(*shape[:2], -(-size[0] // stride[0]), -(-size[1] // stride[1]), dtype=torch.float64)
    for name, dtype in (
        ("reference", torch.float64),
        (backend, torch.float64 if backend == "tiled" else torch.float32),
    ):
        inputs = [x.detach().to(dtype).requires_grad_() for x in qkv(shape, key_stride, seed=seed)]
        out = msa_conv2d(*inputs, kernel, **options, backend=name)
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for expected, got in zip(*results):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-10 if backend == "tiled" else 2e-4)


@pytest.mark.parametrize("backend", IN_FLOAT64)
def test_gradients_are_derivatives(backend):
    inputs = qkv((1, 4, 5, 6), (2, 1))
    assert torch.autograd.gradcheck(
        lambda q, k, v: msa_conv2d(q, k, v, 3, groups=2, key_stride=(2, 1), backend=backend),
        inputs,
    )


def test_second_derivatives_of_the_reference():
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: msa_conv2d(q, k, v, 3, groups=2, backend="reference"),
        qkv((1, 2, 3, 4)),
    )


@needs_native
@pytest.mark.parametrize(("kernel", "dilation"), [(7, 1), ((15, 1), (5, 1))], ids=["window of 7", "far apart"])
def test_native_is_repeatable_in_any_number_of_threads(kernel, dilation):
    """Gradients of keys are sums over queries of several blocks of rows, added in one order."""
    inputs, threads = qkv((1, 8, 230, 20), dtype=torch.float32), torch.get_num_threads()
    results = []
    try:
        for n in (1, 4, 3):
            torch.set_num_threads(n)
            out = msa_conv2d(*inputs, kernel, dilation=dilation, groups=1, backend="native")
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@needs_native
@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0x7FC00001, 0x7FFFFFFF], ids=["inf", "nan", "nan 1", "nan 2"])
def test_native_lets_infinities_and_nans_through(bits):
    """A bad query spoils its own output, a bad key that of all windows it lies in; whatever bits a NaN carries."""
    q, k, v = (x.detach() for x in qkv((1, 2, 6, 6), dtype=torch.float32))
    bad = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    spoilt = q.clone()
    spoilt[0, 0, 2, 2] = bad
    out = msa_conv2d(spoilt, k, v, 3, backend="native")
    assert out.isnan().any(1).nonzero().tolist() == [[0, 2, 2]]
    if bad.isnan():
        k[0, 0, 2, 2] = bad
        out = msa_conv2d(q, k, v, 3, backend="native")
        assert out.isnan().any(1).nonzero().tolist() == [[0, i, j] for i in (1, 2, 3) for j in (1, 2, 3)]


@needs_native
@pytest.mark.parametrize("far", [1e3, 1e-30])
def test_native_keeps_its_precision_at_large_and_small_scores(far):
    q, k, v = (x.detach().float() for x in qkv((1, 8, 9, 9)))
    expected = msa_conv2d(far * q.double(), k.double(), v.double(), 5, backend="reference")
    out = msa_conv2d(far * q, k, v, 5, backend="native").double()
    torch.testing.assert_close(out, expected, rtol=0, atol=max(far, 1) * 1e-6)


@needs_native
@pytest.mark.parametrize("far", [1, 10, 100])
def test_native_keeps_its_precision_in_gradients(far):
    """As the definition's in float32, also where values have a mean, which cancels in the gradients of scores."""
    q, k, v = qkv((1, 32, 14, 14))
    inputs = [(far * q).detach().requires_grad_(), k, (v + 10).detach().requires_grad_()]
    grad = 1 + torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)

    def gradients(backend, dtype):
        given = [x.to(dtype) for x in inputs]
        return torch.autograd.grad(msa_conv2d(*given, 7, backend=backend), given, grad.to(dtype))

    exact = gradients("reference", torch.float64)
    errors = [
        [(a - b).abs().max() / b.abs().max() for a, b in zip(gradients(name, torch.float32), exact)]
        for name in ("native", "reference")
    ]
    assert all(ours < 2 * reference + 1e-6 for ours, reference in zip(*errors)), errors


@needs_native
def test_native_takes_dilations_beyond_any_map():
    inputs = qkv((1, 4, 9, 7), dtype=torch.float32)
    for far, farther in (((9, 7), (2**40, 2**62)), ((9, 1), (2**62, 1))):
        out, wanted = (msa_conv2d(*inputs, 3, dilation=d, backend="native") for d in (farther, far))
        assert torch.equal(out, wanted)
        torch.testing.assert_close(out, msa_conv2d(*inputs, 3, dilation=far, backend="reference"))


@needs_native
def test_native_passes_torch_s_checks_of_operators():
    q, k, v = qkv((2, 6, 9, 8), (1, 2), torch.float32)
    geometry = [3, 5, 2, 1, 1, 1, 1, 2]
    torch.library.opcheck(torch.ops.tic_backbone.msa_conv2d_native.default, (q, k, v, geometry, 2, 0.5))


def test_tiles_stand_in_where_there_is_no_compiler(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda: "no C compiler")
    name, reason = choose_backend()
    assert name == "tiled" and "no C compiler" in reason
    with pytest.raises(ValueError, match="no C compiler"):
        choose_backend("native")


@pytest.mark.heavy
@pytest.mark.parametrize(("cc", "words"), [("no-such-compiler", "no C compiler"), ("false", "false says")])
def test_compiler_that_fails_is_named(tmp_path, cc, words):
    """In a process without a cache and with that compiler alone."""
    code = "from tic_backbone import choose_backend; print(choose_backend())"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "false").symlink_to("/bin/false")
    env = dict(CC=cc, PATH=str(tmp_path / "bin"), XDG_CACHE_HOME=str(tmp_path))
    status, out, err = run("-c", code, **env)
    assert status == 0 and out.startswith("('tiled'") and words in out, out + err
    assert not err


@needs_native
@pytest.mark.heavy
@pytest.mark.parametrize("home", ["", "/dev/null", "/proc"])
def test_native_needs_no_home(tmp_path, home):
    """As in containers: no folder for a cache, or none to write to; nothing of it stays."""
    code = "from tic_backbone import choose_backend; print(choose_backend())"
    status, out, err = run("-c", code, XDG_CACHE_HOME=home, HOME="/proc", TMPDIR=str(tmp_path))
    assert status == 0 and out.startswith("('native'"), out + err
    assert not err and not any(tmp_path.iterdir())


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


@pytest.mark.parametrize("backend", RUNNING)
def test_memory_format_changes_nothing(backend):
    q, k, v = qkv((2, 8, 11, 13), dtype=torch.float32)
    expected = msa_conv2d(q, k, v, 5, groups=2, backend=backend)
    channels_last = [x.contiguous(memory_format=torch.channels_last) for x in (q, k, v)]
    strided = [torch.stack([x, x], -1).transpose(2, 3)[..., 0].transpose(2, 3) for x in (q, k, v)]
    for other in (channels_last, strided):
        torch.testing.assert_close(msa_conv2d(*other, 5, groups=2, backend=backend), expected)


@pytest.mark.parametrize("backend", RUNNING[1:])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_gradients_arrive_in_any_memory_format(backend, stride, order):
    """As from transformers, which keep (tokens, N, C)."""
    inputs = qkv((2, 4, 6, 10), dtype=torch.float32)
    results = []
    for name in ("reference", backend):
        out = msa_conv2d(*inputs, 3, stride=stride, groups=2, backend=name)
        shape = [out.shape[i] for i in order]
        grad = (
            torch.arange(out.numel(), dtype=torch.float32).sin().reshape(shape).permute([*map(order.index, range(4))])
        )
        results.append(torch.autograd.grad(out, inputs, grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("backend", RUNNING)
def test_an_empty_batch_has_an_empty_result_and_gradients(backend):
    inputs = qkv((0, 4, 7, 5), (2, 1), torch.float32)
    out = msa_conv2d(*inputs, 3, stride=2, key_stride=(2, 1), backend=backend)
    assert out.shape == (0, 4, 4, 3)
    assert [g.shape for g in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]


@pytest.mark.parametrize("backend", RUNNING)
def test_the_result_has_q_s_dtype_under_autocast_too(backend):
    with torch.autocast("cpu", torch.bfloat16):
        assert msa_conv2d(*qkv((1, 4, 5, 5), dtype=torch.float32), 3, backend=backend).dtype == torch.float32


@pytest.mark.parametrize("backend", RUNNING)
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


@pytest.mark.parametrize(
    ("backend", "least", "most"),
    [("reference", 49, 200), ("tiled", 4, 12), pytest.param("native", 3, 3.1, marks=needs_native)],
)
def test_backward_keeps_nothing_of_window_size(backend, least, most):
    """In maps saved by autograd: native q, k and v; tiles a few copies of them; the reference 49 of k and v."""
    q, k, v = qkv((1, 32, 56, 56), dtype=torch.float32)
    saved = {}

    def note(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = msa_conv2d(q, k, v, 7, groups=2, backend=backend)
    copies = sum(saved.values()) / (out.nbytes)
    assert least <= copies <= most, copies


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
        (ValueError, "(2, 0, 8, 8)", (Q[:, :0], Q[:, :0], Q[:, :0], 3), {}),
        (ValueError, "(2, 6, 0, 8)", (Q[:, :, :0], Q[:, :, :0], Q[:, :, :0], 3), {}),
        (TypeError, "tensor(0.5", (Q, Q, Q, 3), {"scale": torch.tensor(0.5)}),
        (ValueError, "'cuda'", (Q, Q, Q, 3), {"backend": "cuda"}),
    ],
)
def test_bad_input_is_named(error, words, args, kwargs):
    with pytest.raises(error) as info:
        msa_conv2d(*args, **kwargs)
    assert words in str(info.value)


@pytest.mark.parametrize("name", ["auto", *RUNNING])
def test_choice_of_backend_has_a_reason(name):
    chosen, reason = choose_backend(name)
    assert chosen in BACKENDS and reason


def test_native_is_for_cpus_and_single_precision():
    assert choose_backend("auto", "cpu", torch.float64)[0] == "tiled"
    assert choose_backend("auto", "meta")[0] == "tiled"
    for device, dtype in (("cpu", torch.float64), ("meta", torch.float32)):
        with pytest.raises(ValueError, match="native"):
            choose_backend("native", device, dtype)
    with pytest.raises(ValueError, match="'triton' cannot run"):
        choose_backend("triton")


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
