"""TiC (Vision Transformer in Convolution, arXiv 2310.04134) as a four-stage backbone: the whole network.

MSA-Conv, the cyclic shift and inter-pooling are the paper's; the pyramid, the convolutions around the blocks and the
variants are this project's choices. Nothing here knows an image's size.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tic_backbone.layers import MLP, DropPath, LayerNorm2d, MSAConv2d, PositionConv, by_chunks, downsample, stem
from tic_backbone.ops import check_backend, odd_pair

MIN_SIZE = 32  # pixels: one token at the last stage


@dataclass(frozen=True)
class TiCConfig:
    """Everything that makes a TiC. Tuples have one entry a stage."""

    channels: tuple[int, ...]
    depths: tuple[int, ...]  # blocks
    head_dim: int = 32  # channels a head; each stage has channels / head_dim heads
    kernel_size: int = 7  # side of the attention window, in tokens
    mlp_ratio: float = 4.0
    cyclic_shift: bool = True  # keys and values bring in tokens half a window away along the diagonals
    inter_pool: bool = True  # every second block of a stage attends to tokens pooled 2 x 2
    in_channels: int = 3
    drop_path_rate: float = 0.0  # of the last block; grows linearly from 0 at the first one
    out_indices: tuple[int, ...] = (0, 1, 2, 3)  # stages whose maps are returned; none is built after the last one
    frozen_stages: int = 0  # 0: nothing; n: the stem and the first n stages get no gradient and stay in eval mode
    with_cp: bool = False  # recompute each block's activations in backward instead of keeping them
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("channels", "depths", "out_indices"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or not all(type(i) is int for i in value):
                raise TypeError(f"{name} must be a sequence of ints, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("head_dim", "kernel_size", "in_channels", "frozen_stages"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name} must be an int, got {getattr(self, name)!r}")
        n = len(self.channels)
        odd_pair(self.kernel_size, "kernel_size")
        check_backend(self.backend)
        if not n or len(self.depths) != n or min(self.depths + self.channels) < 1:
            raise ValueError(f"need as many positive depths as channels, got {self.depths=} and {self.channels=}")
        if self.head_dim < 1 or any(c % self.head_dim or c % 2 for c in self.channels):
            raise ValueError(f"{self.head_dim=} must divide each of {self.channels=}, which must be even")
        if not self.out_indices or list(self.out_indices) != sorted({*self.out_indices} & {*range(n)}):
            raise ValueError(f"{self.out_indices=} must be increasing stage numbers out of {tuple(range(n))}")
        if not 0 <= self.frozen_stages <= n:
            raise ValueError(f"{self.frozen_stages=} must be between 0 (nothing frozen) and {n}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"{self.drop_path_rate=} must be in [0, 1)")
        if self.in_channels < 1 or self.mlp_ratio <= 0:
            raise ValueError(f"{self.in_channels=} and {self.mlp_ratio=} must be positive")


VARIANTS = {
    "nano": TiCConfig(channels=(32, 64, 128, 256), depths=(2, 2, 6, 2), head_dim=16),
    "tiny": TiCConfig(channels=(96, 192, 384, 768), depths=(2, 2, 6, 2)),
    "small": TiCConfig(channels=(96, 192, 384, 768), depths=(2, 2, 18, 2)),
    "base": TiCConfig(channels=(128, 256, 512, 1024), depths=(2, 2, 18, 2)),
}


class Block(nn.Module):
    """Position encoding by a depthwise convolution, MSA-Conv, MLP, each as a residual."""

    def __init__(self, channels: int, config: TiCConfig, *, index: int, drop_path: float) -> None:
        """`index` counts the stage's blocks."""
        super().__init__()
        self.pos = PositionConv(channels)
        self.norm1 = LayerNorm2d(channels)
        self.attn = MSAConv2d(
            channels,
            channels,
            config.kernel_size,
            groups=channels // config.head_dim,
            cyclic_shift=config.kernel_size // 2 if config.cyclic_shift else 0,
            inter_pool=2 if config.inter_pool and index % 2 else 1,
            backend=config.backend,
        )
        self.norm2 = LayerNorm2d(channels)
        self.mlp = MLP(channels, int(channels * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pos(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if self.training:  # stochastic depth drops samples, not chunks of them
            return x + self.drop_path(self.mlp(self.norm2(x)))
        return by_chunks(lambda t: t + self.mlp(self.norm2(t)), x)


class TiC(nn.Module):
    """Backbone that maps images of any size to feature maps at strides 4, 8, 16 and 32.

    >>> maps = TiC("tiny", out_indices=(1, 2, 3))(torch.rand(1, 3, 427, 640))
    >>> [tuple(m.shape) for m in maps]
    [(1, 192, 54, 80), (1, 384, 27, 40), (1, 768, 14, 20)]

    Args:
        arch: a name of `VARIANTS`, a `TiCConfig`, or its fields as a dict, with at least ``channels`` and ``depths``.
        **fields: replace fields of the variant; a name that `TiCConfig` does not have is a TypeError.

    Attributes:
        config: the `TiCConfig`.
        out_channels, out_strides: of the returned maps, in their order.
    """

    def __init__(self, arch: str | dict | TiCConfig = "tiny", **fields) -> None:
        super().__init__()
        self.config = config = make_config(arch, **fields)
        n_stages = max(config.out_indices) + 1
        depths, channels = config.depths[:n_stages], config.channels[:n_stages]
        self.out_channels = tuple(channels[i] for i in config.out_indices)
        self.out_strides = tuple(4 * 2**i for i in config.out_indices)
        self.stem = stem(config.in_channels, channels[0])
        self.stages = nn.ModuleList()
        last = max(sum(depths) - 1, 1)
        for i, depth in enumerate(depths):
            stage = nn.Sequential(downsample(channels[i - 1], channels[i]) if i else nn.Identity())
            for j in range(depth):
                d = sum(depths[:i]) + j
                stage.append(Block(channels[i], config, index=j, drop_path=config.drop_path_rate * d / last))
            self.stages.append(stage)
        self.norms = nn.ModuleDict({str(i): LayerNorm2d(channels[i]) for i in config.out_indices})
        self.apply(_init)
        self._freeze()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, in_channels, H, W) with H, W >= 32 to one (N, C_i, ceil(H / s_i), ceil(W / s_i)) for each out index."""
        x = self.stem(checked_images(x, self.config.in_channels))
        outs = []
        for i, stage in enumerate(self.stages):
            for block in stage:
                x = checkpoint(block, x, use_reentrant=False) if self.config.with_cp and self.training else block(x)
            if i in self.config.out_indices:
                outs.append(self.norms[str(i)](x))
        return tuple(outs)

    def train(self, mode: bool = True) -> "TiC":
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        if self.config.frozen_stages:
            for module in (self.stem, *self.stages[: self.config.frozen_stages]):
                module.eval().requires_grad_(False)


def checked_images(x: torch.Tensor, in_channels: int) -> torch.Tensor:
    """The images in channels-last memory; a ValueError if they are none, or too small for one token a stage."""
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f"expected images of shape (N, {in_channels}, H, W), got {tuple(x.shape)}")
    if min(x.shape[2:]) < MIN_SIZE:
        raise ValueError(f"TiC needs images of at least {MIN_SIZE} x {MIN_SIZE} pixels, got {tuple(x.shape[2:])}")
    return x.contiguous(memory_format=torch.channels_last)


def make_config(arch: str | dict | TiCConfig, **fields) -> TiCConfig:
    """The variant named `arch`, or the config it is or describes, with `fields` replaced."""
    if isinstance(arch, dict):
        arch = TiCConfig(**arch)
    elif not isinstance(arch, TiCConfig):
        if arch not in VARIANTS:
            raise ValueError(f"unknown {arch=}; choose one of {list(VARIANTS)} or give a dict of TiCConfig's fields")
        arch = VARIANTS[arch]
    return replace(arch, **fields)


def _init(module: nn.Module) -> None:
    """Draw linear layers small, as transformers do; convolutions keep torch's default.

    With biases of zero, a batch's padding would reach the stem's norms as exact zeros and explode their gradients.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
