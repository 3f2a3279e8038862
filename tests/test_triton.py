"""The Triton kernels. Numbers: in Triton's interpreter, in a process of its own, as it must be chosen before triton is
imported. Registers: as compiled for GPUs that need not be there."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from tic_backbone.ops import triton as backend  # noqa: E402
from tic_backbone.ops.reference import msa_conv2d_reference  # noqa: E402
from tic_backbone.ops.tiled import msa_conv2d_tiled  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")


def problem(width, groups, size, kernel, stride=(1, 1), dilation=(1, 1), key_stride=(1, 1), batch=1):
    coarse = [-(-n // r) for n, r in zip(size, key_stride)]
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch, width * groups, *s, generator=generator) for s in (size, coarse, coarse)]
    return maps, (kernel, stride, dilation, groups, width**-0.5, key_stride)


def results(function, inputs, arguments):
    """The output, and the gradients of a sum of its elements with fixed random weights."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, *arguments)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, *torch.autograd.grad(out, inputs, weight)


def assert_like_reference(maps, arguments, tolerance=1e-5):
    wanted = results(msa_conv2d_reference, [x.double() for x in maps], arguments)
    for got, want, near in zip(results(backend.msa_conv2d_triton, maps, arguments), wanted, [*maps[:1], *maps]):
        assert got.dtype == near.dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


class Altered:
    """A kernel that runs, and then spoils the argument of this name."""

    def __init__(self, kernel, name, spoil):
        self.kernel, self.index, self.spoil = kernel, kernel.arg_names.index(name), spoil

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.kernel[grid](*args, **constants)
            self.spoil(args[self.index])

        return launch


@pytest.fixture
def bfloat16(monkeypatch):
    """Triton's interpreter multiplies the bits of bfloat16 matrices; this makes it multiply the numbers."""
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *args):
        a, b = (self.cast_impl(x, triton.language.float32) if x.dtype.is_bf16() else x for x in (a, b))
        return dot(self, a, b, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def unasked():
    """The answers of `unavailable` forgotten, before and after."""
    backend._unavailable.cache_clear()
    yield
    backend._unavailable.cache_clear()


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize(
        "case",
        [
            dict(width=1, groups=3, size=(5, 6), kernel=(3, 3)),
            dict(width=3, groups=2, size=(7, 6), kernel=(5, 3), stride=(2, 1), batch=2),
            dict(width=3, groups=2, size=(5, 8), kernel=(3, 5), dilation=(2, 1)),
            dict(width=16, groups=1, size=(5, 9), kernel=(7, 7)),
            dict(width=32, groups=2, size=(5, 9), kernel=(7, 7), key_stride=(2, 2)),
            dict(width=24, groups=1, size=(6, 5), kernel=(3, 3), stride=(3, 2), key_stride=(2, 3), dilation=(1, 2)),
            dict(width=64, groups=1, size=(6, 9), kernel=(5, 5)),
            dict(width=16, groups=1, size=(2, 2), kernel=(1, 11)),
        ],
        ids=str,
    )
    def test_like_the_reference_with_all_gradients(self, case):
        assert_like_reference(*problem(**case))

    @settings(deadline=None, max_examples=4, derandomize=True)
    @given(
        width=st.integers(1, 5),
        size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])),
        stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        key_stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    )
    def test_like_the_reference_for_small_maps(self, **case):
        assert_like_reference(*problem(groups=1, **case))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype, bfloat16):
        maps, arguments = problem(16, 2, (7, 6), (5, 5), key_stride=(2, 2))
        assert_like_reference([x.to(dtype) for x in maps], arguments, tolerance=0.03)

    def test_any_memory_format_gives_the_same_bits(self):
        """Channels first; channels last, with k and v the halves of one map; and maps with gaps between channels."""
        (q, k, v), arguments = problem(4, 2, (3, 5), (3, 3))
        last = torch.channels_last
        halves = torch.cat([k, v], 1).contiguous(memory_format=last).chunk(2, 1)
        gaps = [torch.stack([x, x], 2).flatten(1, 2)[:, ::2] for x in (q, k, v)]
        expected = results(backend.msa_conv2d_triton, (q, k, v), arguments)
        for maps in ((q.contiguous(memory_format=last), *halves), gaps):
            for got, want in zip(results(backend.msa_conv2d_triton, maps, arguments), expected):
                assert torch.equal(got, want)

    def test_gradient_that_is_one_number(self):
        """Of a plain sum the gradient is expanded: all its strides are 0."""
        maps, arguments = problem(2, 1, (4, 5), (3, 3))
        got, want = (
            torch.autograd.grad(function(*inputs, *arguments).sum(), inputs)
            for function in (backend.msa_conv2d_triton, msa_conv2d_tiled)
            for inputs in [[x.clone().requires_grad_() for x in maps]]
        )
        torch.testing.assert_close(got, want)

    def test_backward_keeps_inputs_output_and_one_number_a_query(self):
        maps, arguments = problem(4, 2, (6, 6), (5, 5))
        maps = [x.requires_grad_() for x in maps]
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.data_ptr(), x), lambda x: x):
            backend.msa_conv2d_triton(*maps, *arguments)
        assert sum(x.nbytes for x in saved.values()) == 4 * maps[0].nbytes + maps[0].nbytes // 4

    def test_operators_keep_their_promises_to_the_compiler(self):
        maps, (kernel, stride, dilation, groups, scale, key_stride) = problem(2, 1, (3, 2), (3, 3), stride=(2, 1))
        maps = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in maps]
        arguments = (*maps, kernel, stride, dilation, key_stride, groups, scale)
        torch.library.opcheck(backend._forward, arguments, raise_exception=True)

    @pytest.mark.filterwarnings("error:MSA-Conv")
    def test_compiles_whole_for_changing_sizes(self, unasked):
        torch._dynamo.reset()

        def attend(q, k, v, *arguments):
            assert not backend.unavailable(q.device, q.dtype)
            return backend.msa_conv2d_triton(q, k, v, *arguments)

        compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
        for size in ((4, 5), (3, 2)):
            maps, arguments = problem(4, 2, size, (3, 3))
            for got, want in zip(*(results(f, maps, arguments) for f in (compiled, backend.msa_conv2d_triton))):
                assert torch.equal(got, want)

    def test_wide_heads_go_to_the_tiles(self):
        maps, arguments = problem(backend.MAX_WIDTH + 1, 1, (3, 3), (3, 3))
        got, want = (function(*maps, *arguments) for function in (backend.msa_conv2d_triton, msa_conv2d_tiled))
        assert torch.equal(got, want)

    @pytest.mark.parametrize("dtype", backend.DTYPES)
    def test_good_kernels_pass_their_check(self, dtype, bfloat16, unasked, recwarn):
        with torch.inference_mode():
            assert backend.unavailable(CPU, dtype) == ""
        assert not [w for w in recwarn if "MSA-Conv" in str(w.message)]

    @pytest.mark.parametrize(
        ("kernel", "argument", "spoil", "words"),
        [
            ("_forward_kernel", "out", lambda x: x.mul_(1.01), "the output differs"),
            ("_query_gradient_kernel", "dq", lambda x: x[0, 0].zero_(), "dq differs"),
            ("_key_gradient_kernel", "dk", lambda x: x.copy_(x.roll(1, 3)), "dk differs"),
            ("_key_gradient_kernel", "dv", lambda x: x[0, 0, 0, 0].fill_(float("nan")), "dv differs"),
            ("_forward_kernel", "out", lambda x: x.no_such_method(), "AttributeError"),
        ],
    )
    def test_bad_kernels_are_found_and_warned_of_once(self, monkeypatch, unasked, kernel, argument, spoil, words):
        monkeypatch.setattr(backend, kernel, Altered(getattr(backend, kernel), argument, spoil))
        with pytest.warns(UserWarning, match=words) as warned:
            reasons = {backend.unavailable(CPU, torch.float32) for _ in range(3)}
        assert len([w for w in warned if "MSA-Conv" in str(w.message)]) == len(reasons) == 1
        assert words in reasons.pop()


class TestNotInterpreted:
    __test__ = not INTERPRETED

    @pytest.mark.heavy
    def test_interpreted(self):
        code, out, err = run("-m", "pytest", "-x", "-p", "no:cacheprovider", __file__, TRITON_INTERPRET="1")
        assert code == 0, (out + err)[-5000:]

    @settings(deadline=None, max_examples=300)
    @given(
        queries=st.integers(1, 40),
        kernel=st.sampled_from([1, 3, 5, 7, 9]),
        stride=st.integers(1, 4),
        dilation=st.integers(1, 4),
        key_stride=st.integers(1, 4),
        tile=st.sampled_from([1, 2, 4, 8, 32]),
    )
    def test_tiles_cover_every_window_from_both_sides(self, queries, kernel, stride, dilation, key_stride, tile):
        """The kernels' own index arithmetic, as Python: along one axis it visits the pairs of the definition, once."""
        kept, keys = -(-queries // stride), -(-queries // key_stride)
        axis = backend.cut(kernel, stride, dilation, key_stride, tile)
        centre = [o * stride // key_stride for o in range(kept)]
        pairs = sorted(
            (o, c + a * dilation) for o, c in enumerate(centre) for a in range(-(kernel // 2), kernel // 2 + 1)
        )

        met = []
        for number in range(backend._query_tiles((kept,), axis, axis)[0]):
            for i in range(tile):
                query, first, halo = backend._query_axis.fn(number, i, axis)
                assert 0 <= first <= axis.halo - kernel
                met += [(query, halo + j * dilation) for j in range(first, first + kernel) if query < kept]
        assert sorted(met) == pairs

        met = []
        for number in range(backend._key_tiles((keys,), axis, axis)[0]):
            for i in range(tile):
                key, halo = backend._key_axis.fn(number, i, axis)
                for j in range(i * axis.crowd, (i + kernel) * axis.crowd):
                    assert j < axis.reach
                    position = halo + j // axis.crowd * dilation
                    query, exists = backend._centred.fn(position, j % axis.crowd, kept, axis)
                    met += [(query, key)] if exists and key < keys else []
        assert sorted(met) == [(o, key) for o, key in pairs if 0 <= key < keys]

    @pytest.mark.heavy
    @pytest.mark.parametrize(("arch", "width"), [(80, 16), (80, 32), (90, 32)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_registers_suffice(self, arch, width, dtype):
        for name, kernel in compiled_for(arch, width, dtype).items():
            used = resources(kernel)
            assert used.spills == 0, (name, used)
            assert used.registers <= (255 if dtype == torch.float32 else 168), (name, used)
            assert used.shared <= 24 * 1024, (name, used)

    @pytest.mark.heavy
    def test_half_precision_runs_on_tensor_cores_with_wide_loads_and_no_atomics(self):
        for kernel in compiled_for(80, 32, torch.bfloat16).values():
            ptx = kernel.asm["ptx"]
            assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in ptx
            assert re.search(r"cp\.async\.c[ag]\.shared\.global \[.*\], \[.*\], 0x10", ptx)
            assert not re.search(r"\b(atom|red)\.|\.f64", ptx)

    @pytest.mark.heavy
    def test_compiled_once_for_all_image_sizes(self):
        kernels = [compiled_for(80, 16, torch.bfloat16, size) for size in ((20, 20), (16, 32), (1, 7), (33, 1))]
        assert all(len({id(k[name]) for k in kernels}) == 1 for name in KERNELS)

    def test_on_the_cpu_the_reason_is_the_device(self, recwarn):
        assert backend.unavailable(CPU, torch.float32) == "the tensors are on cpu"
        assert not recwarn.list

    @pytest.mark.heavy
    def test_the_package_does_without_triton(self):
        words = (
            "import sys; sys.modules['triton'] = None; import torch, tic_backbone;"
            "q = torch.ones(1, 2, 4, 4); print(tic_backbone.msa_conv2d(q, q, q, 3).shape)"
        )
        code, out, err = run("-c", words)
        assert code == 0 and "[1, 2, 4, 4]" in out, err


KERNELS = ("_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel")


class Compiled:
    """A kernel that is compiled for what it is called with, and kept in `kept`, instead of run."""

    def __init__(self, kernel, kept):
        self.kernel, self.kept = kernel, kept

    def __getitem__(self, grid):
        return lambda *args, **constants: self.kept.update(
            {self.kernel.__name__: self.kernel.warmup(*args, grid=grid, **constants)}
        )


def compiled_for(arch, width, dtype, size=(20, 20)):
    """{name: kernel} that a GPU of this kind would run for a window of 7 over maps as the backbone's."""
    kept = {}
    device = SimpleNamespace(
        get_current_device=lambda: arch,
        get_current_stream=lambda device=0: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    (q, k, v), arguments = problem(width, 3, size, (7, 7), batch=2)
    q, kv = (x.to(dtype, memory_format=torch.channels_last) for x in (q, torch.cat([k, v], 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", device)
        for name in KERNELS:
            patch.setattr(backend, name, Compiled(getattr(backend, name), kept))
        q, k, v = (x.requires_grad_() for x in (q, *kv.chunk(2, 1)))
        out = backend.msa_conv2d_triton(q, k, v, *arguments)
        torch.autograd.grad(out, (q, k, v), out.detach())
    return kept


def resources(compiled):
    """Registers a thread, bytes spilled a thread and bytes of shared memory a program, as ptxas counts them."""
    ptx = re.sub(r"(?m)^\.target .*, debug$", "", compiled.asm["ptx"])
    arch = re.search(r"\.target (\w+)", ptx)[1]
    ptxas = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", "-o", os.devnull, "/dev/stdin"]
    log = subprocess.run(ptxas, input=ptx, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    return SimpleNamespace(registers=int(registers[1]), spills=int(spills[1]), shared=compiled.metadata.shared)


if __name__ == "__main__":  # the table of docs/kernel.md, for the head widths given
    for width in map(int, sys.argv[1:]):
        for dtype in (torch.bfloat16, torch.float32):
            for arch in (80, 90):
                for name, kernel in compiled_for(arch, width, dtype).items():
                    print(width, dtype, f"sm_{arch}", name, resources(kernel))
