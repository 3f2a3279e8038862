"""The additions to the training loop, without a training loop."""

import json

import torch
from torch import nn

from tic_backbone.engine import BFloat16OptimWrapper, plot_curves, read_curves


def test_curves_of_a_resumed_run_are_one(tmp_path):
    """Where steps repeat, the later log counts; half a line, as a killed run leaves it, does not matter."""
    train = [{"loss": 3.0, "lr": 1, "iter": 1, "step": 1}, {"loss": 2.0, "lr": 1, "iter": 2, "step": 2}]
    records = [train, [{"loss": 1.5, "iter": 2, "step": 2}, {"coco/AP": 0.1, "mIoU": 40.0, "time": 2.0, "step": 1}]]
    for name, lines in zip("ab", records):
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)) + '\n{"loss": 1.')
    losses, metrics = read_curves([tmp_path / "a", tmp_path / "b"])
    assert losses == {"loss": {1: 3.0, 2: 1.5}} and metrics == {"coco/AP": {1: 0.1}, "mIoU": {1: 40.0}}


def test_plot_needs_no_metrics_yet(tmp_path):
    loss = {"loss": {1: 2.0, 2: 1.0}}
    for losses, metrics in (({}, {}), (loss, {}), (loss, {"AP": {1: 0.5}, "AP_small": {1: -1}})):
        plot_curves(losses, metrics, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "curves.png").unlink()


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights():
    layer = nn.Linear(8, 8)
    wrapper = BFloat16OptimWrapper(optimizer=torch.optim.SGD(layer.parameters(), lr=0.1))
    with wrapper.optim_context(layer):
        out = layer(torch.randn(2, 8))
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.float().square().sum())
    assert layer.weight.dtype == torch.float32 and layer.weight.grad is None
