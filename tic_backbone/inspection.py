"""Looking inside backbones: how far they see, and where a head of TiC looks."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from tic_backbone.layers import MSAConv2d


class Window(NamedTuple):
    """What the G heads of an MSA-Conv see from one token, in its window of K keys."""

    weights: torch.Tensor  # (G, K), each head's sum to 1
    tokens: torch.Tensor  # (K, 2): row and column of each key's token, on the pooled map if the layer pools
    inside: torch.Tensor  # (K,): False for the zeros beyond the border


@torch.no_grad()
def window_weights(layer: MSAConv2d, x: torch.Tensor, row: int, column: int) -> Window:
    """The attention weights of the query at (row, column) of the layer's input x, (1, C, H, W).

    The centre of the window is the query's own token, or its cell in a layer that pools. With the cyclic shift
    a key holds, beside features of its token, some of others around it; see `tic_backbone.cyclic_shift`.
    """
    k = layer.keys_and_values(x)[0][0]
    height, width = k.shape[1:]
    ratio, groups = layer.inter_pool, layer.groups
    steps = [torch.arange(n) - n // 2 for n in layer.kernel_size]
    rows, columns = (centre + d * s for centre, d, s in zip((row // ratio, column // ratio), layer.dilation, steps))
    tokens = torch.cartesian_prod(rows, columns)
    inside = ((tokens >= 0) & (tokens < torch.tensor([height, width]))).all(1)
    q = layer.q(x[:, :, row : row + 1, column : column + 1]).reshape(groups, -1)
    keys = k.new_zeros(groups, len(tokens), q.shape[1])
    keys[:, inside] = k[:, tokens[inside, 0], tokens[inside, 1]].unflatten(0, (groups, -1)).transpose(1, 2)
    scores = (keys @ q[:, :, None])[..., 0] * q.shape[1] ** -0.5
    return Window(scores.softmax(1), tokens, inside)


def receptive_field(function: Callable, images: Iterable[torch.Tensor]) -> tuple[torch.Tensor, tuple[float, float]]:
    """The effective receptive field (Luo et al. 2016) of the token at the centre of `function`'s map, (1, C, h, w).

    It is the gradient of the token with respect to the image, as absolute values added over colours and over `images`,
    (C, H, W) each, of one size. The token's channels are added with signs drawn once, as their plain sum is constant
    after a LayerNorm. Returns the field, (H, W) that sum to 1, and its centre (row, column) in px: half of the field
    lies above it, half to its left. Where a token has its centre depends on how a backbone's convolutions pad.
    """
    total = 0
    for image in images:
        x = image[None].clone().requires_grad_()
        out = function(x)
        rows, columns = out.shape[2:]
        token = out[0, :, rows // 2, columns // 2]
        signs = torch.randint(0, 2, token.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        (gradient,) = torch.autograd.grad((token * signs).sum(), x)
        total = total + gradient[0].double().abs().sum(0)
    field = total / total.sum()
    return field, (_median(field.sum(1)), _median(field.sum(0)))


def _median(shares: torch.Tensor) -> float:
    """Where `shares`, one px each, that sum to 1 are halved."""
    before = shares.cumsum(0) - shares
    last = int((before < 0.5).sum()) - 1
    return last + float((0.5 - before[last]) / shares[last])


def side_of_square(field: torch.Tensor, place: tuple[float, float], share: float) -> int:
    """Px a side of the smallest square around `place` that holds `share` (0 to 1) of a field, (H, W) that sums to 1.

    What of the square lies beyond the image counts too.
    """
    down, right = ((torch.arange(n) + 0.5 - p).abs() for n, p in zip(field.shape, place))
    reach, order = torch.maximum(down[:, None], right).flatten().sort(stable=True)
    held = field.flatten()[order].cumsum(0)
    last = min(int((held < share - 1e-9).sum()), len(held) - 1)
    return round(2 * float(reach[last]) + 1)
