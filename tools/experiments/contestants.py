"""The small networks that a study compares: one stem, one head, TiC's own blocks, and in them one thing changed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tic_backbone import MSAConv2d, TiCConfig
from tic_backbone.layers import LayerNorm2d, Linear2d, downsample
from tic_backbone.tic import Block, _init

CHANNELS, DEPTHS, HEAD = (32, 64), (4, 4), 16


class Net(nn.Module):
    """(N, 3, H, W) to scores (N, classes, H / 4, W / 4): a stem of stride 2, two stages of blocks, a linear layer."""

    def __init__(
        self, classes: int, attention: Callable | None = None, *, position: str = "convolution", **fields
    ) -> None:
        """`attention(channels, index)` makes what stands in for a block's MSA-Conv; `fields` are `TiCConfig`'s.

        Positions come from a "convolution" in every block, a "table" after the stem, or from nothing ("").
        """
        super().__init__()
        options = dict(channels=CHANNELS, depths=DEPTHS, out_indices=(1,), head_dim=HEAD, kernel_size=3)
        config = TiCConfig(**{**options, **fields})
        layers: list[nn.Module] = [nn.Conv2d(3, CHANNELS[0], 3, stride=2, padding=1), LayerNorm2d(CHANNELS[0])]
        if position == "table":
            layers.append(Table(CHANNELS[0], 16))
        for stage, (channels, depth) in enumerate(zip(config.channels, config.depths)):
            if stage:
                layers.append(downsample(config.channels[stage - 1], channels))
            for i in range(depth):
                block = Block(channels, config, depth=sum(DEPTHS[:stage]) + i, index=i, drop_path=0.0)
                if attention:
                    block.attn = attention(channels, i)
                if position != "convolution":
                    block.pos = nn.Identity()
                layers.append(block)
        self.features = nn.Sequential(*layers, LayerNorm2d(config.channels[-1]))
        self.head = Linear2d(config.channels[-1], classes)
        self.apply(_init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x.contiguous(memory_format=torch.channels_last)))


class Table(nn.Module):
    """Adds a learned table of positions, which maps of other sizes than its own get resampled."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(1, channels, side, side))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.interpolate(self.table, x.shape[2:], mode="bicubic", align_corners=False)


class Attention(nn.Module):
    """Multi-head attention within sets of tokens, with projections like MSAConv2d's; subclasses say which sets."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q, self.kv = Linear2d(channels, channels), Linear2d(channels, 2 * channels)
        self.proj = Linear2d(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = torch.cat([self.q(x), self.kv(x)], 1).permute(0, 2, 3, 1)  # (N, H, W, 3 C)
        return self.proj(self.attend(qkv).permute(0, 3, 1, 2))

    def within(self, qkv: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(sets, tokens, 3 C) to (sets, tokens, C)."""
        q, k, v = qkv.unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Global(Attention):
    """Every token attends to every other one."""

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        return self.within(qkv.flatten(1, 2)).unflatten(1, qkv.shape[1:3])


class Windows(Attention):
    """Swin's windows: in every second block shifted by half a side, with masks where the shift wraps.

    Without Swin's table of relative positions, as all contestants have a position convolution.
    """

    def __init__(self, channels: int, side: int, shifted: bool) -> None:
        super().__init__(channels)
        self.side, self.shift = side, side // 2 if shifted else 0

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        n, h, w, _ = qkv.shape
        side, shift = self.side, self.shift if min(qkv.shape[1:3]) > self.side else 0
        regions = self._regions(h, side, shift)[:, None] * 4 + self._regions(w, side, shift)
        regions = self._partition(F.pad(regions, (0, -w % side, 0, -h % side), value=-1)[None, :, :, None])[..., 0]
        mask = (regions[:, :, None] == regions[:, None, :])[:, None].repeat(n, 1, 1, 1)  # (windows, 1, side^2, side^2)
        windows = self._partition(F.pad(qkv.roll((-shift, -shift), (1, 2)), (0, 0, 0, -w % side, 0, -h % side)))
        out = self.within(windows, mask)
        rows, cols = -(-h // side), -(-w // side)
        out = out.reshape(n, rows, cols, side, side, -1).transpose(2, 3).reshape(n, rows * side, cols * side, -1)
        return out[:, :h, :w].roll((shift, shift), (1, 2))

    @staticmethod
    def _regions(size: int, side: int, shift: int) -> torch.Tensor:
        position = torch.arange(size)
        return (position >= size - shift).long()  # what wrapped around

    def _partition(self, x: torch.Tensor) -> torch.Tensor:
        n, h, w, c = x.shape
        s = self.side
        return x.reshape(n, h // s, s, w // s, s, c).transpose(2, 3).reshape(-1, s * s, c)


class Depthwise(nn.Module):
    """A depthwise convolution and a projection, as ConvNeXt mixes tokens."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.proj = Linear2d(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.conv(x))


def _msa(**options) -> Callable:
    return lambda channels, i: MSAConv2d(
        channels, channels, **{"kernel_size": 3, "groups": channels // HEAD, **options}
    )


PLAIN = dict(cyclic_shift=False, inter_pool=False)
ABLATION = {
    "plain": lambda n: Net(n, **PLAIN),
    "shift": lambda n: Net(n, cyclic_shift=True, inter_pool=False),
    "pool": lambda n: Net(n, cyclic_shift=False, inter_pool=True),
    "shift + pool": lambda n: Net(n),
    "Swin windows of 4": lambda n: Net(n, lambda c, i: Windows(c, 4, i % 2 == 1), **PLAIN),
    "global attention": lambda n: Net(n, lambda c, i: Global(c), **PLAIN),
    "global attention, table": lambda n: Net(n, lambda c, i: Global(c), position="table", **PLAIN),
    "depthwise convolution": lambda n: Net(n, lambda c, i: Depthwise(c, 3), mlp_ratio=5.3, **PLAIN),
    "no position convolution": lambda n: Net(n, position="", **PLAIN),
    "k = 5": lambda n: Net(n, kernel_size=5, **PLAIN),
    "k = 7": lambda n: Net(n, kernel_size=7, **PLAIN),
    "groups = 1": lambda n: Net(n, _msa(groups=1), **PLAIN),
    "groups = C": lambda n: Net(n, lambda c, i: MSAConv2d(c, c, 3, groups=c), **PLAIN),
    "dilation 2 in every second block": lambda n: Net(n, lambda c, i: _msa(dilation=1 + i % 2)(c, i), **PLAIN),
}
LENGTH = {  # of the cyclic shift, in every block
    "no shift": ABLATION["plain"],
    **{
        f"shift {length}": lambda n, length=length: Net(
            n, lambda c, i: _msa(cyclic_shift=length, turn=i)(c, i), **PLAIN
        )
        for length in (1, 2, 3)
    },
    "shift 2, every second block": lambda n: Net(
        n, lambda c, i: _msa(cyclic_shift=2 * (i % 2), turn=i // 2)(c, i), **PLAIN
    ),
}
STUDIES = {"ablation": ABLATION, "shift": LENGTH, "lr": {"Swin windows of 4": ABLATION["Swin windows of 4"]}}
