"""tools/prepare_trees.py, on a tiny wheel made here: no network, and never the real wheel."""

import hashlib
import io
import json
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "tools"))  # where its script would find what it imports

import prepare_trees as trees

TILE, STRIDE = 20, 10
SIZES = dict(zip(trees.SPLIT_PHOTOS + trees.TEST_PHOTOS, [(93, 101), (45, 41), (20, 20), (20, 20)]))
VOC_BOX = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def voc(boxes):
    """VOC file of (label, xmin, ymin, xmax, ymax), px from 1, ends included."""
    return "<annotation>" + "".join(VOC_BOX.format(*box) for box in boxes) + "</annotation>"


def write_wheel(path, skip=""):
    """A zip laid out as the real wheel: noise photos (no two crops are alike) and small random boxes."""
    rng = random.Random(0)
    with zipfile.ZipFile(path, "w") as archive:
        for seed, (name, (width, height)) in enumerate(SIZES.items()):
            noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
            png = io.BytesIO()
            Image.fromarray(noise).save(png, "png")
            corners = [(rng.randint(1, width), rng.randint(1, height)) for _ in range(width)]
            boxes = [("Dead", x, y, x + rng.randint(1, 6), y + 4) for x, y in corners]
            for member, content in ((f"{name}.png", png.getvalue()), (f"{name}.xml", voc(boxes))):
                if member != skip:
                    archive.writestr(f"{trees.DATA}/{member}", content)
    return path


def read_photos(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return trees.read_photos(archive)


def trust(monkeypatch, wheel):
    monkeypatch.setattr(trees, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A good wheel in a folder of its own, with tiles to its scale."""
    monkeypatch.setattr(trees, "TILE", TILE)
    monkeypatch.setattr(trees, "STRIDE", STRIDE)
    (tmp_path / "wheel").mkdir()
    path = write_wheel(tmp_path / "wheel" / "tiny.whl")
    trust(monkeypatch, path)
    return path


@pytest.fixture
def out(tmp_path):
    """Where the dataset is to appear: alone in its parent, so that anything left behind is seen."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "trees"


def run(out, wheel):
    return trees.main(["--out", str(out), "--wheel", str(wheel)])


def load(out, split):
    return json.loads((out / "annotations" / f"{split}.json").read_text())


def state(folder):
    """Every file with its time of change and content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def ground(image):
    """(photo, its region) of a picture, from its name and size alone."""
    photo, x, y = re.fullmatch(r"(\w+)_x(\d+)_y(\d+)\.png", image["file_name"]).groups()
    return photo, (int(x), int(y), int(x) + image["width"], int(y) + image["height"])


def cover(regions, width, height):
    """How often each px of a photo lies in one of `regions`."""
    count = np.zeros((height, width), int)
    for left, top, right, bottom in regions:
        count[top:bottom, left:right] += 1
    return count


def assert_refused(capsys, out, *words):
    """One readable line on stderr with `words`, and nothing at or beside `out`."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("size", [(45, 33), (40, 40), (20, 20), (13, 50), (21, 19)])
def test_tiles_are_full_size_and_cover_the_region(size):
    width, height = size
    tiles = trees.tiles((7, 5, 7 + width, 5 + height), TILE, STRIDE)
    assert len(set(tiles)) == len(tiles)
    assert {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in tiles} == {(min(TILE, width), min(TILE, height))}
    count = cover(tiles, 7 + width + 9, 5 + height + 9)
    assert count[5 : 5 + height, 7 : 7 + width].all()
    assert count.sum() == count[5 : 5 + height, 7 : 7 + width].sum()


def test_a_row_of_tiles_keeps_its_stride_and_ends_flush():
    assert [tile[0] for tile in trees.tiles((0, 0, 45, 20), TILE, STRIDE)] == [0, 10, 20, 25]
    assert [tile[0] for tile in trees.tiles((0, 0, 40, 20), TILE, STRIDE)] == [0, 10, 20]


@pytest.mark.parametrize("size", [(45, 33), (40, 40), (20, 20), (13, 50), (21, 19)])
def test_cells_cover_the_region_exactly_once(size):
    width, height = size
    cells = trees.cells((7, 5, 7 + width, 5 + height), TILE)
    count = cover(cells, 7 + width + 9, 5 + height + 9)
    assert (count[5 : 5 + height, 7 : 7 + width] == 1).all() and count.sum() == width * height
    for first, end in ((0, 2), (1, 3)):
        sides = {cell[end] - cell[first] for cell in cells}
        assert max(sides) <= TILE and max(sides) - min(sides) <= 1


def test_regions_of_the_real_photos():
    name = trees.SPLIT_PHOTOS[1]
    assert trees.split_regions(name, 1249, 1035) == {"train": (0, 0, 1249, 776), "val": (0, 776, 1249, 1035)}
    assert trees.split_regions("SOAP_061", 400, 400) == {"test": (0, 0, 400, 400)}


def test_boxes_are_clipped_and_become_crowd_below_half():
    tile = (100, 200, 120, 220)
    cases = {
        (105, 205, 110, 215): ((5, 5, 10, 15), False),  # inside
        (90, 205, 110, 215): ((0, 5, 10, 15), False),  # exactly half of the area
        (89, 205, 110, 215): ((0, 5, 10, 15), True),  # a px more outside
        (110, 210, 125, 225): ((10, 10, 20, 20), True),  # two thirds of either side are 4/9 of the area
        (119, 205, 130, 215): ((19, 5, 20, 15), True),  # one px column
        (90, 190, 130, 230): ((0, 0, 20, 20), True),  # larger than the tile
    }
    assert trees.boxes_in_tile(list(cases), tile) == list(cases.values())
    unseen = [(120, 205, 130, 215), (90, 190, 100, 200), (119.5, 205, 130, 215)]
    assert trees.boxes_in_tile(unseen, tile) == []


def test_voc_boxes_are_half_open_sane_and_within_the_photo():
    xml = voc(
        [
            ("Tree", 1, 1, 30, 20),
            ("Alive", 5, 6, 5, 6),
            ("Dead", 9, 8, 3, 4),
            ("Tree", -4, 0, 99, 7),
            ("Tree", 31, 3, 40, 9),
        ]
    )
    assert trees.read_voc(xml.encode(), 30, 20) == [(0, 0, 30, 20), (4, 5, 5, 6), (2, 3, 9, 8), (0, 0, 30, 7)]


def test_train_and_val_share_no_ground_and_leave_none_out(wheel, out):
    assert run(out, wheel) == 0
    regions = {(split, photo): [] for split in trees.SPLITS for photo in SIZES}
    for split in trees.SPLITS:
        for image in load(out, split)["images"]:
            photo, region = ground(image)
            regions[split, photo].append(region)
    for photo, size in SIZES.items():
        train, val, test = (cover(regions[split, photo], *size) for split in trees.SPLITS)
        assert ((train > 0) ^ (val == 1) ^ (test == 1)).all() and not ((train > 0) & (val > 0)).any()
        assert test.all() == (photo in trees.TEST_PHOTOS)
        if photo in trees.SPLIT_PHOTOS:
            rows = val.all(axis=1)
            assert rows[-1] and abs(rows.sum() - len(rows) / 4) < 1
            assert {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in regions["train", photo]} == {(TILE, TILE)}


def test_pictures_are_the_crops_that_their_names_say(wheel, out):
    assert run(out, wheel) == 0
    photos = {photo.name: photo.image for photo in read_photos(wheel)}
    for split in trees.SPLITS:
        images = load(out, split)["images"]
        names = [image["file_name"] for image in images]
        assert sorted(names) == sorted(path.name for path in (out / split).iterdir())
        for image in images:
            photo, region = ground(image)
            with Image.open(out / split / image["file_name"]) as picture:
                assert np.array_equal(picture, photos[photo].crop(region))


def test_annotations_are_coco_and_inside_their_pictures(wheel, out):
    assert run(out, wheel) == 0
    for split in trees.SPLITS:
        coco = load(out, split)
        assert coco["categories"] == [{"id": 1, "name": "Tree"}]
        assert {"source", "licence", "tile", "stride"} <= coco["info"].keys()
        images = {image["id"]: image for image in coco["images"]}
        assert len(images) == len(coco["images"])
        assert len({annotation["id"] for annotation in coco["annotations"]}) == len(coco["annotations"]) > 0
        for annotation in coco["annotations"]:
            x, y, width, height = annotation["bbox"]
            image = images[annotation["image_id"]]
            assert x >= 0 and y >= 0 and width >= 1 and height >= 1
            assert x + width <= image["width"] and y + height <= image["height"]
            assert annotation["area"] == width * height and annotation["iscrowd"] in (0, 1)
            assert annotation["category_id"] == 1


def test_val_counts_each_crown_about_once(wheel, out):
    assert run(out, wheel) == 0
    centres = 0
    for photo in read_photos(wheel):
        border = trees.split_regions(photo.name, *photo.image.size).get("val", (0, 10**6))[1]
        centres += sum((top + bottom) / 2 >= border for _, top, _, bottom in photo.boxes)
    boxes = sum(not annotation["iscrowd"] for annotation in load(out, "val")["annotations"])
    assert centres > 20 and boxes == pytest.approx(centres, rel=0.2)


def test_empty_tiles_are_kept(wheel, out, monkeypatch):
    monkeypatch.setattr(trees, "read_voc", lambda xml, width, height: [])
    assert run(out, wheel) == 0
    assert load(out, "train")["annotations"] == [] and len(load(out, "train")["images"]) > 50


def test_a_rerun_changes_nothing_and_needs_no_wheel(wheel, out, capsys):
    assert run(out, wheel) == 0
    before = state(out)
    wheel.unlink()
    capsys.readouterr()
    assert run(out, wheel) == 0
    assert state(out) == before and [path.name for path in out.parent.iterdir()] == [out.name]
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("damaged", ["train/*.png", "annotations/val.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_damaged_dataset_is_rebuilt(wheel, out, damaged, damage):
    assert run(out, wheel) == 0
    before = state(out)
    damage(next(out.glob(damaged)))
    assert run(out, wheel) == 0
    assert {path: content for path, (_, content) in state(out).items()} == {
        path: content for path, (_, content) in before.items()
    }
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_other_tile_parameters_rebuild(wheel, out, monkeypatch):
    assert run(out, wheel) == 0
    count = len(load(out, "train")["images"])
    monkeypatch.setattr(trees, "STRIDE", TILE)
    assert run(out, wheel) == 0
    assert len(load(out, "train")["images"]) == len(list((out / "train").iterdir())) < count


@pytest.mark.parametrize("name", ["thesis.txt", "manifest.json", "train/photo.png"])
def test_a_foreign_folder_is_refused_and_left_untouched(wheel, out, capsys, name):
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text('{"years of": "work"}')
    before = state(out.parent)
    assert run(out, wheel.with_name("none.whl")) == 1
    assert state(out.parent) == before
    assert str(out) in capsys.readouterr().err  # said before any wheel is fetched or read


def test_a_file_that_arrives_during_the_run_survives(wheel, out, monkeypatch):
    write_dataset = trees.write_dataset

    def write_meanwhile(photos, folder):
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        return write_dataset(photos, folder)

    monkeypatch.setattr(trees, "write_dataset", write_meanwhile)
    assert run(out, wheel) == 1
    assert [path.name for path in out.parent.rglob("*")] == [out.name, "thesis.txt"]


@pytest.mark.parametrize("name", ["notes.txt", "train/model.pth", "train/mine.png", "annotations/mine.json"])
def test_a_dataset_of_ours_with_a_foreign_file_is_refused(wheel, out, capsys, name):
    assert run(out, wheel) == 0
    (out / name).write_text("mine")
    next(out.glob("val/*.png")).unlink()
    before = state(out.parent)
    assert run(out, wheel) == 1
    assert state(out.parent) == before
    assert name in capsys.readouterr().err


def test_a_file_in_the_way_is_refused_and_an_empty_folder_is_used(wheel, out):
    out.write_text("mine")
    assert run(out, wheel) == 1 and out.read_text() == "mine"
    out.unlink()
    out.mkdir()
    assert run(out, wheel) == 0 and load(out, "test")["images"]


def test_a_truncated_wheel_fails_by_its_checksum(wheel, out, capsys):
    got = wheel.read_bytes()[:-1000]
    wheel.write_bytes(got)
    assert run(out, wheel) == 1
    checksums = trees.WHEEL_SHA256, hashlib.sha256(got).hexdigest()
    assert_refused(capsys, out, str(wheel), *checksums, "pip download")


def test_a_bad_zip_is_one_line(wheel, out, capsys, monkeypatch):
    wheel.write_bytes(wheel.read_bytes()[:-1000])
    trust(monkeypatch, wheel)
    assert run(out, wheel) == 1
    assert_refused(capsys, out, str(wheel))


def test_a_missing_member_is_named(wheel, out, capsys, monkeypatch):
    write_wheel(wheel, skip="SOAP_061.xml")
    trust(monkeypatch, wheel)
    assert run(out, wheel) == 1
    assert_refused(capsys, out, str(wheel), "SOAP_061.xml")


def test_a_missing_wheel_is_one_line(wheel, out, capsys):
    assert run(out, wheel.with_name("none.whl")) == 1
    assert_refused(capsys, out, "none.whl")


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [(OSError(28, "No space left on device"), 1, "No space left"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_a_run_cut_short_leaves_nothing(wheel, out, capsys, monkeypatch, error, code, word):
    save, saved = Image.Image.save, []

    def save_five(image, path):
        if len(saved) == 5:
            raise error
        saved.append(path)
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", save_five)
    assert run(out, wheel) == code
    assert len(saved) == 5 and out.parent in saved[0].parents
    assert_refused(capsys, out, word)


def test_pip_fetches_the_wheel_without_installing_it(wheel, out, monkeypatch):
    def fake_pip(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        Path(command[command.index("--dest") + 1], "tiny.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake_pip)
    assert trees.main(["--out", str(out)]) == 0
    assert load(out, "test")["images"]


def test_a_failing_pip_shows_its_last_line(out, capsys, monkeypatch):
    pip = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pip)
    assert trees.main(["--out", str(out)]) == 1
    assert_refused(capsys, out, "ERROR: No matching distribution found", "--wheel")
