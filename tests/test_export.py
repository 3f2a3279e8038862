"""The exported graph computes what the module does, at sizes that the export never saw."""

import sys

import pytest
import timm
import torch
from conftest import ROOT

import tic_backbone.timm  # noqa: F401
from tic_backbone import TiC

sys.path.append(str(ROOT / "tools"))
import export_onnx

FIELDS = dict(channels=(16,), depths=(2,), head_dim=8, kernel_size=5, out_indices=(0,))  # the second block pools
CONFIG = f"""
custom_imports = dict(imports=["tic_backbone.openmmlab"])
model = dict(type="RetinaNet", backbone=dict(type="TiC", arch={FIELDS}))
"""
SHAPES = ((1, 3, 65, 65), (3, 3, 67, 1001), (1, 3, 1202, 66))


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the command line; gives what it prints, and on an error the message."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["export_onnx.py", *map(str, args)])
        try:
            export_onnx.main()
        except SystemExit as end:
            return str(end)
        return capsys.readouterr().out

    return call


@pytest.mark.heavy
def test_backbone_of_a_config_with_a_detectors_weights(tool, tmp_path):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "config.py").write_text(CONFIG)
    model = TiC(FIELDS).eval()
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": {**state, "bbox_head.bias": torch.zeros(1)}}, tmp_path / "w.pth")
    path = tmp_path / "tic.onnx"
    printed = tool(tmp_path / "config.py", tmp_path / "w.pth", path)
    assert printed.count("deviates by") == len(export_onnx.SHAPES)
    assert all(export_onnx.deviation(model, path, shape) < 1e-4 for shape in SHAPES)
    graph = onnx.load(path).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["images", "stride4"]


@pytest.mark.heavy
def test_timms_classifier(tmp_path):
    pytest.importorskip("onnxruntime")
    model = timm.create_model("tic_nano", num_classes=5, channels=(16,), depths=(1,), kernel_size=3).eval()
    export_onnx.export(model, tmp_path / "tic.onnx", ["logits"])
    assert all(export_onnx.deviation(model, tmp_path / "tic.onnx", shape) < 1e-4 for shape in SHAPES)


def test_missing_packages_are_named_with_the_way_to_get_them(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert "needs onnxscript: " in (error := tool("nano", tmp_path / "x.onnx"))
    assert error.endswith("-m pip install onnxscript") and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", "x.onnx"], "the backbone ResNet, not TiC"),
        (["hugo", "x.onnx"], "cannot read the config hugo"),
        (["nano", "no/folder/x.onnx"], "no folder for no/folder/x.onnx"),
        (["nano", "none.pth", "x.onnx"], "no checkpoint at none.pth"),
    ],
)
def test_bad_input_is_one_line(tool, monkeypatch, args, message):
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: object())
    error = tool(*args)
    assert error.startswith("error: ") and message in error and "\n" not in error
