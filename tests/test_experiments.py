"""tools/experiments: that contestants differ in the one thing they are named for, and that runs can be trusted."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

from tic_backbone import MSAConv2d

sys.path.insert(0, str(ROOT / "tools" / "experiments"))
import contestants
import run as runner


def test_studies_name_contestants_and_leave_none_out():
    named = [name for names in contestants.STUDIES.values() for name in names]
    assert set(named) == contestants.CONTESTANTS.keys()


@pytest.mark.parametrize("name", contestants.CONTESTANTS)
def test_contestants_are_of_one_size_and_learn_with_every_weight(name):
    torch.manual_seed(0)
    plain, net = contestants.CONTESTANTS["plain"](10), contestants.CONTESTANTS[name](10)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (net, plain)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.05
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_the_form_that_the_package_has_is_the_one_studied():
    forms = []
    for net in (contestants.CONTESTANTS[contestants.TIC](10), contestants.Net(10)):
        layers = [module for module in net.modules() if isinstance(module, MSAConv2d)]
        forms.append([(str(layer), type(layer)) for layer in layers])
    assert forms[0] == forms[1] and len(forms[0]) == 4


def seen_from(layer, size, at):
    """Which tokens of a (size, size) map the output at `at` depends on."""
    x = torch.randn(1, 16, size, size, requires_grad=True)
    layer(x)[0, :, at[0], at[1]].sum().backward()
    return {tuple(t) for t in x.grad[0].abs().sum(0).nonzero().tolist()}


def test_windows_tile_the_map_and_those_of_every_second_block_lie_between():
    square = lambda rows, cols: {(i, j) for i in rows for j in cols}  # noqa: E731
    assert seen_from(contestants.Windows(16, 4, False), 8, (5, 2)) == square(range(4, 8), range(4))
    assert seen_from(contestants.Windows(16, 4, True), 8, (5, 2)) == square(range(2, 6), range(2, 6))
    assert seen_from(contestants.Windows(16, 4, True), 8, (0, 7)) == square(range(2), range(6, 8))
    assert seen_from(contestants.Windows(16, 4, False), 6, (5, 5)) == square(range(4, 6), range(4, 6))
    assert seen_from(contestants.Windows(16, 4, True), 4, (0, 0)) == square(range(4), range(4))


def test_global_attention_sees_everything():
    assert len(seen_from(contestants.Global(16), 7, (3, 0))) == 49


@pytest.fixture
def data(tmp_path):
    """Twenty dark and twenty bright pictures a split, of differing sizes."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, base in (("dark", 0), ("light", 150)):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(20):
                pixels = rng.integers(base, base + 100, (32 + i, 40, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "data"


def job(data, tmp_path, **changes):
    settings = dict(contestant=contestants.TIC, seed=3, data="data", side=32, epochs=3, steps=2, mosaic=1, zoom=1)
    paths = dict(source=str(data), cache=str(tmp_path / "c.npz"), checkpoint=str(tmp_path / "k.pth"), commit="-")
    return {**settings, **paths, "steps": 2, "batch": 8, "lr": 1e-2, **changes}


def test_pictures_are_cropped_and_scaled_once(data, tmp_path):
    read = runner.pictures(data, 32, tmp_path / "c.npz")
    assert read["train_x"].shape == (40, 32, 32, 3) and sorted(set(read["test_y"].tolist())) == [0, 1]
    assert read["test_x"][read["test_y"] == 0].max() < 100 <= 150 <= read["test_x"][read["test_y"] == 1].min()
    for picture in data.rglob("*.png"):
        picture.unlink()
    again = runner.pictures(data, 32, tmp_path / "c.npz")
    assert all(np.array_equal(again[name], read[name]) for name in read)


def test_a_neighbourhood_stays_whole_inside_of_the_map():
    layer = contestants.Neighbourhood(16, 3)
    square = lambda rows, cols: {(i, j) for i in rows for j in cols}  # noqa: E731
    assert seen_from(layer, 8, (4, 5)) == square(range(3, 6), range(4, 7))
    assert seen_from(layer, 8, (0, 7)) == square(range(3), range(5, 8))
    assert seen_from(layer, 2, (0, 1)) == square(range(2), range(2))


def test_diagonals_are_taken_by_turns():
    assert contestants.diagonals(5, 2, 0) == [(-2, -2), (2, 2), (-2, 2), (2, -2), (-2, -2)]
    assert contestants.diagonals(2, 1, 3) == [(1, -1), (-1, -1)]


def test_what_is_no_picture_of_a_class_is_left_out_of_folder_and_zip(data, tmp_path):
    (data / "train" / "labels.txt").write_text("dark light")
    (data / "train" / "dark" / "._0.png").write_text("no picture")
    (data / "readme.png").write_text("no picture")
    for label in ("dark", "light"):  # a class that only training has still counts, for the numbers of the others
        (data / "test" / label).rename(data / "test" / f"{label}r")
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", data)
    for source in (data, Path(packed)):
        read = runner.pictures(source, 8, tmp_path / f"{source.name}.npz")
        assert sorted(set(read["train_y"].tolist())) == [0, 2] and sorted(set(read["test_y"].tolist())) == [1, 3]
        only = runner.pictures(source, 8, tmp_path / f"{source.name}-test.npz", ("test",))
        assert len(read["train_x"]) == 40 and np.array_equal(only["test_y"], read["test_y"])


def test_sources_of_one_name_are_kept_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "set").mkdir(parents=True)
    files = {runner.cache_file(tmp_path, tmp_path / name / "set", 32, "all") for name in ("a", "b")}
    assert len(files) == 2


def test_a_stopped_run_goes_on_to_the_same_end(data, tmp_path, monkeypatch):
    whole = runner.train(job(data, tmp_path, checkpoint=str(tmp_path / "whole.pth")))
    accuracy, calls = runner.accuracy, []

    def stops_at_the_second_epoch(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return accuracy(*args)

    monkeypatch.setattr(runner, "accuracy", stops_at_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        runner.train(job(data, tmp_path))
    assert (tmp_path / "k.pth").exists()
    assert runner.train(job(data, tmp_path))["curve"] == whole["curve"]
    assert len(calls) == 4 and not (tmp_path / "k.pth").exists() and (tmp_path / "k.weights.pth").exists()


def test_seeds_and_contestants_share_the_order_of_pictures(data, tmp_path, monkeypatch):
    seen = {}
    for name, contestant, seed in (("a", "plain", 0), ("b", "k = 5", 0), ("c", "plain", 1)):
        batches = []
        monkeypatch.setattr(runner, "augment", lambda x, _, batches=batches: batches.append(x) or x)
        runner.train(job(data, tmp_path, contestant=contestant, seed=seed, epochs=1))
        seen[name] = torch.cat(batches)
    assert torch.equal(seen["a"], seen["b"]) and not torch.equal(seen["a"], seen["c"])


def test_a_mosaic_has_the_class_of_each_picture_where_the_picture_lies():
    x, y = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 8, 8), torch.arange(8)
    mosaics, classes = runner.task(x, y, 2)
    assert mosaics.shape == (2, 3, 16, 16)
    assert torch.equal(mosaics[1, 0, ::8, ::8], torch.tensor([[4.0, 5], [6, 7]]))
    knows = lambda x: torch.nn.functional.one_hot(x[:, 0, ::4, ::4].long(), 8).permute(0, 3, 1, 2).float()  # noqa: E731
    found, target = runner.scores(knows, mosaics, classes)
    assert len(target) == 2 * 4 * 4 and torch.equal(found.argmax(1), target)
    found, target = runner.scores(knows, *runner.task(x, y, 1))
    assert found.shape == (8, 8) and torch.equal(found.argmax(1), target)


def test_padding_lies_below_and_right_and_does_not_count():
    seen = []

    def knows(x):
        seen.append(x)
        return torch.nn.functional.one_hot(x[:, 0, ::4, ::4].long(), 9).permute(0, 3, 1, 2).float()

    x, y = runner.task(torch.arange(1.0, 9).reshape(8, 1, 1, 1).expand(8, 3, 8, 8), torch.arange(1, 9), 2)
    found, target = runner.scores(knows, x, y, padding=6)
    assert seen[0].shape == (2, 3, 22, 22) and not seen[0][:, :, 16:].any() and not seen[0][:, :, :, 16:].any()
    assert len(target) == 2 * 4 * 4 and torch.equal(found.argmax(1), target)


def attend_to_a_union(layer, x):
    """Union's definition: gather both windows of every query with unfold, then one softmax over them."""
    q, scores, values = layer.q(x), [], []
    n, c, h, w = q.shape
    for ratio, shifts in layer.windows:
        pooled = torch.nn.functional.avg_pool2d(x, ratio, ceil_mode=True, count_include_pad=False)
        parts = []
        for part in layer.kv(pooled).chunk(2, 1):
            heads = zip(part.chunk(layer.groups, 1), shifts)
            part = torch.cat([head.roll((-down, -right), (2, 3)) for head, (down, right) in heads], 1)
            part = torch.nn.functional.unfold(part, 3, padding=1).reshape(n, layer.groups, 16, 9, *pooled.shape[2:])
            parts.append(part.repeat_interleave(ratio, 4).repeat_interleave(ratio, 5)[..., :h, :w])
        scores.append((q.reshape(n, layer.groups, 16, 1, h, w) * parts[0]).sum(2) / 4)
        values.append(parts[1])
    weights = torch.cat(scores, 2).softmax(2)
    return layer.proj((weights[:, :, None] * torch.cat(values, 3)).sum(3).reshape(n, c, h, w))


@pytest.mark.parametrize("windows", [dict(displaced=2, turn=1), dict(pooled=2), dict(displaced=1, turn=3, pooled=2)])
def test_two_windows_share_one_softmax(windows):
    torch.manual_seed(0)
    layer, x = contestants.Union(96, **windows), torch.randn(2, 96, 7, 9, requires_grad=True)
    out, expected = layer(x), attend_to_a_union(layer, x)
    assert torch.allclose(out, expected, atol=1e-5)
    grad, leaves = torch.randn_like(out), [x, *layer.parameters()]
    found, wanted = (torch.autograd.grad(o, leaves, grad) for o in (out, expected))
    assert all(torch.allclose(f, g, atol=1e-4, rtol=1e-4) for f, g in zip(found, wanted))


def test_zoomed_batches_have_whole_tokens_and_keep_what_lies_where():
    generator, sides = torch.Generator().manual_seed(0), set()
    x, y = runner.task(torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 32, 32), torch.arange(8), 2)
    for _ in range(60):
        zoomed = runner.zoomed(x, 2, 2, generator)
        sides.add(zoomed.shape[2])
        middles = zoomed[:, 0, zoomed.shape[2] // 4 :: zoomed.shape[2] // 2][
            ..., zoomed.shape[3] // 4 :: zoomed.shape[3] // 2
        ]
        assert torch.equal(middles, y.float())
    assert sides == {32, 48, 64, 80, 96, 112, 128}
    assert runner.zoomed(x, 1, 2, generator) is x


def test_crops_hold_the_picture_and_zeros():
    x = torch.ones(64, 1, 16, 16)
    crops = runner.augment(x, torch.Generator().manual_seed(0))
    assert crops.shape == x.shape and set(crops.unique().tolist()) == {0, 1}
    assert all(crop.sum() >= 14 * 14 for crop in crops) and len({crop.sum().item() for crop in crops}) > 3


@pytest.mark.heavy
def test_command_keeps_one_line_a_run_and_runs_nothing_twice(data, tmp_path):
    command = ["tools/experiments/run.py", "ablation", "--data", data, "--out", tmp_path / "r.jsonl"]
    command += ["--only", "plain", "k = 5", "--seeds", 0, 1, "--epochs", 1, "--steps", 1, "--batch", 4]
    for _ in range(2):
        status, _, err = run(*command)
        assert status == 0, err
        lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
        runs = [(line["contestant"], line["seed"]) for line in lines]
        assert runs == [("plain", 0), ("k = 5", 0), ("plain", 1), ("k = 5", 1)]
    status, _, err = run("tools/experiments/report.py", tmp_path / "r.jsonl", "--out", tmp_path / "report")
    assert status == 0, err
    assert "| plain | 2 |" in (tmp_path / "report" / "ablation.md").read_text()
    assert (tmp_path / "report" / "ablation-1.png").stat().st_size > 1000


@pytest.mark.heavy
def test_at_its_own_size_a_network_scores_what_it_did_after_training(data, tmp_path):
    finals = {}
    for mosaic in (1, 2):
        checkpoint = str(tmp_path / f"{mosaic}.pth")
        trained = runner.train(job(data, tmp_path, mosaic=mosaic, epochs=1, checkpoint=checkpoint))
        finals[mosaic] = trained["final"]
    weights = [tmp_path / f"{mosaic}.weights.pth" for mosaic in (1, 2)]
    command = ["tools/experiments/resolution.py", *weights, "--data", data, "--out", tmp_path / "r.jsonl"]
    command += ["--scales", 0.5, 1, "--pads", 0.25]
    status, out, err = run(*command)
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {line["mosaic"]: line["accuracy"] for line in lines if line["scale"] == 1 and not line["pad"]} == finals
    assert sorted((line["scale"], line["pad"]) for line in lines) == [
        (0.5, 0),
        (0.5, 0),
        (1, 0),
        (1, 0),
        (1, 0.25),
        (1, 0.25),
    ]
    assert all(0 <= line["changed"] <= 1 for line in lines if line["pad"])
    assert out.count(f"| {contestants.TIC} | ") == 4
    assert run(*command)[1] == out and len((tmp_path / "r.jsonl").read_text().splitlines()) == 6
    status, _, err = run("tools/experiments/report.py", tmp_path / "r.jsonl", "--out", tmp_path / "report")
    assert status == 0, err
    assert (tmp_path / "report" / "resolution.md").read_text().count(f"| {contestants.TIC} | ") == 4
    assert (tmp_path / "report" / "resolution.png").stat().st_size > 1000


@pytest.mark.heavy
def test_missing_data_is_named(tmp_path):
    (tmp_path / "bad.zip").write_text("no zip")
    status, _, err = run("tools/experiments/run.py", "ablation", "--data", tmp_path / "bad.zip")
    assert status != 0 and "neither a folder nor a zip" in err and "Traceback" not in err
    status, _, err = run("tools/experiments/run.py", "ablation", "--data", tmp_path / "nowhere")
    assert status != 0 and "nowhere" in err and "Traceback" not in err


def test_tables_of_the_docs_are_made_of_the_committed_lines():
    import report

    folder, known = ROOT / "docs" / "evidence", set()
    runs = [SimpleNamespace(**json.loads(line)) for line in (folder / "results.jsonl").read_text().splitlines()]
    for study in contestants.STUDIES:
        for _, found, _ in report.comparisons(study, runs):
            known.update(report.table(found).splitlines())
    sizes = [json.loads(line) for line in (folder / "resolution.jsonl").read_text().splitlines()]
    known.update(report.resolution(sizes).splitlines())
    known.update((folder / "erf.md").read_text().splitlines())
    lines = (ROOT / "docs" / "evidence.md").read_text().splitlines()
    shown = {line for line in lines if line[2:].split(" | ")[0] in contestants.CONTESTANTS}
    wrong = shown - known
    assert len(shown) > 30 and not wrong


def test_report_compares_in_pairs_of_seeds():
    import report

    lines = [
        dict(contestant=name, seed=seed, final=final, parameters=10, seconds=60)
        for name, finals in (("plain", (0.5, 0.6, 0.7)), ("better", (0.52, 0.63, 0.71)))
        for seed, final in enumerate(finals)
    ]
    rows = {row.name: row for row in report.rows([SimpleNamespace(**line) for line in lines])}
    assert rows["better"].difference == pytest.approx(2.0)
    assert rows["better"].p == pytest.approx(0.0742, abs=1e-3)  # t = 2 / (1 / sqrt(3)) with 2 degrees of freedom
    assert rows["plain"].difference is None and rows["plain"].deviation == pytest.approx(10)
