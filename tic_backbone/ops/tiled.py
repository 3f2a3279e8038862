"""MSA-Conv in plain PyTorch: queries in tiles, each tile's keys gathered once.

Tokens are rows of a table, and a tile is a list of row numbers. The keys that a tile of T x T queries meets are its
halo of (T + k - 1)^2 tokens. All tiles go through one `scaled_dot_product_attention` with one constant mask that leaves
each query its own window. Nothing of size k^2 per token is stored, forward or backward, and no shape is split
in a way that would tie a compiled or exported graph to one image size.
"""

from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F

TILE = 8


class Axis(NamedTuple):
    """How one axis is cut.

    Where the window is dilated, neighbouring queries share no key. The axis is then cut into phases, queries whose
    keys lie on one lattice; within a phase all is as without dilation, at the stride given here.
    """

    phases: int
    count: int  # tiles a phase
    tile: int  # queries a tile
    halo: int  # keys that a tile meets
    step: int  # from one tile's first key to the next one's, in keys of the lattice
    stride: int  # centre of a tile's query t: t * stride // key_stride, in keys of the lattice
    key_stride: int


def cut(queries: int, kernel: int, stride: int, dilation: int, key_stride: int) -> Axis:
    """Cut `queries` kept queries; the arguments are those of `msa_conv2d` along one axis."""
    phases = 1
    if dilation > 1:
        phases = dilation * key_stride // gcd(stride, dilation * key_stride)
        stride, key_stride = phases * stride // (dilation * key_stride), 1
    period = key_stride // gcd(stride, key_stride)  # a tile must hold whole cells, for all tiles to be alike
    tile = -(-TILE // period) * period
    per_phase = (queries + phases - 1) // phases
    return Axis(
        phases=phases,
        count=(per_phase + tile - 1) // tile,
        tile=tile,
        halo=(tile - 1) * stride // key_stride + kernel,
        step=tile * stride // key_stride,
        stride=stride,
        key_stride=key_stride,
    )


def window(axis: Axis, kernel: int, device: torch.device) -> torch.Tensor:
    """(tile, halo) booleans: which keys of the halo are in a query's window."""
    first = torch.arange(axis.tile, device=device) * axis.stride // axis.key_stride
    offset = torch.arange(axis.halo, device=device) - first[:, None]
    return (offset >= 0) & (offset < kernel)


def msa_conv2d_tiled(q, k, v, kernel_size, stride, dilation, groups, scale, key_stride):
    """See `tic_backbone.msa_conv2d`."""
    dtype, (n, c, *size) = q.dtype, q.shape
    kept = [(length + s - 1) // s for length, s in zip(size, stride)]
    axes = [cut(*a) for a in zip(kept, kernel_size, stride, dilation, key_stride)]
    rows, cols = (window(axis, length, q.device) for axis, length in zip(axes, kernel_size))
    allowed = (rows[:, None, :, None] & cols[None, :, None, :]).flatten(2).flatten(0, 1)  # (tile^2, halo^2)
    mask = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill(~allowed, float("-inf"))

    image, *tiles = _tile_numbers(n, axes, q.device)
    queries = _tokens(image, [_queries(*a) for a in zip(tiles, axes, stride)], size)
    keys = [_keys(*a) for a in zip(tiles, axes, kernel_size, stride, dilation, key_stride)]
    keys = _tokens(image, keys, k.shape[2:])
    q, k, v = _gather(q, queries, groups), _gather(k, keys, groups), _gather(v, keys, groups)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)  # (tiles, groups, tile^2, C / groups)
    out = out.transpose(1, 2).reshape(-1, c).to(dtype)  # autocast would have it in half precision
    return F.embedding(_untile(n, kept, axes, out.device), out).permute(0, 3, 1, 2)


def _tile_numbers(n, axes, device):
    """Of every tile its image, and its number along each axis: three (tiles,)."""
    down, across = (axis.phases * axis.count for axis in axes)
    number = torch.arange(n * down * across, device=device)
    row = number // across
    image = row // down
    return image, row - image * down, number - row * across  # no %, for which ONNX has no form with a traced divisor


def _queries(tile, axis, stride):
    """(tiles, tile): where a tile's queries lie along one axis of q. Those of the last tile may lie beyond."""
    phase, number = tile % axis.phases, tile // axis.phases
    inner = number[:, None] * axis.tile + torch.arange(axis.tile, device=tile.device)
    return (phase[:, None] + inner * axis.phases) * stride


def _keys(tile, axis, kernel, stride, dilation, key_stride):
    """(tiles, halo): where a tile's keys lie along one axis of k. Those around the border lie beyond."""
    phase, number = tile % axis.phases, tile // axis.phases
    inner = number[:, None] * axis.step + torch.arange(axis.halo, device=tile.device) - kernel // 2
    return (phase * stride // key_stride)[:, None] + inner * dilation


def _tokens(image, positions, size):
    """(tiles, tokens): the tokens' places in the map, counted over all images; -1 beyond the border."""
    (y, x), (h, w) = positions, size
    inside = ((y >= 0) & (y < h))[:, :, None] & ((x >= 0) & (x < w))[:, None]
    return torch.where(inside, ((image[:, None] * h + y) * w)[:, :, None] + x[:, None], -1).flatten(1)


def _gather(x, tokens, groups):
    """(N, C, H, W) gathered to (tiles, groups, tokens, C / groups), with zeros where `tokens` is -1."""
    x = F.pad(x.permute(0, 2, 3, 1).flatten(0, 2), (0, 0, 1, 0))  # (1 + N * H * W, C): row 0 is what lies beyond
    head = torch.arange(groups, device=x.device)[:, None]
    return F.embedding((tokens[:, None] + 1) * groups + head, x.view(-1, x.shape[1] // groups))


def _untile(n, kept, axes, device):
    """(N, H', W'): the row of every kept query among the rows of all tiles."""
    tile, inner = [], []
    for length, axis in zip(kept, axes):
        position = torch.arange(length, device=device)
        index = position // axis.phases
        tile.append(index // axis.tile * axis.phases + position % axis.phases)
        inner.append(index % axis.tile)
    (down, across), (y, x) = axes, inner
    image = torch.arange(n, device=device)[:, None, None] * (down.phases * down.count)
    number = (image + tile[0][:, None]) * (across.phases * across.count) + tile[1]
    return (number * down.tile + y[:, None]) * across.tile + x
