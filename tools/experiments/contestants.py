"""The small networks that a study compares: one stem, one head, TiC's own blocks, and in them one thing changed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tic_backbone import MSAConv2d, TiCConfig
from tic_backbone.layers import LayerNorm2d, Linear2d, downsample, inter_pool
from tic_backbone.ops.reference import windows_around
from tic_backbone.ops.shift import DIRECTIONS
from tic_backbone.tic import Block, _init

CHANNELS, DEPTHS, HEAD = (32, 96), (2, 2), 16
STRIDE = 4  # of every contestant's last map


class Net(nn.Module):
    """(N, 3, H, W) to scores (N, classes, H / 4, W / 4): a stem of stride 2, two stages of blocks, a linear layer."""

    def __init__(
        self,
        classes: int,
        attention: Callable | None = None,
        *,
        position: str = "convolution",
        overlap: bool = True,
        **fields,
    ) -> None:
        """`attention(channels, depth)` makes what stands in for the MSA-Conv of the network's block number `depth`, and
        `fields` are `TiCConfig`'s.

        Positions come from a "convolution" in every block or from nothing (""). Without `overlap` the map is halved by
        a convolution of 2 x 2.
        """
        super().__init__()
        options = dict(channels=CHANNELS, depths=DEPTHS, out_indices=(1,), head_dim=HEAD, kernel_size=3, mlp_ratio=2)
        config = TiCConfig(**{**options, **fields})
        layers: list[nn.Module] = [nn.Conv2d(3, CHANNELS[0], 3, stride=2, padding=1), LayerNorm2d(CHANNELS[0])]
        for stage, (channels, depth) in enumerate(zip(config.channels, config.depths)):
            if stage and overlap:
                layers.append(downsample(config.channels[stage - 1], channels))
            elif stage:
                before = config.channels[stage - 1]
                layers += LayerNorm2d(before), nn.Conv2d(before, channels, 2, stride=2)
            for i in range(depth):
                d = sum(DEPTHS[:stage]) + i
                block = Block(channels, config, index=i, drop_path=0.0)
                if attention:
                    block.attn = attention(channels, d)
                if position != "convolution":
                    block.pos = nn.Identity()
                layers.append(block)
        self.features = nn.Sequential(*layers, LayerNorm2d(config.channels[-1]))
        self.head = Linear2d(config.channels[-1], classes)
        self.apply(_init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x.contiguous(memory_format=torch.channels_last)))


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


def by_turns(heads: int, length: int, turn: int) -> list[tuple[int, int]]:
    """Of each head a displacement (down, right): at most five runs of heads look to the centre and the four diagonals.

    `turn`, the number of the layer, rotates which direction the first run takes.
    """
    runs = min(heads, len(DIRECTIONS))
    sizes = [heads // runs + (i < heads % runs) for i in range(runs)]
    steps = [DIRECTIONS[(i + turn) % len(DIRECTIONS)] for i in range(runs)]
    return [(down * length, right * length) for size, (down, right) in zip(sizes, steps) for _ in range(size)]


def diagonals(heads: int, length: int, turn: int) -> list[tuple[int, int]]:
    """Of each head a displacement along one of the four diagonals, by turns."""
    steps = [DIRECTIONS[1 + (head + turn) % 4] for head in range(heads)]
    return [(length * down, length * right) for down, right in steps]


def displaced(x: torch.Tensor, steps: list[tuple[int, int]]) -> torch.Tensor:
    """Each head's part of x rolled, such that its window looks (down, right) of where it lies."""
    if not any(map(any, steps)):
        return x
    parts = [part.roll((-down, -right), (2, 3)) for part, (down, right) in zip(x.chunk(len(steps), 1), steps)]
    return torch.cat(parts, 1).contiguous(memory_format=torch.channels_last)


class HeadShift(MSAConv2d):
    """MSA-Conv whose heads look to where `steps` say, (down, right) each, around the border."""

    def __init__(self, channels: int, steps: list[tuple[int, int]], **options) -> None:
        super().__init__(channels, channels, 3, groups=channels // HEAD, **options)
        self.steps = steps

    def keys_and_values(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [displaced(part, self.steps) for part in super().keys_and_values(x)]


class DiagonalChannels(MSAConv2d):
    """The package's cyclic shift without its centre: every head's channels in four runs, one from each diagonal."""

    def __init__(self, channels: int, length: int, inter_pool: int = 1) -> None:
        super().__init__(channels, channels, 3, groups=channels // HEAD, inter_pool=inter_pool)
        self.length = length

    def keys_and_values(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self._rolled(part) for part in super().keys_and_values(x)]

    def _rolled(self, x: torch.Tensor) -> torch.Tensor:
        runs = x.unflatten(1, (self.groups, 4, -1)).unbind(2)
        steps = [(-self.length * down, -self.length * right) for down, right in DIRECTIONS[1:]]
        x = torch.stack([run.roll(step, (3, 4)) for run, step in zip(runs, steps)], 2).flatten(1, 3)
        return x.contiguous(memory_format=torch.channels_last)


class Union(MSAConv2d):
    """MSA-Conv in which each head's own window and a second one share one softmax.

    The second window is displaced in the head's direction by `displaced` tokens of its map, and its keys and values are
    those of the tokens averaged over cells of `pooled` a side.
    """

    def __init__(
        self, channels: int, kernel_size: int = 3, *, displaced: int = 0, turn: int = 0, pooled: int = 1
    ) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels // HEAD)
        self.windows = (1, [(0, 0)] * self.groups), (pooled, diagonals(self.groups, displaced, turn))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, keys, values = self.q(x), [], []
        n, c, h, w = q.shape
        for ratio, steps in self.windows:
            centres = [torch.arange(size) // ratio for size in (h, w)]
            for part, into in zip(self.kv(inter_pool(x, ratio)).chunk(2, 1), (keys, values)):
                part = displaced(part, steps)
                into.append(windows_around(part, self.kernel_size, self.dilation, self.groups, centres))
        q = q.reshape(n, self.groups, c // self.groups, 1, h, w)
        weights = (HEAD**-0.5 * q * torch.cat(keys, 3)).sum(2, keepdim=True).softmax(3)
        return self.proj((weights * torch.cat(values, 3)).sum(3).reshape(n, c, h, w))


class PooledBranch(nn.Module):
    """MSA-Conv, and to its result added what a second one makes of tokens averaged 2 x 2, each half as wide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.near, self.far = (
            MSAConv2d(channels, channels // 2, 3, groups=max(channels // 2 // HEAD, 1)) for _ in "nf"
        )
        self.proj = Linear2d(channels // 2, channels)
        self.near.proj = self.far.proj = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        far = self.far(inter_pool(x, 2)).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return self.proj(self.near(x) + far[:, :, : x.shape[2], : x.shape[3]])


class Neighbourhood(Attention):
    """Neighbourhood attention (Hassani et al. 2023) without its table: the window stays whole inside of the map."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels)
        self.kernel_size = kernel_size

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        h, w = qkv.shape[1:3]
        rows, columns = (self._inside(size) for size in (h, w))  # (size, k): which tokens each one's window holds
        keys = (rows[:, None, :, None] * w + columns[None, :, None, :]).flatten(2).flatten(0, 1)  # (H * W, k^2)
        q, k, v = qkv.flatten(1, 2).unflatten(2, (3, -1, HEAD)).unbind(2)  # (N, H * W, heads, 16)
        k, v = (part[:, keys.flatten()].unflatten(1, keys.shape) for part in (k, v))
        weights = (torch.einsum("nqhd,nqkhd->nqhk", q, k) * HEAD**-0.5).softmax(3)
        return torch.einsum("nqhk,nqkhd->nqhd", weights, v).flatten(2).unflatten(1, (h, w))

    def _inside(self, size: int) -> torch.Tensor:
        k = min(self.kernel_size, size)
        first = (torch.arange(size) - k // 2).clamp(0, size - k)
        return first[:, None] + torch.arange(k)


class Peer(nn.Module):
    """A class of timm's, whose map has stride 4 like that of `Net`, with the same linear layer at its end."""

    def __init__(self, body: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        body.norm = body.fc_norm = body.head = nn.Identity()
        self.body, self.norm, self.head = body, LayerNorm2d(channels), Linear2d(channels, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.body.forward_intermediates(x, indices=1, intermediates_only=True)[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def swin(classes: int) -> Peer:
    from timm.models.swin_transformer import SwinTransformer

    options = dict(img_size=32, strict_img_size=False, patch_size=2, window_size=4, mlp_ratio=2, drop_path_rate=0.0)
    return Peer(SwinTransformer(**options, embed_dim=46, depths=(2, 2), num_heads=(2, 4)), 92, classes)


def convnext(classes: int) -> Peer:
    from timm.models.convnext import ConvNeXt

    body = ConvNeXt(depths=(2, 2, 1, 1), dims=(32, 96, 96, 96), patch_size=2, ls_init_value=None)
    body.prune_intermediate_layers([1])
    body.stages[0].downsample = nn.Identity()  # which timm puts behind a stem of stride 2
    return Peer(body, 96, classes)


def vit(classes: int) -> Peer:
    """Four layers on 4 x 4 px; its table of positions is resampled for maps of other sizes."""
    from timm.models.vision_transformer import VisionTransformer

    options = dict(img_size=32, patch_size=4, dynamic_img_size=True, class_token=False, global_pool="avg")
    return Peer(VisionTransformer(**options, embed_dim=75, depth=4, num_heads=5, mlp_ratio=2), 75, classes)


def _msa(**options) -> Callable:
    return lambda channels, i: MSAConv2d(
        channels, channels, **{"kernel_size": 3, "groups": channels // HEAD, **options}
    )


def _by_turns(channels: int, length: int, turn: int, **options) -> HeadShift:
    return HeadShift(channels, by_turns(channels // HEAD, length, turn), **options)


def _second(first: Callable, second: Callable) -> Callable:
    """`second` in every second block, `first` in the others."""
    return lambda channels, i: (second if i % 2 else first)(channels, i)


def _plain(attention: Callable | None = None, **fields) -> Callable:
    """Makes a `Net` without the two mechanisms, where `attention` does not bring them."""
    return lambda classes: Net(classes, attention, **{"cyclic_shift": False, "inter_pool": False, **fields})


CONTESTANTS: dict[str, Callable[[int], nn.Module]] = {  # from a number of classes to a network
    "plain": _plain(),
    "shift a, 1": _plain(lambda c, i: _by_turns(c, 1, i)),
    "shift a, 2": _plain(lambda c, i: _by_turns(c, 2, i)),
    "shift a, 3": _plain(lambda c, i: _by_turns(c, 3, i)),
    "shift b, 2": _plain(_second(_msa(), lambda c, i: HeadShift(c, diagonals(c // HEAD, 2, i // 2)))),
    "shift c, 1": _plain(_msa(cyclic_shift=1)),
    "shift c, 2": _plain(_msa(cyclic_shift=2)),
    "shift d, 1": _plain(lambda c, i: Union(c, displaced=1, turn=i)),
    "shift d, 2": _plain(lambda c, i: Union(c, displaced=2, turn=i)),
    "shift d, 3": _plain(lambda c, i: Union(c, displaced=3, turn=i)),
    "shift d, 3, every second block": _plain(_second(_msa(), lambda c, i: Union(c, displaced=3, turn=i))),
    "pool a, 2": _plain(_second(_msa(), _msa(inter_pool=2))),
    "pool a, 4": _plain(_second(_msa(), _msa(inter_pool=4))),
    "pool b, 2": _plain(lambda c, i: PooledBranch(c), mlp_ratio=2.4),
    "pool c, 2": _plain(lambda c, i: Union(c, pooled=2)),
    "pool c, 4": _plain(lambda c, i: Union(c, pooled=4)),
    "pool c, 2, every second block": _plain(_second(_msa(), lambda c, i: Union(c, pooled=2))),
    "pool c, 4, every second block": _plain(_second(_msa(), lambda c, i: Union(c, pooled=4))),
    "shift a, 1 + pool a, 2": _plain(lambda c, i: _by_turns(c, 1, i, inter_pool=1 + i % 2)),
    "shift a, 2 + pool a, 2": _plain(lambda c, i: _by_turns(c, 2, i, inter_pool=1 + i % 2)),
    "shift a, 1 + pool a, 2, downsampling 2 x 2": _plain(
        lambda c, i: _by_turns(c, 1, i, inter_pool=1 + i % 2), overlap=False, mlp_ratio=2.25
    ),
    "shift a, 1 + dilation 2": _plain(lambda c, i: _by_turns(c, 1, i, dilation=1 + i % 2)),
    "shift b, 1 + pool a, 2": _plain(_second(_msa(), lambda c, i: _by_turns(c, 1, i // 2, inter_pool=2))),
    "shift c, 1 + pool a, 2": _plain(_second(_msa(cyclic_shift=1), _msa(cyclic_shift=1, inter_pool=2))),
    "shift c, 2 + pool a, 2": _plain(_second(_msa(cyclic_shift=2), _msa(cyclic_shift=2, inter_pool=2))),
    "shift c without the centre, 1 + pool a, 2": _plain(lambda c, i: DiagonalChannels(c, 1, 1 + i % 2)),
    "shift d, 1 + pool c, 2": _plain(lambda c, i: Union(c, displaced=1, turn=i, pooled=2)),
    "shift d, 2 + pool c, 2": _plain(lambda c, i: Union(c, displaced=2, turn=i, pooled=2)),
    "shift d, 1 + pool c, 2, every second block": _plain(
        _second(_msa(), lambda c, i: Union(c, displaced=1, turn=i // 2, pooled=2))
    ),
    "depthwise convolution": _plain(lambda c, i: Depthwise(c, 3), mlp_ratio=3.5),
    "Swin windows of 4": _plain(lambda c, i: Windows(c, 4, i % 2 == 1)),
    "neighbourhood attention": _plain(lambda c, i: Neighbourhood(c, 3)),
    "global attention": _plain(lambda c, i: Global(c)),
    "no position convolution": _plain(position=""),
    "downsampling 2 x 2": _plain(overlap=False, mlp_ratio=2.25),
    "k = 5": _plain(kernel_size=5),
    "k = 7": _plain(kernel_size=7),
    "groups = 1": _plain(_msa(groups=1)),
    "groups = C": _plain(lambda c, i: MSAConv2d(c, c, 3, groups=c)),
    "dilation 2 in every second block": _plain(lambda c, i: _msa(dilation=1 + i % 2)(c, i)),
    "Swin": swin,
    "ConvNeXt": convnext,
    "ViT": vit,
}
TIC = "shift c, 1 + pool a, 2"  # the forms that the package has
SHIFTS = [name for name in CONTESTANTS if name.startswith("shift") and "+" not in name]
POOLS = [name for name in CONTESTANTS if name.startswith("pool")]
BOTH = [name for name in CONTESTANTS if "+" in name]
STUDIES = {  # names of contestants; the first is what the others are compared with
    "ablation": [
        *("plain", "shift c, 1", "pool a, 2", TIC),
        *("depthwise convolution", "Swin windows of 4", "neighbourhood attention", "global attention"),
        *("no position convolution", "downsampling 2 x 2", "k = 5", "k = 7"),
        *("groups = 1", "groups = C", "dilation 2 in every second block"),
    ],
    "shift": ["plain", *SHIFTS],
    "pool": ["plain", *POOLS],
    "both": ["plain", *BOTH],
    "peers": [TIC, "Swin", "ConvNeXt", "ViT"],
}
