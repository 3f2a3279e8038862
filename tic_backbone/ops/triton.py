"""MSA-Conv for NVIDIA GPUs: three Triton kernels, on tensor cores, with nothing of the window's size in memory.

A program holds a tile of tokens of one head in registers and walks over its halo, block by block: a tile of queries
over the keys that their windows cover (output, gradient of q), a tile of keys over the queries whose windows hold them
(gradients of k and v). Every result has one program that writes it: no atomics, the same bits in every run. Of the
forward pass only q, k, v, the output and one number a query and head are kept. See docs/kernel.md.

This module imports triton and registers two operators, so it is imported when first needed, not with the package.
"""

import os
import warnings
from functools import cache
from math import e, gcd, log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tic_backbone.ops.tiled import msa_conv2d_tiled

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 128  # channels of a head: a tile's rows of them stay in registers
TOKENS = 32  # a program's tile; see docs/kernel.md for why not more
LOG2_E = tl.constexpr(log2(e))  # GPUs have exp2
# Not compiled for; each on its own, as Triton would compile anew for tuples with a 1 or a multiple of 16 in them.
SIZES = ["height", "length", "key_height", "key_length", "tiles_y", "tiles_x", "groups"]


class Axis(NamedTuple):
    """How the kernels see one axis; the first four are the arguments of `msa_conv2d`.

    Queries `phases` apart are tiled together: with dilation, those whose keys lie on one lattice. Query t of a phase
    has its window's centre at `t * step // cell`, in keys of that lattice.
    """

    kernel: int
    stride: int
    dilation: int
    key_stride: int
    phases: int
    step: int
    cell: int
    tile: int
    halo: int  # keys of the lattice that a tile of queries meets
    crowd: int  # the most queries that share a centre
    reach: int  # queries that a tile of keys may meet: each centre around it, `crowd` times


def cut(kernel: int, stride: int, dilation: int, key_stride: int, tile: int) -> Axis:
    phases, step, cell = 1, stride, key_stride
    if dilation > 1:
        phases = dilation * key_stride // gcd(stride, dilation * key_stride)
        step, cell = phases * stride // (dilation * key_stride), 1
    crowd = -(-key_stride // stride)
    unaligned = 0 if tile * step % cell == 0 else cell - 1  # a tile may then start within a cell
    halo = ((tile - 1) * step + unaligned) // cell + kernel
    reach = (tile + kernel - 1) * crowd
    return Axis(kernel, stride, dilation, key_stride, phases, step, cell, tile, halo, crowd, reach)


@cache
def plan(kernel_size, stride, dilation, key_stride, width, dtype):
    """Constants and launch options of the kernels: for tiles of queries, and for tiles of keys.

    Of the tiles of `TOKENS` tokens each takes the one that meets the smallest halo, and of equal ones the widest.
    """
    tiles = [(TOKENS >> i, 1 << i) for i in reversed(range(TOKENS.bit_length()))]
    axes = [[cut(*a) for a in zip(kernel_size, stride, dilation, key_stride, tile)] for tile in tiles]
    # 16 is the least that tensor cores take; of float32 a block of more does not fit into the registers.
    block = 16 if dtype == torch.float32 else 32
    constants = dict(WIDTH=width, BLOCK_D=max(16, triton.next_power_of_2(width)), BLOCK=block)
    options = dict(num_warps=2 if width <= 32 else 4, num_stages=2)
    over_keys = min(axes, key=lambda pair: pair[0].halo * pair[1].halo)
    over_queries = min(axes, key=lambda pair: pair[0].reach * pair[1].reach)
    return [dict(ROWS=rows, COLS=cols, **constants, **options) for rows, cols in (over_keys, over_queries)]


@triton.jit
def _program(tiles, groups):
    """Image, head and tile (down, across). Heads run fastest: those of a token are neighbours in memory."""
    pid = tl.program_id(0)
    tile = pid // groups
    row = tile // tiles[1]
    return row // tiles[0], pid % groups, row % tiles[0], tile % tiles[1]


@triton.jit
def _query_axis(tile, i, AXIS: tl.constexpr):
    """On one axis: a tile's queries `i`, where in the halo their windows start, and where the halo starts."""
    phase = tile % AXIS.phases
    start = tile // AXIS.phases * AXIS.tile
    first = start * AXIS.step // AXIS.cell
    halo = phase * AXIS.stride // AXIS.key_stride + (first - AXIS.kernel // 2) * AXIS.dilation
    return phase + (start + i) * AXIS.phases, (start + i) * AXIS.step // AXIS.cell - first, halo


@triton.jit
def _key_axis(tile, i, AXIS: tl.constexpr):
    """On one axis: a tile's keys `i`, and the first centre of a window that holds one of them."""
    start = tile % AXIS.dilation + tile // AXIS.dilation * (AXIS.tile * AXIS.dilation)
    return start + i * AXIS.dilation, start - AXIS.kernel // 2 * AXIS.dilation


@triton.jit
def _centred(centre, j, size, AXIS: tl.constexpr):
    """Query `j` of those that share a centre, on one axis, and whether it exists."""
    query = (centre * AXIS.key_stride + AXIS.stride - 1) // AXIS.stride + j
    exists = (centre >= 0) & (query * AXIS.stride < (centre + 1) * AXIS.key_stride) & (query < size)
    return query, exists


@triton.jit
def _within(first, i, LENGTH: tl.constexpr):
    """(first, i) booleans: whether `first <= i < first + LENGTH`. In one comparison, as unsigned -1 is large."""
    return (i[None, :] - first[:, None]).to(tl.uint32) < LENGTH


@triton.jit
def _inside(y, x, size):
    return (y.to(tl.uint32) < size[0].to(tl.uint32)) & (x.to(tl.uint32) < size[1].to(tl.uint32))  # -1 is large


@triton.jit
def _tokens(base, strides, image, head, y, x, inside, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, BLOCK_D) pointers to the head's channels of tokens (y, x) in an (N, C, H, W) map, and their mask."""
    channel = tl.arange(0, BLOCK_D)
    base += image.to(tl.int64) * strides[0] + head.to(tl.int64) * WIDTH * strides[1]
    token = y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
    return base + token[:, None] + channel[None, :] * strides[1], inside[:, None] & (channel < WIDTH)[None, :]


@triton.jit
def _load(base, strides, image, head, y, x, inside, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers, mask = _tokens(base, strides, image, head, y, x, inside, WIDTH, BLOCK_D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store(value, base, strides, image, head, y, x, inside, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers, mask = _tokens(base, strides, image, head, y, x, inside, WIDTH, BLOCK_D)
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b):
    """float32 accumulation; float32 operands are split in three, so that tensor cores keep their precision."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    q, k, v, out, lse,
    q_strides, k_strides, v_strides, out_strides,
    height, length, key_height, key_length, tiles_y, tiles_x, groups, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (N, C, H', W') and lse (N, groups, H', W'), the scores' log-sum-exp to base 2."""
    size, key_size = (height, length), (key_height, key_length)
    image, head, tile_y, tile_x = _program((tiles_y, tiles_x), groups)
    i = tl.arange(0, ROWS.tile * COLS.tile)
    y, first_y, halo_y = _query_axis(tile_y, i // COLS.tile, ROWS)
    x, first_x, halo_x = _query_axis(tile_x, i % COLS.tile, COLS)
    exists = (y < size[0]) & (x < size[1])
    query = _load(q, q_strides, image, head, y * ROWS.stride, x * COLS.stride, exists, WIDTH, BLOCK_D)

    top = tl.full([ROWS.tile * COLS.tile], -1e30, tl.float32)  # finite: a block may hold no key of a query's window
    mass = tl.zeros([ROWS.tile * COLS.tile], tl.float32)
    mean = tl.zeros([ROWS.tile * COLS.tile, BLOCK_D], tl.float32)
    for block in range(0, ROWS.halo * COLS.halo, BLOCK):
        j = block + tl.arange(0, BLOCK)
        near = _within(first_y, j // COLS.halo, ROWS.kernel) & _within(first_x, j % COLS.halo, COLS.kernel)
        key_y, key_x = halo_y + j // COLS.halo * ROWS.dilation, halo_x + j % COLS.halo * COLS.dilation
        inside = _inside(key_y, key_x, key_size)
        key = _load(k, k_strides, image, head, key_y, key_x, inside, WIDTH, BLOCK_D)
        value = _load(v, v_strides, image, head, key_y, key_x, inside, WIDTH, BLOCK_D)
        # Beyond the map key and value are zeros that take their share; beyond the window there is nothing to share.
        score = tl.where(near, _dot(query, tl.trans(key)) * (scale * LOG2_E), float("-inf"))
        above = tl.maximum(top, tl.max(score, 1))
        share = tl.exp2(score - above[:, None])
        fade = tl.exp2(top - above)
        mass = mass * fade + tl.sum(share, 1)
        mean = mean * fade[:, None] + _dot(share.to(value.dtype), value)
        top = above

    _store(mean / mass[:, None], out, out_strides, image, head, y, x, exists, WIDTH, BLOCK_D)
    number = ((image.to(tl.int64) * groups + head) * size[0] + y) * size[1] + x
    tl.store(lse + number, top + tl.log2(mass), mask=exists)


@triton.jit(do_not_specialize=SIZES)
def _query_gradient_kernel(
    q, k, v, out, dout, lse, dq, delta,
    q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides,
    height, length, key_height, key_length, tiles_y, tiles_x, groups, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dq at the computed queries, and delta = (out * dout).sum over a head's channels, laid out like lse."""
    size, key_size = (height, length), (key_height, key_length)
    image, head, tile_y, tile_x = _program((tiles_y, tiles_x), groups)
    i = tl.arange(0, ROWS.tile * COLS.tile)
    y, first_y, halo_y = _query_axis(tile_y, i // COLS.tile, ROWS)
    x, first_x, halo_x = _query_axis(tile_x, i % COLS.tile, COLS)
    exists = (y < size[0]) & (x < size[1])
    result = _load(out, out_strides, image, head, y, x, exists, WIDTH, BLOCK_D)
    slope = _load(dout, dout_strides, image, head, y, x, exists, WIDTH, BLOCK_D)
    number = ((image.to(tl.int64) * groups + head) * size[0] + y) * size[1] + x
    total = tl.load(lse + number, mask=exists, other=0.0)
    drift = tl.sum(result.to(tl.float32) * slope.to(tl.float32), 1)
    tl.store(delta + number, drift, mask=exists)
    query = _load(q, q_strides, image, head, y * ROWS.stride, x * COLS.stride, exists, WIDTH, BLOCK_D)

    gradient = tl.zeros([ROWS.tile * COLS.tile, BLOCK_D], tl.float32)
    for block in range(0, ROWS.halo * COLS.halo, BLOCK):
        j = block + tl.arange(0, BLOCK)
        near = _within(first_y, j // COLS.halo, ROWS.kernel) & _within(first_x, j % COLS.halo, COLS.kernel)
        key_y, key_x = halo_y + j // COLS.halo * ROWS.dilation, halo_x + j % COLS.halo * COLS.dilation
        inside = _inside(key_y, key_x, key_size)
        key = _load(k, k_strides, image, head, key_y, key_x, inside, WIDTH, BLOCK_D)
        value = _load(v, v_strides, image, head, key_y, key_x, inside, WIDTH, BLOCK_D)
        dshare = _dot(slope, tl.trans(value)) - drift[:, None]
        score = _dot(query, tl.trans(key)) * (scale * LOG2_E)
        dscore = tl.where(near, tl.exp2(score - total[:, None]) * dshare, 0.0)
        gradient += _dot(dscore.to(key.dtype), key)

    _store(gradient * scale, dq, dq_strides, image, head, y * ROWS.stride, x * COLS.stride, exists, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _key_gradient_kernel(
    q, k, v, dout, lse, delta, dk, dv,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
    height, length, key_height, key_length, tiles_y, tiles_x, groups, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dk and dv. Around a tile of keys stand the centres of the windows that hold them, each with its queries."""
    size, key_size = (height, length), (key_height, key_length)
    image, head, tile_y, tile_x = _program((tiles_y, tiles_x), groups)
    i = tl.arange(0, ROWS.tile * COLS.tile)
    y, centre_y = _key_axis(tile_y, i // COLS.tile, ROWS)
    x, centre_x = _key_axis(tile_x, i % COLS.tile, COLS)
    inside = _inside(y, x, key_size)
    key = _load(k, k_strides, image, head, y, x, inside, WIDTH, BLOCK_D)
    value = _load(v, v_strides, image, head, y, x, inside, WIDTH, BLOCK_D)

    dkey = tl.zeros([ROWS.tile * COLS.tile, BLOCK_D], tl.float32)
    dvalue = tl.zeros([ROWS.tile * COLS.tile, BLOCK_D], tl.float32)
    for block in range(0, ROWS.reach * COLS.reach, BLOCK):
        j = block + tl.arange(0, BLOCK)
        jy, jx = j // COLS.reach, j % COLS.reach
        # Key i of the tile lies in the windows of the `kernel` centres from centre i of the halo on.
        near_y = _within(i // COLS.tile, jy // ROWS.crowd, ROWS.kernel)
        near = near_y & _within(i % COLS.tile, jx // COLS.crowd, COLS.kernel)
        query_y, exists_y = _centred(centre_y + jy // ROWS.crowd * ROWS.dilation, jy % ROWS.crowd, size[0], ROWS)
        query_x, exists_x = _centred(centre_x + jx // COLS.crowd * COLS.dilation, jx % COLS.crowd, size[1], COLS)
        exists = exists_y & exists_x
        query = _load(q, q_strides, image, head, query_y * ROWS.stride, query_x * COLS.stride, exists, WIDTH, BLOCK_D)
        slope = _load(dout, dout_strides, image, head, query_y, query_x, exists, WIDTH, BLOCK_D)
        number = ((image.to(tl.int64) * groups + head) * size[0] + query_y) * size[1] + query_x
        total = tl.load(lse + number, mask=exists, other=0.0)  # where there is no query, slope and drift are zero
        drift = tl.load(delta + number, mask=exists, other=0.0)
        score = _dot(key, tl.trans(query)) * (scale * LOG2_E)
        share = tl.where(near, tl.exp2(score - total[None, :]), 0.0)
        dvalue += _dot(share.to(slope.dtype), slope)
        dscore = share * (_dot(value, tl.trans(slope)) - drift[None, :])
        dkey += _dot(dscore.to(query.dtype), query)

    _store(dkey * scale, dk, dk_strides, image, head, y, x, inside, WIDTH, BLOCK_D)
    _store(dvalue, dv, dv_strides, image, head, y, x, inside, WIDTH, BLOCK_D)


def _query_tiles(size, rows, cols):
    return tuple(a.phases * triton.cdiv(triton.cdiv(n, a.phases), a.tile) for n, a in zip(size, (rows, cols)))


def _key_tiles(size, rows, cols):
    return tuple(a.dilation * triton.cdiv(triton.cdiv(n, a.dilation), a.tile) for n, a in zip(size, (rows, cols)))


def _kept(q, stride):
    """(N, C, H', W'), channels last like the backbone's maps."""
    n, c, h, w = q.shape
    shape = (n, c, (h + stride[0] - 1) // stride[0], (w + stride[1] - 1) // stride[1])
    return torch.empty(shape, dtype=q.dtype, device=q.device, memory_format=torch.channels_last)


@torch.library.custom_op("tic_backbone::msa_conv2d_triton", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    key_stride: list[int],
    groups: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    window = map(tuple, (kernel_size, stride, dilation, key_stride))
    over_keys, _ = plan(*window, q.shape[1] // groups, q.dtype)
    out = _kept(q, stride)
    size, key_size = tuple(out.shape[2:]), tuple(k.shape[2:])
    lse = q.new_empty(q.shape[0], groups, *size, dtype=torch.float32)
    tiles = _query_tiles(size, over_keys["ROWS"], over_keys["COLS"])
    with torch.cuda.device_of(q):
        _forward_kernel[(q.shape[0] * tiles[0] * tiles[1] * groups,)](
            q, k, v, out, lse,
            q.stride(), k.stride(), v.stride(), out.stride(),
            *size, *key_size, *tiles, groups, scale, **over_keys,
        )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q, k, v, kernel_size, stride, dilation, key_stride, groups, scale):
    out = _kept(q, stride)
    return out, q.new_empty(q.shape[0], groups, *out.shape[2:], dtype=torch.float32)


@torch.library.custom_op("tic_backbone::msa_conv2d_triton_backward", mutates_args=())
def _backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    key_stride: list[int],
    groups: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    window = map(tuple, (kernel_size, stride, dilation, key_stride))
    over_keys, over_queries = plan(*window, q.shape[1] // groups, q.dtype)
    size, key_size = tuple(out.shape[2:]), tuple(k.shape[2:])
    dq = torch.empty_like(q) if max(stride) == 1 else torch.zeros_like(q)
    dk, dv, delta = torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    with torch.cuda.device_of(q):
        tiles = _query_tiles(size, over_keys["ROWS"], over_keys["COLS"])
        _query_gradient_kernel[(q.shape[0] * tiles[0] * tiles[1] * groups,)](
            q, k, v, out, dout, lse, dq, delta,
            q.stride(), k.stride(), v.stride(), out.stride(), dout.stride(), dq.stride(),
            *size, *key_size, *tiles, groups, scale, **over_keys,
        )  # fmt: skip
        tiles = _key_tiles(key_size, over_queries["ROWS"], over_queries["COLS"])
        _key_gradient_kernel[(q.shape[0] * tiles[0] * tiles[1] * groups,)](
            q, k, v, dout, lse, delta, dk, dv,
            q.stride(), k.stride(), v.stride(), dout.stride(), dk.stride(), dv.stride(),
            *size, *key_size, *tiles, groups, scale, **over_queries,
        )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    q, k, v, *ctx.arguments = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dout, _):
    q, k, v, out, lse = ctx.saved_tensors
    return *_backward(q, k, v, out, dout, lse, *ctx.arguments), *[None] * 6


_forward.register_autograd(_gradients, setup_context=_save)


def msa_conv2d_triton(q, k, v, kernel_size, stride, dilation, groups, scale, key_stride):
    """See `tic_backbone.msa_conv2d`. Computes in float32, on tensor cores; can be differentiated once.

    Heads wider than `MAX_WIDTH` channels go to the tiles.
    """
    if q.shape[1] // groups > MAX_WIDTH:
        return msa_conv2d_tiled(q, k, v, kernel_size, stride, dilation, groups, scale, key_stride)
    return _forward(q, k, v, kernel_size, stride, dilation, key_stride, groups, float(scale))[0]


@torch.compiler.assume_constant_result
def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot be used for tensors of this device and dtype, in words; empty if they can.

    The first call for a device and dtype compiles them, for seconds, and compares them with the tiles, forward and
    backward. Where they differ or fail, it warns: the only time, since the answer is kept.
    """
    return _unavailable(device, dtype)


@cache  # apart, since torch.compile looks through a cache for what to trace
def _unavailable(device, dtype):
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}"
    if dtype not in DTYPES:
        return f"it computes in float32, not {dtype}"
    try:
        reason = _self_check(device, dtype)
    except Exception as error:  # whatever a driver, a compiler or another version of either may raise
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if reason:
        warnings.warn(f"MSA-Conv runs without its Triton kernels for {dtype} on {device}: {reason}", stacklevel=3)
    return reason


def _self_check(device, dtype) -> str:
    """Which result of the kernels differs from the tiles', in float64 on the CPU, on a small input; empty if none."""
    generator = torch.Generator("cpu").manual_seed(0)
    arguments = ((3, 5), (1, 1), (1, 2), 2, 0.2, (2, 1))
    shapes = [(1, 64, 4, 7), (1, 64, 2, 7), (1, 64, 2, 7), (1, 64, 4, 7)]
    *inputs, dout = [torch.randn(s, generator=generator, device="cpu").to(dtype).double() for s in shapes]
    results = []
    with torch.inference_mode(False), torch.enable_grad():
        for function, there in ((msa_conv2d_triton, dict(device=device, dtype=dtype)), (msa_conv2d_tiled, {})):
            qkv = [x.clone().to(**there).requires_grad_() for x in inputs]
            out = function(*qkv, *arguments)
            results.append((out, *torch.autograd.grad(out, qkv, dout.to(**there))))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for name, got, want in zip(("the output", "dq", "dk", "dv"), *results):
        error = ((got.detach().cpu().double() - want).norm() / want.norm()).item()
        if not error <= tolerance:  # also for NaN
            return f"{name} differs from the tiles' by {error:.1e} of its norm"
    return ""
