"""The formula against the network that is built, and against torch's own count of what it runs."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tic_backbone import VARIANTS, TiC, TiCConfig
from tic_backbone.complexity import complexity

CONFIGS = {
    **VARIANTS,
    "odd": TiCConfig(channels=(16, 48), depths=(3, 2), head_dim=8, mlp_ratio=2.7, in_channels=5, out_indices=(0, 1)),
    "plain": TiCConfig(channels=(32, 64), depths=(1, 3), cyclic_shift=False, inter_pool=False, out_indices=(1,)),
    "cut": TiCConfig(channels=(16, 32, 64), depths=(1, 2, 1), head_dim=16, out_indices=(1,)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_every_part(name):
    with torch.device("meta"):
        model = TiC(CONFIGS[name])
    parts = [model.stem, *model.stages]
    expected = [sum(p.numel() for p in part.parameters()) for part in parts]
    for i in model.config.out_indices:
        expected[i + 1] += sum(p.numel() for p in model.norms[str(i)].parameters())
    assert [cost.parameters for cost in complexity(model.config, 64, 64)] == [*expected, sum(expected)]


@pytest.mark.parametrize("size", [(64, 64), (101, 39), (224, 223)])
@pytest.mark.parametrize("name", ["nano", "odd", "plain", "cut"])
def test_everything_but_attention_is_what_torch_counts(name, size):
    """Part by part. torch counts two operations where we count one multiply-accumulate."""
    model = TiC(CONFIGS[name], backend="reference")  # whose attention the counter does not see
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, model.config.in_channels, *size))
    *parts, total = complexity(model.config, *size)
    modules = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    for cost, pattern in zip(parts, (r"TiC\.stem", *(rf"TiC\.stages\.{i}\.\d+" for i in range(len(parts))))):
        counted = sum(count for name, count in modules.items() if re.fullmatch(pattern, name))
        assert counted == 2 * (cost.macs - cost.attention)
    assert counter.get_total_flops() == 2 * (total.macs - total.attention)


def test_attention_costs_two_products_for_every_key_of_every_window():
    config = TiCConfig(channels=(16, 32), depths=(3, 1), head_dim=8, kernel_size=5, out_indices=(1,))
    costs = complexity(config, 64, 36)
    assert [cost.attention for cost in costs[1:3]] == [3 * (16 * 9) * 25 * 2 * 16, (8 * 5) * 25 * 2 * 32]


def test_cost_is_linear_in_the_pixels():
    small, large = (complexity(VARIANTS["tiny"], side, side)[-1] for side in (256, 1024))
    assert large.macs == 16 * small.macs and large.parameters == small.parameters
