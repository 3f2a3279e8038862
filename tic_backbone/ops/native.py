"""MSA-Conv and the cyclic shift on the CPU in C: native.c, compiled once by the machine's own compiler at first use.

Nothing is built at install time. Where there is no compiler, or it fails, `unavailable` says why and the tiles run.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")


class Problem(ctypes.Structure):
    """The struct of the same name in native.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "groups", "width", "height", "length")),
        *((name, ctypes.c_int64) for name in ("key_height", "key_length")),
        *((name, ctypes.c_int64 * 2) for name in ("kernel", "stride", "dilation", "key_stride")),
        *((name, ctypes.c_int64 * 3) for name in "qkv"),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


@torch.compiler.assume_constant_result
def unavailable() -> str:
    """Why this backend cannot run here, in words; empty if it can. The first call may compile, for a second."""
    return _failure()


@cache
def _failure() -> str:
    try:
        _functions()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@cache
def _functions():
    library = _library()
    library.msa_conv2d.argtypes = [ctypes.POINTER(Problem), *[ctypes.c_void_p] * 8]
    pointers, integers = [ctypes.c_void_p], [ctypes.c_int64]
    library.cyclic_shift.argtypes = [*pointers * 2, *integers * 6, *pointers * 3, *integers * 2]
    library.cyclic_shift.restype = None
    return library


def _library() -> ctypes.CDLL:
    """The compiled native.c out of the user's cache; where that cannot be used, compiled for this process alone."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise FileNotFoundError("no C compiler: neither $CC nor cc, gcc or clang is there")
    try:
        cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return ctypes.CDLL(str(_compiled(compiler, cache_home / "tic_backbone")))
    except (OSError, RuntimeError):  # no home, or one that nothing can be written to, or run from
        with tempfile.TemporaryDirectory(prefix="tic_backbone-") as folder:
            return ctypes.CDLL(str(_compiled(compiler, Path(folder))))


def _compiled(compiler: str, folder: Path) -> Path:
    """The library in `folder`, made first where this kind of processor has none there."""
    key = hashlib.sha256(repr((SOURCE.read_text(), FLAGS, compiler, _processor())).encode()).hexdigest()[:16]
    target = folder / f"msa_conv2d-{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            compiled, linked = f"{folder}/native.o", f"{folder}/native.so"
            _run(compiler, *FLAGS, "-c", str(SOURCE), "-o", compiled)
            # Linked without an OpenMP runtime: torch's is loaded, and a second one's threads would fight with its.
            _run(compiler, "-shared", compiled, "-o", linked, "-lm")
            os.replace(linked, target)
    return target


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise subprocess.SubprocessError(f"{command[0]} says {said[0]!r}")


def _processor() -> str:
    """What `-march=native` depends on, for caches that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join(os.uname())
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), os.uname().machine)


def msa_conv2d_native(q, k, v, kernel_size, stride, dilation, groups, scale, key_stride):
    """See `tic_backbone.msa_conv2d`. On the CPU; half precision is computed in float32. Can be differentiated once."""
    dtype = q.dtype
    geometry = [*kernel_size, *stride, *dilation, *key_stride]
    return _forward(*(x.float() for x in (q, k, v)), geometry, groups, float(scale)).to(dtype)


@torch.library.custom_op("tic_backbone::msa_conv2d_native", mutates_args=(), device_types="cpu")
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: list[int], groups: int, scale: float
) -> torch.Tensor:
    """The output, (N, C, H', W'). `geometry`: kernel_size, stride, dilation, key_stride, two of each."""
    q, k, v = _tokens(q), _tokens(k), _tokens(v)
    out = _result(q, geometry)
    _call(q, k, v, geometry, groups, scale, out=out)
    return out.permute(0, 3, 1, 2)


@_forward.register_fake
def _(q, k, v, geometry, groups, scale):
    return _result(q.permute(0, 2, 3, 1), geometry).permute(0, 3, 1, 2)


@torch.library.custom_op("tic_backbone::msa_conv2d_native_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: list[int],
    groups: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v."""
    grad = _tokens(grad).contiguous()
    q, k, v = _tokens(q), _tokens(k), _tokens(v)
    dq, dk, dv = _gradients(q, k)
    kept = dq[:, :: geometry[2], :: geometry[3]]
    grad_of_kept = kept if kept.is_contiguous() else torch.empty_like(grad)
    _call(q, k, v, geometry, groups, scale, grad=grad, dq=grad_of_kept, dk=dk, dv=dv)
    if grad_of_kept is not kept:
        kept.copy_(grad_of_kept)
    return dq.permute(0, 3, 1, 2), dk.permute(0, 3, 1, 2), dv.permute(0, 3, 1, 2)


@_backward.register_fake
def _(grad, q, k, v, geometry, groups, scale):
    return tuple(x.permute(0, 3, 1, 2) for x in _gradients(q.permute(0, 2, 3, 1), k.permute(0, 2, 3, 1)))


def _setup_context(ctx, inputs, output):
    q, k, v, *ctx.arguments = inputs
    ctx.save_for_backward(q, k, v)


def _gradient(ctx, grad):
    return *_backward(grad, *ctx.saved_tensors, *ctx.arguments), None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def _tokens(x):
    """(N, C, H, W) as (N, H, W, C) whose channels lie side by side: a view of channels-last maps."""
    x = x.permute(0, 2, 3, 1)
    return x if x.stride(3) == 1 else x.contiguous()


def _result(q, geometry):
    n, h, w, c = q.shape
    return q.new_empty(n, (h + geometry[2] - 1) // geometry[2], (w + geometry[3] - 1) // geometry[3], c)


def _gradients(q, k):
    return q.new_zeros(q.shape), k.new_zeros(k.shape), k.new_zeros(k.shape)


def _call(q, k, v, geometry, groups, scale, out=None, grad=None, dq=None, dk=None, dv=None):
    batch, height, length, channels = (grad if out is None else out).shape
    kernel, stride, dilation, key_stride = (geometry[i : i + 2] for i in (0, 2, 4, 6))
    dilation = [min(d, n) for d, n in zip(dilation, k.shape[1:3])]  # all of them beyond the border, like any wider one
    problem = Problem(
        *(batch, groups, channels // groups, height, length, *k.shape[1:3]),
        *((ctypes.c_int64 * 2)(*pair) for pair in (kernel, stride, dilation, key_stride)),
        *((ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v)),
        torch.get_num_threads(),
        scale,
    )
    pointers = [None if x is None else x.data_ptr() for x in (q, k, v, out, grad, dq, dk, dv)]
    if _functions().msa_conv2d(problem, *pointers):
        raise MemoryError(f"no memory for windows of {tuple(kernel)} in {torch.get_num_threads()} threads")


def cyclic_shift_native(x, groups, steps):
    """See `tic_backbone.cyclic_shift`. On the CPU, of any dtype."""
    return _shift(x, groups, [s for step in steps for s in step])


@torch.library.custom_op("tic_backbone::cyclic_shift_native", mutates_args=(), device_types="cpu")
def _shift(x: torch.Tensor, groups: int, steps: list[int]) -> torch.Tensor:
    x = _tokens(x)
    out = x.new_empty(x.shape)
    batch, height, length, channels = x.shape
    runs, width, bytes_ = len(steps) // 2, channels // groups, x.element_size()
    starts = [0, *accumulate(len(run) for run in torch.arange(width).tensor_split(runs))]
    arrays = [(ctypes.c_int64 * len(a))(*a) for a in (starts, steps, [s * bytes_ for s in x.stride()[:3]])]
    sizes = (batch, height, length, groups, width, runs)
    threads = torch.get_num_threads()
    _functions().cyclic_shift(x.data_ptr(), out.data_ptr(), *sizes, *arrays, bytes_, threads)
    return out.permute(0, 3, 1, 2)


@_shift.register_fake
def _(x, groups, steps):
    return x.new_empty(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


def _save_steps(ctx, inputs, output):
    _, ctx.groups, ctx.steps = inputs


def _shift_back(ctx, grad):
    return _shift(grad, ctx.groups, [-s for s in ctx.steps]), None, None


_shift.register_autograd(_shift_back, setup_context=_save_steps)
