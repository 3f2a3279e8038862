"""MSA-Conv in plain PyTorch: queries in tiles, each tile's keys gathered once.

The keys that a tile of T x T queries meets are its halo of (T + k - 1)^2 tokens. All tiles go through one
`scaled_dot_product_attention` with one constant mask that leaves each query its own window. Nothing of size k^2 per
token is stored, forward or backward.
"""

from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F

TILE = 8


class Axis(NamedTuple):
    """How one axis is cut. Lengths are in queries for `tile`, in keys for the rest."""

    tile: int  # queries in a tile
    count: int  # tiles
    step: int  # from one tile's first key to the next one's
    halo: int  # keys a tile meets
    before: int  # zeros in front of the first key
    after: int  # zeros behind the last one; negative: keys that no query meets


def cut(queries: int, keys: int, kernel: int, stride: int, dilation: int, key_stride: int) -> Axis:
    """Cut `queries` kept queries, `stride` apart, whose windows lie on `keys` keys, `key_stride` apart."""
    period = key_stride // gcd(stride, key_stride)  # a tile must hold whole cells, for all tiles to be alike
    tile = -(-TILE // period) * period
    count = (queries + tile - 1) // tile
    step = stride * tile // key_stride
    halo = stride * (tile - 1) // key_stride + 1 + dilation * (kernel - 1)
    before = dilation * (kernel - 1) // 2
    return Axis(tile, count, step, halo, before, (count - 1) * step + halo - before - keys)


def window(axis: Axis, kernel: int, stride: int, dilation: int, key_stride: int, device) -> torch.Tensor:
    """(tile, halo) booleans: which keys of the halo are in a query's window, along one axis."""
    first = stride * torch.arange(axis.tile, device=device) // key_stride
    offset = torch.arange(axis.halo, device=device) - first[:, None]
    return (offset >= 0) & (offset <= dilation * (kernel - 1)) & (offset % dilation == 0)


def msa_conv2d_tiled(q, k, v, kernel_size, stride, dilation, groups, scale, key_stride):
    """See `tic_backbone.msa_conv2d`."""
    if dilation != (1, 1) and stride == key_stride == (1, 1):
        return _by_phase(q, k, v, kernel_size, dilation, groups, scale)
    q = q[:, :, :: stride[0], :: stride[1]]
    geometry = list(zip(kernel_size, stride, dilation, key_stride))
    axes = [cut(nq, nk, *g) for nq, nk, g in zip(q.shape[2:], k.shape[2:], geometry)]
    rows, cols = (window(axis, *g, q.device) for axis, g in zip(axes, geometry))
    allowed = (rows[:, None, :, None] & cols[None, :, None, :]).flatten(2).flatten(0, 1)  # (tile^2, halo^2)
    mask = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill(~allowed, float("-inf"))
    out = F.scaled_dot_product_attention(
        _query_tiles(q, axes, groups), _halos(k, axes, groups), _halos(v, axes, groups), mask, scale=scale
    )
    return _untile(out, axes, q.shape)


def _query_tiles(q, axes, groups):
    """(N, C, H, W) to (N * tiles, groups, tile^2, C / groups)."""
    n, c, h, w = q.shape
    y, x = axes
    q = F.pad(q, (0, x.count * x.tile - w, 0, y.count * y.tile - h))
    q = q.reshape(n, groups, c // groups, y.count, y.tile, x.count, x.tile).permute(0, 3, 5, 1, 4, 6, 2)
    return q.reshape(n * y.count * x.count, groups, y.tile * x.tile, c // groups)


def _halos(k, axes, groups):
    """(N, C, Hk, Wk) to (N * tiles, groups, halo^2, C / groups)."""
    n, c = k.shape[:2]
    y, x = axes
    k = F.pad(k, (x.before, x.after, y.before, y.after))
    k = k.unfold(2, y.halo, y.step).unfold(3, x.halo, x.step)  # (N, C, tiles, tiles, halo, halo), a view
    k = k.reshape(n, groups, c // groups, y.count, x.count, y.halo, x.halo).permute(0, 3, 4, 1, 5, 6, 2)
    return k.reshape(n * y.count * x.count, groups, y.halo * x.halo, c // groups)


def _untile(out, axes, shape):
    """The inverse of `_query_tiles`; the result is in channels-last memory."""
    n, c, h, w = shape
    y, x = axes
    out = out.reshape(n, y.count, x.count, -1, y.tile, x.tile, out.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(n, y.count * y.tile, x.count * x.tile, c)
    return out[:, :h, :w].permute(0, 3, 1, 2)


def _by_phase(q, k, v, kernel_size, dilation, groups, scale):
    """A dilated window sees one phase of the map, every dilation-th token: phases go to the batch, undilated."""
    n, c, h, w = q.shape
    dy, dx = dilation

    def split(x):
        x = F.pad(x, (0, -w % dx, 0, -h % dy))  # zeros behind the border, as the definition has them
        x = x.unflatten(3, (-1, dx)).unflatten(2, (-1, dy)).permute(0, 3, 5, 1, 2, 4)
        return x.flatten(0, 2)

    out = msa_conv2d_tiled(split(q), split(k), split(v), kernel_size, (1, 1), (1, 1), groups, scale, (1, 1))
    out = out.unflatten(0, (n, dy, dx)).permute(0, 3, 4, 1, 5, 2)  # (N, C, H / dy, dy, W / dx, dx)
    return out.flatten(4, 5).flatten(2, 3)[:, :, :h, :w]
