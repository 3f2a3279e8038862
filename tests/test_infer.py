"""tools/infer.py in this process, on models of random weights; and what becomes of predictions in tiles."""

import importlib.util
import json
import re

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from PIL import Image
from pycocotools.mask import decode

from tic_backbone import inference
from tic_backbone.checkpoint import write_checkpoint
from tic_backbone.inference import dataset_meta, tiles

SPEC = importlib.util.spec_from_file_location("infer", ROOT / "tools" / "infer.py")
infer = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(infer)

NANO = {"model.backbone.arch": "nano", "model.backbone.depths": (1, 1, 1, 1)}
PYRAMID = {**NANO, "model.neck.in_channels": [32, 64, 128, 256]}
FEW = {"model.test_cfg.rpn.max_per_img": 20, "model.test_cfg.rcnn.score_thr": 0.0, "model.test_cfg.rcnn.max_per_img": 5}
MODEL = {
    "detector": ("configs/tic_retinanet.py", {"model.backbone.depths": (1, 1, 1, 1), "model.test_cfg.max_per_img": 20}),
    "masks": ("configs/detection/mask-rcnn_tic-tiny_fpn_1x_coco.py", {**PYRAMID, **FEW}),
    "segmentor": ("configs/segmentation/fpn_tic-tiny_8xb4-80k_ade20k-512x512.py", PYRAMID),
    "classifier": ("configs/classification/tic-nano_16xb64_in1k.py", NANO),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model(kind, ...): the command line's config, checkpoint and settings, for random weights drawn once."""
    folder = tmp_path_factory.mktemp("models")

    def make(kind, *inputs, meta=None):
        path, settings = MODEL[kind]
        checkpoint = folder / f"{kind}{'' if meta is None else 'meta'}.pth"
        if not checkpoint.exists():
            cfg = Config.fromfile(ROOT / path)
            cfg.merge_from_dict(settings)
            torch.manual_seed(0)
            with DefaultScope.overwrite_default_scope(cfg.default_scope):
                weights = MODELS.build(cfg.model).state_dict()
            torch.save(dict(state_dict=weights, meta=dict(dataset_meta=meta or {})), checkpoint)
        options = [f"{name}={value}".replace(" ", "") for name, value in settings.items()]
        return [str(ROOT / path), str(checkpoint), *map(str, inputs), "--cfg-options", *options]

    return make


@pytest.fixture
def predict(model, tmp_path, monkeypatch):
    """predict(kind, inputs, *more) runs the tool and returns its exit code and results.json."""
    monkeypatch.chdir(tmp_path)

    def run(kind, inputs, *more):
        code = infer.main([*model(kind, *inputs), *map(str, more)])
        return code, json.loads((tmp_path / "predictions" / "results.json").read_text())

    return run


def photo(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(height).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    Image.fromarray(noise).resize((width, height)).save(path)
    return path


def check_boxes(record):
    boxes = np.array([found["bbox"] for found in record["predictions"]]).reshape(-1, 4)
    assert (boxes >= 0).all() and (boxes <= [record["width"], record["height"]] * 2).all()
    assert (boxes[:, :2] <= boxes[:, 2:]).all()


def test_folder_of_any_sizes_with_damaged_files(predict, tmp_path, capsys):
    photos = tmp_path / "photos"
    sizes = {"narrow.png": (37, 300), "sub/x.jpg": (90, 131), "x.JPG": (64, 33)}
    for name, size in sizes.items():
        photo(photos / name, *size)
    (photos / "cut.jpg").write_bytes((photos / "x.JPG").read_bytes()[:-300])
    (photos / "no.jpg").write_bytes(b"\xff\xd8 no photo")
    (photos / "note.txt").write_text("no photo either")
    (photos / ".hidden").write_text("not looked at")
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}

    code, results = predict("detector", ["photos"], "--score-thr", 0.2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 1
    assert [[name in line for name in ("cut.jpg", "no.jpg", "note.txt")].index(True) for line in lines] == [0, 1, 2]
    assert {r["path"]: (r["height"], r["width"]) for r in results} == {f"photos/{n}": size for n, size in sizes.items()}
    for record in results:
        check_boxes(record)
        assert record["predictions"] and record["predictions"][0]["class_name"] == "Tree"
        assert all(found["score"] >= 0.2 for found in record["predictions"])
        drawn = cv2.imread(str(tmp_path / "predictions" / record["picture"]))
        assert drawn.shape[:2] == (record["height"], record["width"])
        assert (drawn != cv2.imread(str(tmp_path / record["path"]))).any()
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before

    assert predict("detector", ["photos", "photos/narrow.png"])[0] == 1, "a second run writes over the first"


def test_masks(predict, tmp_path):
    photo(tmp_path / "x.png", 37, 301)
    code, (record,) = predict("masks", ["x.png"], "--score-thr", 0.01)
    assert code == 0 and record["predictions"]
    check_boxes(record)
    assert all(decode(found["mask"]).shape == (37, 301) for found in record["predictions"])
    assert predict("masks", ["x.png"], "--score-thr", 1)[1][0]["predictions"] == []


def test_segmentation(predict, tmp_path, capsys):
    photo(tmp_path / "x.png", 37, 301)
    photo(tmp_path / "x.jpg", 70, 50)
    photo(tmp_path / "tiny.png", 20, 50)
    code, results = predict("segmentor", ["x.png", "tiny.png", "x.jpg"])
    assert code == 1 and "tiny.png: TiC needs images of at least 32 x 32" in capsys.readouterr().err
    assert [record["path"] for record in results] == ["x.png", "x.jpg"]
    for record in results:
        class_map = Image.open(tmp_path / "predictions" / record["class_map"])
        classes = np.array(class_map)
        assert classes.shape == (record["height"], record["width"])
        assert {found["label"]: found["share"] for found in record["predictions"]} == pytest.approx(
            {label: n / classes.size for label, n in zip(*np.unique(classes, return_counts=True))}, abs=1e-5
        )
        assert class_map.getpalette()[:6] == [120, 120, 120, 180, 120, 120]  # wall and building of ADE20K
        assert {f["class_name"] for f in record["predictions"] if f["label"] == 0} <= {"wall"}


def test_classification(predict, tmp_path):
    photo(tmp_path / "x.png", 37, 301)
    code, (record,) = predict("classifier", ["x.png"])
    scores = [found["score"] for found in record["predictions"]]
    assert code == 0 and len(scores) == 5 and scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 1
    assert record["predictions"][0]["class_name"].strip()
    with pytest.raises(SystemExit, match=r"error: a classifier .* leave out --tile"):
        predict("classifier", ["x.png"], "--tile", 64)


@pytest.mark.parametrize("kind", ["detector", "segmentor"])
def test_tiles(kind, predict, tmp_path):
    """A tile that holds the photo changes nothing; many cover it."""
    photo(tmp_path / "x.png", 75, 200)
    _, (whole,) = predict(kind, ["x.png"])
    _, (same,) = predict(kind, ["x.png"], "--tile", 200)
    assert whole == same
    _, (many,) = predict(kind, ["x.png"], "--tile", 100, "--overlap", 20)
    assert many["predictions"] != whole["predictions"]
    if kind == "detector":
        check_boxes(many)
    else:
        assert Image.open(tmp_path / "predictions" / many["class_map"]).size == (200, 75)


def test_video(predict, tmp_path):
    video = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (96, 64))
    for i in range(3):
        video.write(cv2.imread(str(photo(tmp_path / f"{i}.png", 64, 96))))
    video.release()
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    code, (record,) = predict("detector", ["film.avi", "broken.mp4"])
    assert code == 1
    assert (record["width"], record["height"], len(record["frames"])) == (96, 64, 3)
    for frame in record["frames"]:
        check_boxes(dict(record, predictions=frame))
    drawn = cv2.VideoCapture(str(tmp_path / "predictions" / record["picture"]))
    frames = [frame for found, frame in iter(drawn.read, (False, None))]
    assert [frame.shape for frame in frames] == [(64, 96, 3)] * 3 and drawn.get(cv2.CAP_PROP_FPS) == 5


@pytest.mark.parametrize(
    ("option", "seen"), [((), (60, 90)), (("--size", 120, 80), (80, 120)), (("--config-size",), (224, 224))]
)
def test_resizing_is_asked_for(option, seen, predict, tmp_path, monkeypatch):
    shapes = []
    classifier = infer.PREDICTORS["mmpretrain"]
    monkeypatch.setattr(classifier, "keep", lambda self, sample, *size: shapes.append(sample.img_shape) or sample)
    photo(tmp_path / "x.png", 60, 90)
    _, (record,) = predict("classifier", ["x.png"], *option)
    assert shapes == [seen]
    assert (record["width"], record["height"]) == (90, 60)


def test_interrupted_keeps_what_is_done(predict, tmp_path, monkeypatch):
    for i in range(3):
        photo(tmp_path / "photos" / f"{i}.png", 40, 40)
    read = infer.Predictor.read

    def read_one(self, path):
        if "0.png" not in path:
            raise KeyboardInterrupt
        return read(self, path)

    monkeypatch.setattr(infer.Predictor, "read", read_one)
    code, results = predict("detector", ["photos"])
    assert code == 130 and [record["path"] for record in results] == ["photos/0.png"]


@pytest.mark.parametrize(
    ("error", "line"),
    [(AssertionError("no multiple of 32"), "--config-size.* no multiple of 32"), (MemoryError(), "a smaller --tile")],
)
def test_a_photo_too_much_for_the_model_is_named(error, line, predict, tmp_path, monkeypatch, capsys):
    photo(tmp_path / "large.png", 60, 90)
    photo(tmp_path / "small.png", 40, 40)
    inner = infer.Predictor.predict_whole

    def refuse(self, image):
        if len(image) == 60:
            raise error
        return inner(self, image)

    monkeypatch.setattr(infer.Predictor, "predict_whole", refuse)
    code, results = predict("classifier", ["large.png", "small.png"])
    assert code == 1 and [record["path"] for record in results] == ["small.png"]
    assert re.search(f"error: large.png: .*{line}", capsys.readouterr().err)


def test_wrong_input_is_told_in_a_line(predict, model, tmp_path):
    photo(tmp_path / "x.png", 40, 40)
    (tmp_path / "empty").mkdir()
    photo(tmp_path / "mine" / "y.png", 40, 40)
    with pytest.raises(SystemExit, match=r"no photo, video or folder at none\.png"):
        predict("detector", ["x.png", "none.png"])
    with pytest.raises(SystemExit, match="the folder empty has no files"):
        predict("detector", ["empty"])
    with pytest.raises(SystemExit, match="mine holds other things than predictions"):
        predict("detector", ["x.png"], "--out-dir", "mine")
    with pytest.raises(SystemExit, match=r"checkpoint .* is not one of this config's model: (?s:.*) mismatched"):
        infer.main([*model("detector", "x.png"), "model.bbox_head.num_classes=3"])
    assert not (tmp_path / "predictions").exists()


def test_weights_of_a_deeper_model_are_refused(model, tmp_path):
    photo(tmp_path / "x.png", 40, 40)
    config, checkpoint, *rest = model("classifier", tmp_path / "x.png")
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["backbone.stages.3.7.pos.weight"] = torch.zeros(1)
    torch.save(content, tmp_path / "deeper.pth")
    with pytest.raises(SystemExit, match=r"deeper\.pth is not one of this config's model: (?s:.*) 1 unexpected: backb"):
        infer.main([config, str(tmp_path / "deeper.pth"), *rest])


def test_safetensors_predict_too(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "x.png", 40, 40)
    config, checkpoint, *rest = model("classifier", "x.png")
    write_checkpoint(torch.load(checkpoint, weights_only=True)["state_dict"], tmp_path / "w.safetensors")
    assert infer.main([config, "w.safetensors", *rest]) == 0


def test_outputs_are_no_inputs_and_no_two_are_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a/x.jpg", "b/x.jpg", "a/x.png", "a/x.mp4", "a/sub/x.jpg", "a/x.classes.png", "predictions/x.jpg"]
    for name in [*names, "predictions/results.json"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    jobs = infer.plan(["a", "b/x.jpg", "predictions/x.jpg"], infer.Path("predictions"))
    assert sorted(str(path) for path, _ in jobs) == sorted(names)
    outputs = [output for _, picture in jobs for output in (picture, infer.class_map(picture))]
    assert len({*outputs}) == 2 * len(names) and not {*map(str, outputs)} & {*names}
    assert infer.Path("predictions/sub/x.jpg") in outputs


def test_predictions_inside_an_input_folder_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "x.png", 8, 8)
    photo(tmp_path / "predictions" / "x.png", 8, 8)
    (tmp_path / "predictions" / "results.json").touch()
    assert infer.plan(["."], infer.Path("predictions")) == [(infer.Path("x.png"), infer.Path("predictions/x.png"))]


def test_class_names_of_checkpoint_config_and_dataset(tmp_path):
    def names(saved, **about):
        torch.save(dict(state_dict={}, meta=saved), tmp_path / "c.pth")
        cfg = Config(dict(test_dataloader=dict(dataset=dict(type="RepeatDataset", dataset=dict(pipeline=[], **about)))))
        with DefaultScope.overwrite_default_scope("mmdet"):
            meta = dataset_meta(cfg, str(tmp_path / "c.pth"))
        assert meta["palette"] is None or len(meta["palette"]) >= len(meta["classes"])
        return meta["classes"]

    config = dict(type="VOCDataset", metainfo=dict(classes=("tree", "bush")))
    assert names(dict(dataset_meta=dict(CLASSES=("oak",))), **config) == ("oak",)
    assert names(dict(CLASSES=["n"] * 30), **config) == ["n"] * 30
    assert names({}, **config) == ("tree", "bush")
    assert names({}, type="VOCDataset")[:2] == ("aeroplane", "bicycle")


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(8, 120), st.floats(0, 0.9))
def test_tiles_cover_an_image_once(height, width, side, share):
    overlap = int(side * share)
    times = np.zeros((height, width), int)
    for (x0, y0, x1, y1), (left, top, right, bottom) in tiles(height, width, side, overlap):
        times[top:bottom, left:right] += 1
        assert (x1 - x0, y1 - y0) == (min(side, width), min(side, height))
        for start, own, own_end, stop, length in ((x0, left, right, x1, width), (y0, top, bottom, y1, height)):
            assert 0 <= start <= own < own_end <= stop <= length
            assert own == 0 or own - start >= overlap // 2
            assert own_end == length or stop - own_end >= overlap // 2
    assert (times == 1).all()


class Oracle:
    """Sees the truth of what lies in a tile, objects cut where the tile is."""

    def __init__(self, kind, model, monkeypatch):
        args = infer.parse_args([*model(kind, "x"), "--tile", "100", "--overlap", "40"])
        cfg = infer.read_config(args)
        self.predictor = infer.PREDICTORS[cfg.default_scope](cfg, args.checkpoint, tile=100, overlap=40)
        monkeypatch.setattr(self.predictor.model, "test_step", self.test_step)

    def predict(self, image):
        return self.predictor.predict(image)


class BoxOracle(Oracle):
    """The image's first channel holds the number of the object at each pixel, 0 for none."""

    masks_alone = False  # boxes are all zero then, as SOLO's

    def test_step(self, data):
        image, sample = data["inputs"][0][0], data["data_samples"][0]
        labels = image.unique()
        labels = labels[labels > 0].long()
        masks = image == labels[:, None, None]
        boxes = [[*span(mask.any(0)), *span(mask.any(1))] for mask in masks]
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)[:, [0, 2, 1, 3]]
        boxes, scores = boxes * (not self.masks_alone), torch.full(labels.shape, 0.9)
        sample.pred_instances = InstanceData(bboxes=boxes, labels=labels, scores=scores, masks=masks)
        return [sample]


class ClassOracle(Oracle):
    def test_step(self, data):
        sample = data["data_samples"][0]
        sample.pred_sem_seg = PixelData(data=data["inputs"][0][:1].long())
        return [sample]


def span(inside):
    places = inside.nonzero().flatten()
    return places[0].item(), places[-1].item() + 1


@pytest.mark.parametrize("masks_alone", [False, True])
def test_objects_smaller_than_the_overlap_are_found_once_and_whole(masks_alone, model, monkeypatch):
    oracle, rng = BoxOracle("masks", model, monkeypatch), np.random.default_rng(0)
    oracle.masks_alone = masks_alone
    image = np.zeros((230, 333, 3), np.uint8)
    truth = {}
    for label in range(1, 78):
        width, height = rng.integers(6, 40, 2)
        x, y = rng.integers(0, 333 - width), rng.integers(0, 230 - height)
        if not image[y : y + height, x : x + width].any():
            image[y : y + height, x : x + width] = label
            truth[label] = [x, y, x + width, y + height]
    assert len(truth) > 20
    records = oracle.predictor.describe(oracle.predict(image))
    assert sorted(found["label"] for found in records) == sorted(truth)
    for found in records:
        assert found["bbox"] == truth[found["label"]]
        assert (decode(found["mask"]) == (image[..., 0] == found["label"])).all()


def test_classes_have_no_seams(model, monkeypatch):
    image = np.random.default_rng(0).integers(0, 150, (230, 333, 3), np.uint8)
    sample = ClassOracle("segmentor", model, monkeypatch).predict(image)
    assert (sample.pred_sem_seg.data.numpy() == image[None, ..., 0]).all()


def test_pictures_drawn_in_pieces_look_the_same(model, monkeypatch):
    oracle = BoxOracle("masks", model, monkeypatch)
    image = np.zeros((90, 1000, 3), np.uint8)
    image[20:60, 100:180], image[5:80, 400:410], image[30:40, 500:900] = 1, 2, 3
    sample = oracle.predictor.predict_whole(image)
    del sample.pred_instances.masks
    whole = oracle.predictor.draw(image, sample)
    monkeypatch.setattr(inference, "PIECE", 600)
    pieces = oracle.predictor.draw(image, sample)
    assert whole.shape == pieces.shape == image.shape and (whole != image).any()
    assert (np.abs(whole.astype(int) - pieces) > 40).any(2).mean() < 0.01
