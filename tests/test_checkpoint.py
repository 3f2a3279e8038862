"""Weights are read without running code, loaded without silence, and taken over from Swin Transformers."""

import pickle
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmdet.models.backbones.swin import SwinTransformer, swin_converter
from mmengine.logging import HistoryBuffer
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from torch import nn

from tic_backbone import TiC
from tic_backbone.checkpoint import from_swin, load_weights, read_checkpoint, strip_prefix, write_checkpoint
from tic_backbone.openmmlab import read_mm_checkpoint

sys.path.append(str(ROOT / "tools"))
import convert_checkpoint

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
    with pytest.raises(ValueError, match=r"'neck\.'.*'backbone', 'backbone2', 'head'"):
        strip_prefix(weights, "neck")


@pytest.mark.parametrize("core", ["core", "_core"])
def test_arrays_of_either_numpy_are_read(tmp_path, core):
    """Log history holds scalars and arrays, whose module numpy 2 renamed."""
    state = {"state_dict": {"a": torch.ones(1)}, "message_hub": [np.float64(0.5), np.arange(3.0)]}
    torch.save(state, tmp_path / "w.pth")
    written = zipfile.ZipFile(tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in written.namelist():
            old.writestr(name, written.read(name).replace(b"numpy._core.", f"numpy.{core}.".encode()))
    assert read_mm_checkpoint(str(tmp_path / "old.pth")).keys() == {"a"}


def test_what_a_file_may_not_name_is_named(tmp_path):
    torch.save({"state_dict": {}, "meta": Path("a")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"pathlib\.\w*Path"):
        read_checkpoint(tmp_path / "w.pth")


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("content", [Code(), [1, 2], {"a": 1}])
def test_anything_but_tensors_is_refused(tmp_path, capsys, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth"):
        read_checkpoint(tmp_path / "w.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"a": 1})])
def test_other_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_truncated_file_is_refused(model, tmp_path, name):
    path = tmp_path / name
    write_checkpoint(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=name):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_written_weights_are_the_models(model, tmp_path, name):
    """Also those that lie channels-last in memory, or are views of one tensor; and no more than them."""
    both = torch.randn(1000, 4)
    state = {**model.state_dict(), "first": both[:1], "second": both[1:2], "half": both[0].half()}
    write_checkpoint(state, tmp_path / name)
    read = read_checkpoint(tmp_path / name)
    assert read.keys() == state.keys()
    assert all(torch.equal(value, read[key]) and value.dtype == read[key].dtype for key, value in state.items())
    assert (tmp_path / name).stat().st_size < 2 * sum(value.nbytes for value in state.values())


def test_weights_are_not_written_under_other_names(model, tmp_path):
    with pytest.raises(ValueError, match=r"w\.onnx"):
        write_checkpoint(model.state_dict(), tmp_path / "w.onnx")


def test_without_safetensors_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(ValueError, match=r"w\.safetensors needs .* pip install safetensors"):
        read_checkpoint(tmp_path / "w.safetensors")


@pytest.fixture
def web(tmp_path, monkeypatch):
    """torch.hub with a cache of its own, and a web where the weight called "a" is the address's length."""
    fetched = []

    def fetch(address, path):
        if "404" in address:
            raise OSError("404")
        fetched.append(address)
        write_checkpoint({"a": torch.tensor(len(address))}, path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    return fetched


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model.pth?download=true"])
def test_addresses_are_fetched_once_each(web, name):
    addresses = [f"https://example.org/{folder}/{name}" for folder in ("a", "bc", "def")]
    for _ in range(2):
        assert [read_checkpoint(a)["a"] for a in addresses] == [len(a) for a in addresses]
    assert web == addresses


def test_address_that_fails_is_named(web):
    with pytest.raises(ValueError, match=r"https://example\.org/404/w\.pth"):
        read_checkpoint("https://example.org/404/w.pth")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        read_checkpoint(tmp_path / "none.pth")


# Swin Transformers. One network with random numbers everywhere, under the names of each layout.

CHANNELS, DEPTHS, HEADS = (64, 128, 256, 512), (1, 2, 1, 1), (8, 16, 32, 64)


@pytest.fixture(scope="module")
def timm_swin():
    torch.manual_seed(0)
    model = TimmSwin(img_size=128, embed_dim=64, depths=DEPTHS, num_heads=HEADS, window_size=4, num_classes=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


def original(timm_weights):
    """Downsampling at the end of a stage, a bare head."""
    names = {f"layers.{i}.downsample": f"layers.{i - 1}.downsample" for i in range(1, 4)} | {"head.fc": "head"}
    return {re.sub("|".join(names), lambda m: names[m[0]], name): value for name, value in timm_weights.items()}


def openmmlab(timm_weights):
    """By mmdet's own converter, which adds ``backbone.``, with one more output norm."""
    weights = dict(swin_converter(original(timm_weights)))
    weights["backbone.norm3.weight"] = weights.pop("backbone.norm.weight")
    weights["backbone.norm3.bias"] = weights.pop("backbone.norm.bias")
    return weights


def test_layouts_agree(timm_swin):
    weights = timm_swin.state_dict()
    tic, left = from_swin(weights)
    assert all(name.endswith("relative_position_bias_table") for name in left) and tic["head.fc.weight"].shape == (
        7,
        512,
    )
    features = {name.replace("layers.", "layers_"): value for name, value in weights.items() if "head" not in name}
    wrapped = {f"model.{name}": value for name, value in weights.items()}
    for other in (original(weights), openmmlab(weights), features, wrapped, {"model.x": left, **wrapped}):
        same, _ = from_swin(other)
        assert {*tic} - {*same} <= {"head.fc.weight", "head.fc.bias"}
        for name, value in same.items():
            torch.testing.assert_close(value, tic[name])


def test_what_swin_gives_to_tic(timm_swin):
    """All that a backbone has; the heads of a detector stay out."""
    tic, left = from_swin({**openmmlab(timm_swin.state_dict()), "bbox_head.fc.weight": torch.zeros(1)})
    report = load_weights(TiC(dict(channels=CHANNELS, depths=DEPTHS, head_dim=8), out_indices=(3,)), tic)
    assert report.matched == 1 and not report.unexpected and "bbox_head.fc.weight" in left


def close(got, expected):
    torch.testing.assert_close(got.permute(0, 2, 3, 1), expected, rtol=1e-4, atol=1e-3)


def mm_swin(weights):
    model = SwinTransformer(embed_dims=64, depths=DEPTHS, num_heads=HEADS, window_size=4, out_indices=(3,))
    report = load_weights(model, strip_prefix(weights, "backbone."), min_matched=0)
    assert not report.unexpected + report.mismatched
    model.eval()
    return model


@pytest.mark.parametrize("layout", ["timm", "openmmlab"])
def test_layers_compute_what_swins_do(timm_swin, layout):
    """On random tokens; downsampling on tokens that a norm over one sees as a norm over four does."""
    weights = timm_swin.state_dict()
    tic, _ = from_swin(weights if layout == "timm" else openmmlab(weights))
    model = TiC(dict(channels=CHANNELS, depths=DEPTHS, head_dim=8), out_indices=(3,)).eval()
    load_weights(model, tic)
    swin = timm_swin if layout == "timm" else mm_swin(openmmlab(weights))
    images = torch.randn(2, 3, 128, 128)
    patches = timm_swin.patch_embed(images)
    assert (model.stem(images).permute(0, 2, 3, 1) - patches).norm() < 0.05 * patches.norm()
    for i, c in enumerate(CHANNELS):
        tokens = torch.randn(2, 4, 6, c)
        for block, other in zip(model.stages[i][1:], (swin.layers if layout == "timm" else swin.stages)[i].blocks):
            x, attn = tokens.permute(0, 3, 1, 2), other.attn if layout == "timm" else other.attn.w_msa
            close(torch.cat([block.attn.q(x), block.attn.kv(x)], 1), attn.qkv(tokens))
            close(block.attn.proj(x), attn.proj(tokens))
            close(block.norm1(x), other.norm1(tokens))
            assert torch.equal(block.pos(x), x)
            mlp = other.mlp if layout == "timm" else lambda t, ffn=other.ffn: ffn(t) - t
            close(block.mlp(block.norm2(x)), mlp(other.norm2(tokens)))
        tokens = nn.functional.layer_norm(tokens, (c,))
        if i < 3 and layout == "timm":
            close(model.stages[i + 1][0](tokens.permute(0, 3, 1, 2)), swin.layers[i + 1].downsample(tokens))
        elif i < 3:
            merged, size = swin.stages[i].downsample(tokens.flatten(1, 2), (4, 6))
            close(model.stages[i + 1][0](tokens.permute(0, 3, 1, 2)), merged.unflatten(1, size))
    norm = swin.norm if layout == "timm" else swin.norm3
    close(model.norms["3"](tokens.permute(0, 3, 1, 2)), norm(tokens))


def test_narrow_stem_takes_the_norm_alone():
    """Its channels cannot hold the pixels: that is told, and what is missing stays TiC's own."""
    fields = dict(depths=(1, 1), num_classes=0)
    tic, left = from_swin(TimmSwin(img_size=64, embed_dim=16, num_heads=(2, 4), window_size=4, **fields).state_dict())
    report = load_weights(TiC(dict(channels=(16, 32), depths=(1, 1), head_dim=8, out_indices=(1,))), tic, min_matched=0)
    assert {name.rpartition(".")[0] for name in report.missing} == {"stem.0", "stem.1", "stem.3"}
    assert {"patch_embed.proj.weight", "patch_embed.proj.bias"} < {*left} and not report.unexpected + report.mismatched


def test_other_transformers_are_refused(timm_swin):
    weights = timm_swin.state_dict()
    version2 = {name: value for name, value in weights.items() if "relative_position_bias_table" not in name}
    two = {f"{part}.{name}": value for part in ("teacher", "student") for name, value in weights.items()}
    for others in (version2, two, {"patch_embed.proj.weight": torch.zeros(1)}):
        with pytest.raises(ValueError, match="one Swin Transformer"):
            from_swin(others)


# tools/convert_checkpoint.py


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the command line; gives what it prints, and on an error the message."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, args)])
        try:
            convert_checkpoint.main()
        except SystemExit as end:
            return str(end)
        return capsys.readouterr().out

    return call


def test_convert_takes_a_backbone_out_of_a_training_state(convert, model, tmp_path):
    weights = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    content = {"state_dict": {**weights, "head.weight": torch.zeros(2)}, "message_hub": HistoryBuffer([1.0], [1])}
    torch.save(content, tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    assert f"{len(weights)} tensors" in convert(tmp_path / "in.pth", out, "--prefix", "backbone.")
    assert load_weights(TiC(SMALL), read_checkpoint(out)).matched == 1
    error = convert(out, tmp_path / "tic.pth", "--from", "swin")
    assert error.startswith("error: need the weights of one Swin") and not (tmp_path / "tic.pth").exists()


def test_convert_tells_what_has_no_place(convert, timm_swin, tmp_path):
    torch.save({"model": timm_swin.state_dict()}, tmp_path / "swin.pth")
    printed = convert(tmp_path / "swin.pth", tmp_path / "tic.safetensors", "--from", "swin")
    assert printed.endswith("5 tensors have no place in TiC: layers.*.blocks.*.attn.relative_position_bias_table\n")
    read, (expected, _) = read_checkpoint(tmp_path / "tic.safetensors"), from_swin(timm_swin.state_dict())
    assert read.keys() == expected.keys() and all(torch.equal(read[name], value) for name, value in expected.items())
