"""tic_backbone/inspection.py and the command lines over it: against the layers themselves, and fields known exactly."""

import pytest
import torch
from conftest import ROOT, run
from PIL import Image
from torch import nn

from tic_backbone import MSAConv2d
from tic_backbone.inspection import receptive_field, side_of_square, window_weights


@pytest.mark.parametrize(
    "options", [{}, dict(cyclic_shift=3), dict(inter_pool=2, cyclic_shift=2), dict(dilation=2), dict(groups=1)]
)
@pytest.mark.parametrize("at", [(0, 0), (4, 3), (6, 8)])
def test_weights_give_the_layers_own_output(options, at):
    torch.manual_seed(0)
    layer = MSAConv2d(12, 12, (3, 5), **{"groups": 6, **options}).double()
    x = torch.randn(1, 12, 7, 9, dtype=torch.float64)
    weights, tokens, inside = window_weights(layer, x, *at)
    assert weights.shape == (layer.groups, 15) and tokens.shape == (15, 2) and inside.shape == (15,)
    torch.testing.assert_close(weights.sum(1), torch.ones(layer.groups, dtype=torch.float64))
    v = layer.keys_and_values(x)[1][0].unflatten(0, (layer.groups, -1))
    seen = [w[inside] @ head[:, tokens[inside, 0], tokens[inside, 1]].T for w, head in zip(weights, v)]
    out = layer.proj(torch.cat(seen)[None, :, None, None])[0, :, 0, 0]
    torch.testing.assert_close(out, layer(x)[0, :, at[0], at[1]])


def test_field_of_a_convolution_is_its_kernel():
    conv = nn.Conv2d(3, 7, 5, stride=4, padding=2, bias=False)
    nn.init.constant_(conv.weight, 0.1)
    field, place = receptive_field(conv, torch.randn(2, 3, 32, 32))
    assert (field > 0).sum() == 25 and field.sum() == pytest.approx(1)
    assert place == pytest.approx((16.5, 16.5))  # the kernel's centre is pixel 16, as the padding wants it
    assert [side_of_square(field, place, share) for share in (0.01, 0.2, 0.5, 1)] == [1, 3, 5, 5]


def test_square_reaches_over_the_border():
    field = torch.zeros(8, 8)
    field[0, 0] = 1.0
    assert side_of_square(field, (7.5, 0.5), 0.5) == 15


@pytest.fixture
def photos(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "photos").mkdir()
    for i, size in enumerate(((96, 64), (48, 50))):
        pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "notes.txt").write_text("no photo")
    return tmp_path / "photos"


@pytest.mark.heavy
def test_fields_of_all_kinds_of_models_are_measured_and_drawn(photos, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools" / "experiments")
    import contestants

    weights = tmp_path / "plain.weights.pth"
    net = contestants.CONTESTANTS["plain"](3)
    torch.save({"run": dict(contestant="plain", seed=3), "model": net.state_dict()}, weights)
    models = ["configs/tic_retinanet.py", str(weights), "pool a, 2", "swin_tiny_patch4_window7_224", "resnet18"]
    status, out, err = run("tools/erf.py", *models, "--photos", photos, "--size", 64, "--out", tmp_path / "out")
    assert status == 0, err
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == [
        "| tic_retinanet",
        "| plain, trained (seed 3)",
        "| pool a, 2",
        "| swin_tiny_patch4_window7_224",
        "| resnet18",
    ]
    for row in rows:
        sides = [int(cell.strip(" |")) for cell in row[1:]]
        assert sides == sorted(sides) and sides[0] > 0 and sides[-1] <= 128
    assert (tmp_path / "out" / "erf.png").stat().st_size > 5000


@pytest.mark.heavy
def test_attention_is_drawn(photos, tmp_path):
    command = ["tools/attention_map.py", "tic_nano", photos / "0.png", "--at"]
    status, _, err = run(*command, 60, 90, "--layer", 3, "--out", tmp_path / "a.png")
    assert status == 0, err
    assert min(Image.open(tmp_path / "a.png").size) > 200
    status, _, err = run(*command, 64, 90)
    assert status == 1 and "64 90 is outside of the photo of 64 x 96" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("models", "word"),
    [
        (["no_such_net"], "no_such_net"),
        (["none.weights.pth"], "none.weights.pth"),
        (["configs/none.py"], "configs/none.py"),
        (["tic_nano@none.pth"], "none.pth"),
    ],
)
def test_what_is_no_model_is_named(models, word, photos, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import erf

    with pytest.raises(SystemExit, match=f"^error: .*{word}"):
        erf.main([*models, "--photos", str(photos), "--size", "64", "--out", str(tmp_path)])
