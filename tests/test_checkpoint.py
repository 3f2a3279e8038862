"""Weights are read without running code and loaded without silence."""

import pickle

import pytest
import torch

from tic_backbone import TiC
from tic_backbone.checkpoint import load_weights, read_checkpoint, strip_prefix

SMALL = dict(channels=(16, 32), depths=(1, 1), head_dim=16, kernel_size=3, out_indices=(0, 1))


@pytest.fixture
def model():
    return TiC(SMALL)


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_round_trip(model, tmp_path, key):
    state = model.state_dict()
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "w.pth")
    other = TiC(SMALL)
    report = load_weights(other, read_checkpoint(tmp_path / "w.pth"))
    assert report.matched == 1 and len(report.loaded) == len(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_report_names_everything_that_does_not_match(model):
    weights = dict(model.state_dict())
    del weights["norms.0.bias"]
    weights["norms.1.weight"] = torch.zeros(3)
    weights["head.weight"] = torch.zeros(3)
    report = load_weights(model, weights)
    assert (report.missing, report.mismatched) == (("norms.0.bias",), ("norms.1.weight",))
    assert report.unexpected == ("head.weight",)
    assert all(name in str(report) for name in ("norms.0.bias", "norms.1.weight", "head.weight"))


def test_too_little_is_refused_and_changes_nothing(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    large = sorted(before, key=lambda name: before[name].numel())[-5:]  # few tensors, but most of the weights
    weights = {name: torch.ones_like(value) for name, value in before.items() if name not in large}
    with pytest.raises(ValueError, match="at least 90% must match"):
        load_weights(model, weights)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load_weights(model, weights, min_matched=0.1)


def test_prefix():
    weights = {"backbone.a": torch.zeros(1), "head.b": torch.zeros(1), "backbone2.c": torch.zeros(1)}
    assert list(strip_prefix(weights, "backbone.")) == list(strip_prefix(weights, "backbone")) == ["a"]
    with pytest.raises(ValueError, match="'neck.'.*'backbone', 'backbone2', 'head'"):
        strip_prefix(weights, "neck")


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("content", [Code(), [1, 2], {"a": 1}])
def test_anything_but_tensors_is_refused(tmp_path, capsys, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth"):
        read_checkpoint(tmp_path / "w.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"a": 1})])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pth"):
        read_checkpoint(tmp_path / "w.pth")


def test_truncated_file_is_refused(model, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"w\.pth"):
        read_checkpoint(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        read_checkpoint(tmp_path / "none.pth")
