"""The parts of a TiC block. Each layer maps (N, C, H, W) to (N, C', H', W') and keeps channels-last memory."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tic_backbone.ops import check_backend, cyclic_shift, msa_conv2d, odd_pair, pair

CHUNK = 2048  # tokens; see `by_chunks`
_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"


def inter_pool(x: torch.Tensor, ratio: int) -> torch.Tensor:
    """Average cells of r x r tokens: (N, C, ceil(H / r), ceil(W / r)). A cell over the border averages what it has."""
    if not torch.compiler.is_compiling():
        return F.avg_pool2d(x, ratio, ceil_mode=True, count_include_pad=False)
    # A graph for all sizes must not ask whether r divides a side, as avg_pool2d does: a convolution with ones.
    c, h, w = x.shape[1:]
    total = F.conv2d(F.pad(x, (0, ratio - 1, 0, ratio - 1)), x.new_ones(c, 1, ratio, ratio), stride=ratio, groups=c)
    rows, cols = (size - ratio * torch.arange(n, device=x.device) for size, n in zip((h, w), total.shape[2:]))
    return total / (rows.clamp(max=ratio)[:, None] * cols.clamp(max=ratio))


def by_chunks(function: Callable, x: torch.Tensor) -> torch.Tensor:
    """`function`, which treats each token of (N, C, H, W) on its own and keeps C, on `CHUNK` tokens at a time.

    Where no gradient wants what lies between, that then stays in the cache, and its memory does not grow with the map.
    Hooks of modules inside `function` then see the chunks, (1, C, CHUNK, 1).
    """
    n, c, h, w = x.shape
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    if whole or n * h * w <= CHUNK or x.device.type != "cpu":
        return function(x)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    chunks = (t.permute(0, 2, 3, 1).reshape(1, -1, 1, c).split(CHUNK, 1) for t in (x, out))
    for part, into in zip(*chunks):
        into.copy_(function(part.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    return out


class MSAConv2d(nn.Module):
    """Multi-head self-attention with the arguments and the output size of the ``nn.Conv2d`` it replaces.

    1 x 1 projections give q, k and v of ``out_channels``; `msa_conv2d` attends within the window; a last
    projection mixes the heads. ``groups=1`` is the standard form, ``groups=out_channels`` the depthwise form, and in
    between ``groups`` is the number of heads. Unlike a convolution's, the first projections always see all input
    channels, so ``groups`` need not divide ``in_channels``.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size: the window, odd; int or (h, w), like ``stride`` and ``dilation``.
        stride: distance of the queries that are computed.
        padding: "same", or the number that means the same, ``dilation * (kernel_size - 1) // 2``; any other one is a
            ValueError.
        dilation: spacing of the keys in the window.
        groups: number of heads; must divide ``out_channels``.
        bias: whether the projections have one.
        padding_mode: only "zeros"; those keys score 0 and take their share of the softmax.
        cyclic_shift: length of the multi-directional cyclic shift of keys and values in tokens, 0 for none; see
            `tic_backbone.cyclic_shift`. It wants heads of five channels or more: in the depthwise form it does nothing.
        inter_pool: keys and values come from tokens averaged over cells of this side, 1 for none; see `inter_pool`.
        backend: implementation of the attention and the shift; see `tic_backbone.msa_conv2d`.
    """

    transposed = False  # mmcv's ConvModule reads these two of every convolution it wraps
    output_padding = (0, 0)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        cyclic_shift: int = 0,
        inter_pool: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if type(groups) is not int or groups < 1 or out_channels % groups:
            raise ValueError(f"groups must divide out_channels, got {groups=} and {out_channels=}")
        if padding_mode != "zeros":
            raise ValueError(f"MSAConv2d pads with zeros only, got {padding_mode=}")
        if not type(cyclic_shift) is type(inter_pool) is int or cyclic_shift < 0 or inter_pool < 1:
            raise ValueError(f"need ints {cyclic_shift=} >= 0 and {inter_pool=} >= 1")
        check_backend(backend)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = odd_pair(kernel_size, "kernel_size")
        self.stride, self.dilation = pair(stride, "stride"), pair(dilation, "dilation")
        self.padding = tuple(d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation))
        if padding not in ("same", self.padding) and (padding, padding) != self.padding and padding != [*self.padding]:
            raise ValueError(
                f"MSAConv2d keeps the size like a 'same' convolution: {padding=} must be 'same' or {self.padding} for "
                f"{kernel_size=} and {dilation=}"
            )
        self.padding_mode = padding_mode
        self.cyclic_shift, self.inter_pool, self.backend = cyclic_shift, inter_pool, backend
        self.q = Linear2d(in_channels, out_channels, bias)
        self.kv = Linear2d(in_channels, 2 * out_channels, bias)
        self.proj = Linear2d(out_channels, out_channels, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected an input of shape (N, {self.in_channels}, H, W), got {tuple(x.shape)}")
        q, (k, v) = self.q(x), self.keys_and_values(x)
        x = msa_conv2d(
            q,
            k,
            v,
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            key_stride=self.inter_pool,
            backend=self.backend,
        )
        return self.proj(x)

    def keys_and_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of an input: pooled, projected, shifted."""
        # Pooled before the projection, which is linear: the same keys and values, for a part of the arithmetic.
        kv = self.kv(x if self.inter_pool == 1 else inter_pool(x, self.inter_pool))
        if self.cyclic_shift:
            kv = cyclic_shift(kv, 2 * self.groups, self.cyclic_shift, self.backend)
        return kv.chunk(2, 1)

    def extra_repr(self) -> str:
        names = ("kernel_size", "stride", "dilation", "groups", "cyclic_shift", "inter_pool")
        return f"{self.in_channels}, {self.out_channels}, " + ", ".join(f"{n}={getattr(self, n)}" for n in names)


class Linear2d(nn.Linear):
    """A linear layer over the channels of each token: on channels-last maps free of copies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._convolves(x):
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            return F.conv2d(x, self.weight[:, :, None, None], self.bias)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _convolves(self, x: torch.Tensor) -> bool:
        """Whether to call it a 1 x 1 convolution, for which PyTorch has another library, oneDNN, than for a product.

        Where that was measured, in float32 on CPUs of AVX2, it is the faster one, but for few tokens of many channels.
        So the last bits of a token's numbers can depend on how many tokens there are.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu" or not _AVX2:
            return False
        if not x.dtype == self.weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        tokens, channels = x.shape[0] * x.shape[2] * x.shape[3], max(self.weight.shape)
        enough = tokens >= (96 if channels <= 2048 else channels // 4) and self.in_features > 1
        return enough and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each token."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PositionConv(nn.Conv2d):
    """x plus a depthwise 3 x 3 convolution of it: conditional position encoding (Chu et al. 2021), free of sizes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)
        self.to(memory_format=torch.channels_last)  # as the maps, and as its gradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = F.pad(self.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        return self._conv_forward(x, self.weight + identity, self.bias)  # the sum at the cost of the convolution


class MLP(nn.Module):
    """Two token-wise linear layers with a GELU between."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear2d(channels, hidden)
        self.fc2 = Linear2d(hidden, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, zero a sample's whole residual with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def stem(in_channels: int, channels: int) -> nn.Sequential:
    """Two overlapping convolutions to stride 4: (N, in_channels, H, W) to (N, channels, ceil(H/4), ceil(W/4))."""
    return nn.Sequential(
        _halving(in_channels, channels // 2),
        LayerNorm2d(channels // 2),
        nn.GELU(),
        _halving(channels // 2, channels),
        LayerNorm2d(channels),
    )


def downsample(in_channels: int, out_channels: int) -> nn.Sequential:
    """Halve the map with an overlapping convolution: (N, C, H, W) to (N, C', ceil(H/2), ceil(W/2))."""
    return nn.Sequential(LayerNorm2d(in_channels), _halving(in_channels, out_channels))


def _halving(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
