"""What a TiC costs at an image size, by formula: ``python -m tic_backbone.complexity tiny 800 1344``.

Counted are the multiply-accumulates of convolutions, linear layers and attention (scores and weighted sum over the
whole window, also where it lies over the border). Norms, softmax, GELU, averages and additions are not. The tiled
backend computes more than this: scores that it then masks.
"""

import argparse
from dataclasses import dataclass

from tic_backbone.tic import VARIANTS, TiCConfig


@dataclass(frozen=True)
class Cost:
    """Of the stem, of a stage with its downsampling and output norm, or of all."""

    name: str
    parameters: int
    macs: int  # multiply-accumulates for one image
    attention: int  # the part of `macs` that scores and weighted sums take, without the projections


def complexity(config: TiCConfig, height: int, width: int) -> list[Cost]:
    """The costs of the stem, of each stage that is built, and their total, for one image of height x width pixels."""
    tokens = _ceil_halves(height, width)
    half, c = config.channels[0] // 2, config.channels[0]
    macs = _product(tokens) * 9 * config.in_channels * half
    tokens = _ceil_halves(*tokens)
    parameters = 9 * (config.in_channels * half + half * c) + 3 * (half + c)  # 3: a bias and a norm
    costs = [Cost("stem", parameters, macs + _product(tokens) * 9 * half * c, 0)]
    for i in range(max(config.out_indices) + 1):
        parameters, macs = 0, 0
        if i:
            c_in, c = c, config.channels[i]
            tokens = _ceil_halves(*tokens)
            parameters, macs = 2 * c_in + 9 * c_in * c + c, _product(tokens) * 9 * c_in * c
        n, hidden, depth = _product(tokens), int(c * config.mlp_ratio), config.depths[i]
        pooled = depth // 2 if config.inter_pool else 0  # blocks, whose keys and values come from 2 x 2 cells
        cells = _product(_ceil_halves(*tokens))
        attention = depth * n * 2 * config.kernel_size**2 * c
        dense = 2 * c * c + 2 * c * hidden  # of a token in a block: q, the last projection, MLP
        macs += attention + depth * n * (9 * c + dense)
        macs += (depth - pooled) * n * 2 * c * c + pooled * cells * 2 * c * c
        parameters += depth * (dense + 2 * c * c + 9 * c + 10 * c + hidden) + 2 * c * (i in config.out_indices)
        costs.append(Cost(f"stage {i}", parameters, macs, attention))
    total = (sum(getattr(cost, name) for cost in costs) for name in ("parameters", "macs", "attention"))
    return [*costs, Cost("total", *total)]


def _ceil_halves(*sizes: int) -> tuple[int, ...]:
    return tuple(-(-size // 2) for size in sizes)


def _product(sizes: tuple[int, int]) -> int:
    return sizes[0] * sizes[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tic_backbone.complexity", description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("height", type=int, help="of the image, in pixels")
    parser.add_argument("width", type=int)
    args = parser.parse_args()
    for cost in complexity(VARIANTS[args.variant], args.height, args.width):
        million, giga, attention = cost.parameters / 1e6, cost.macs / 1e9, cost.attention / 1e9
        print(f"{cost.name:8} {million:8.2f} M parameters {giga:9.3f} GMACs, {attention:.3f} of them attention")


if __name__ == "__main__":
    main()
