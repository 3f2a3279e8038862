"""MSA-Conv as a pure function, the choice of its implementation, and the cyclic shift.

Each backend is one file with one function of the same signature; `BACKENDS` lists them.
"""

import torch

from tic_backbone.ops import native
from tic_backbone.ops.native import msa_conv2d_native
from tic_backbone.ops.reference import msa_conv2d_reference
from tic_backbone.ops.shift import cyclic_shift
from tic_backbone.ops.tiled import msa_conv2d_tiled

__all__ = ["BACKENDS", "choose_backend", "cyclic_shift", "msa_conv2d"]


def msa_conv2d_triton(*args):
    """See `tic_backbone.ops.triton`, which is imported when first needed."""
    from tic_backbone.ops.triton import msa_conv2d_triton

    return msa_conv2d_triton(*args)


BACKENDS = {
    "reference": msa_conv2d_reference,
    "tiled": msa_conv2d_tiled,
    "native": msa_conv2d_native,
    "triton": msa_conv2d_triton,
}
FASTEST = {"cpu": "native", "cuda": "triton"}  # by type of device


def check_backend(backend: str) -> None:
    """A ValueError unless it is "auto" or one of `BACKENDS`."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown {backend=}; choose 'auto' or one of {sorted(BACKENDS)}")


def choose_backend(
    backend: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """The name of the backend that will run for tensors of this device and dtype, and the reason in words.

    A ValueError where the one that is asked for by name cannot run.
    """
    check_backend(backend)
    device = torch.device(device)
    if backend in ("reference", "tiled"):
        return backend, "asked for by name"
    if backend != "auto":
        if reason := _refuses(backend, device, dtype):
            raise ValueError(f"{backend=} cannot run: {reason}; choose 'auto' or 'tiled'")
        return backend, "asked for by name"
    if device.type not in FASTEST:
        return "tiled", "plain PyTorch on every device"
    fastest = FASTEST[device.type]
    if reason := _refuses(fastest, device, dtype):
        return "tiled", f"plain PyTorch on every device; not {fastest}, since {reason}"
    return fastest, f"the fastest on {device.type}"


def _refuses(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    if torch.compiler.is_exporting():
        return "an exported graph shall hold nothing but PyTorch's operators"
    if backend == "triton":
        return _triton_refuses(device, dtype)
    if device.type != "cpu":
        return f"the tensors are on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, not {dtype}"
    return native.unavailable()


@torch.compiler.assume_constant_result
def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str:
    try:
        from tic_backbone.ops import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return triton.unavailable(device, dtype)


def pair(value, name: str) -> tuple[int, int]:
    """A positive int or (h, w) of positive ints, as a pair; anything else is an error that names `name`."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2 or not all(type(v) is int for v in values):
        raise TypeError(f"{name} must be an int or a pair (h, w) of ints, got {value!r}")
    if min(values) < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return values


def odd_pair(value, name: str) -> tuple[int, int]:
    """As `pair`, for window sizes: only odd ones have a centre."""
    values = pair(value, name)
    if any(v % 2 == 0 for v in values):
        raise ValueError(f"{name} must be odd, for the query to be at the window's centre, got {value!r}")
    return values


def msa_conv2d(
    q,
    k,
    v,
    kernel_size,
    *,
    stride=1,
    dilation=1,
    groups=1,
    scale=None,
    key_stride=None,
    backend="auto",
):
    """Multi-head self-attention inside a convolution's window (MSA-Conv, arXiv 2310.04134).

    The query at row i, column j attends to the ``kernel_size`` keys of the window centred on it, and to nothing
    else: ``softmax(scale * q . k) @ v`` over the window's positions, separately in each of ``groups`` equal
    groups of channels. Beyond the border keys and values are zero, as in a padded convolution: such a key scores 0
    and takes its share of the softmax.

    Args:
        q: queries, ``(N, C, H, W)``, any memory format.
        k, v: keys and values, ``(N, C, Hk, Wk)``: the queries' grid, or one coarser by ``key_stride``.
        kernel_size: the window, odd; int or (h, w), like the next two.
        stride: only every stride-th query is computed, as a convolution computes every stride-th output.
        dilation: spacing of the window's keys, counted on their own grid.
        groups: 1 is the standard form, C the depthwise form, heads in between.
        scale: factor on the scores, a number; ``(C / groups) ** -0.5`` by default. A learnable one belongs into q.
        key_stride: ratio r of the two grids, with ``Hk == ceil(H / r)``; the window of query (i, j) is centred on key
            ``(i // r, j // r)``. By default the smallest ratio that fits the two sizes. Sizes alone do not always
            decide it (4 queries over 2 keys: 2 or 3), so pass it where it is known.
        backend: a name from `BACKENDS`, or "auto".

    Returns:
        ``(N, C, ceil(H / stride), ceil(W / stride))``, of the dtype of ``q``.

    Raises:
        TypeError, ValueError: for tensors or arguments that do not fit together.
    """
    kernel_size = odd_pair(kernel_size, "kernel_size")
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    _check_tensors(q, k, v, groups)
    key_stride = _key_stride(q.shape[2:], k.shape[2:], key_stride)
    if isinstance(scale, torch.Tensor):
        raise TypeError(f"scale must be a number, got {scale!r}; multiply q by a learnable one")
    scale = (q.shape[1] // groups) ** -0.5 if scale is None else scale
    if not q.shape[0]:  # as from a head without proposals; each input still gets a gradient
        return q[:, :, :: stride[0], :: stride[1]] + 0 * (k.sum() + v.sum())
    name, _ = choose_backend(backend, q.device, q.dtype)
    return BACKENDS[name](q, k, v, kernel_size, stride, dilation, groups, scale, key_stride)


def _check_tensors(q, k, v, groups) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape (N, C, H, W), got {tuple(x.shape)}")
        if not x.is_floating_point() or x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"q, k and v must share one floating dtype and one device, got {q.dtype}, {k.dtype}, {v.dtype} "
                f"on {q.device}, {k.device}, {v.device}"
            )
    if k.shape != v.shape or q.shape[:2] != k.shape[:2]:
        raise ValueError(
            "k and v must have one shape, and q their batch and channels, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if min(q.shape[1:]) < 1 or min(k.shape[1:]) < 1:
        raise ValueError(f"q, k and v must have channels and tokens, got q {tuple(q.shape)}, k {tuple(k.shape)}")
    if type(groups) is not int or groups < 1 or q.shape[1] % groups:
        raise ValueError(f"groups must divide the {q.shape[1]} channels, got {groups=}")


def _key_stride(queries, keys, key_stride) -> tuple[int, int]:
    if key_stride is not None:
        ratio, wanted = pair(key_stride, "key_stride"), f"{key_stride=}"
    elif queries == keys:
        return 1, 1
    else:
        ratio, wanted = tuple(-(-n // nk) for n, nk in zip(queries, keys)), "an integer r"
    if any(nk != (n - 1) // r + 1 for n, nk, r in zip(queries, keys, ratio)):
        raise ValueError(
            f"keys of {tuple(keys)} do not lie on a grid over queries of {tuple(queries)}: "
            f"each side must be ceil(side / r) for {wanted}"
        )
    return ratio
