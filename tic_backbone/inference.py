"""Trained models of mmdet, mmseg and mmpretrain on images of any size, whole or in tiles."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from mmcv.ops import batched_nms
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, VISUALIZERS, DefaultScope
from mmengine.runner import CheckpointLoader
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from PIL import Image

from tic_backbone.checkpoint import load_weights, local_file
from tic_backbone.cli import BadInput
from tic_backbone.openmmlab import read_mm_checkpoint

PIECE, WHOLE = 1536, 2**16  # px a side of what is drawn at a time; matplotlib can draw no more than the latter


class Tile(NamedTuple):
    """A part of an image that a model sees at once, and the part of it that counts: (left, top, right, bottom) in px.

    The second parts of an image's tiles cover it without overlap; they meet in the middle of the tiles' overlap.
    """

    view: tuple[int, int, int, int]
    own: tuple[int, int, int, int]


def tiles(height: int, width: int, side: int, overlap: int) -> list[Tile]:
    """Tiles of `side` px that cover an image, neighbours sharing at least `overlap`; a shorter axis is not cut."""

    def spans(length: int) -> list[tuple[int, int, int, int]]:
        last = max(length - side, 0)
        starts = [*range(0, last, side - overlap), last]
        stops = [min(start + side, length) for start in starts]
        cuts = [0, *((start + stop) // 2 for start, stop in zip(starts[1:], stops)), length]
        return list(zip(starts, stops, cuts, cuts[1:]))

    return [
        Tile((x0, y0, x1, y1), (left, top, right, bottom))
        for y0, y1, top, bottom in spans(height)
        for x0, x1, left, right in spans(width)
    ]


def part(image: np.ndarray | torch.Tensor, box: tuple[int, int, int, int]) -> np.ndarray | torch.Tensor:
    """A view of what lies in `box` (left, top, right, bottom) of an (H, W, ...) image."""
    return image[box[1] : box[3], box[0] : box[2]]


class Predictor:
    """A trained model, and what its config says of reading and drawing images.

    Predictions stay what the model's package makes of them, in px of the image they were asked for.

    Args:
        cfg: the config. Resizing and cropping in its test pipeline are left out unless asked for.
        checkpoint: path of the weights, and of class names if it has them.
        device: where the model runs.
        score_thr: the least score of a detection.
        tile, overlap: predict in tiles of so many px a side which share so many px; None for the image as a whole.
        size: longer and shorter side in px into which to fit each image, keeping its ratio.
        config_size: resize and crop as the config's test pipeline does.

    Raises:
        BadInput: if the config does not say how images are read.
        ValueError: if the weights do not fit the model.
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: str,
        device: str = "cpu",
        *,
        score_thr: float = 0.3,
        tile: int | None = None,
        overlap: int = 0,
        size: tuple[int, int] | None = None,
        config_size: bool = False,
    ) -> None:
        weights = read_mm_checkpoint(checkpoint)  # before anything else reads it: this reader runs no code in it
        self.score_thr, self.tile, self.overlap = score_thr, tile, overlap
        self.test_cfg = cfg.model.get("test_cfg") or {}
        cfg.model.setdefault("data_preprocessor", cfg.get("data_preprocessor"))  # as mmengine's runner does
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            self.model = MODELS.build(cfg.model)
            load, *steps = pipeline(cfg, size, config_size)
            self.load, self.prepare = TRANSFORMS.build(load), Compose([TRANSFORMS.build(step) for step in steps])
            self.visualizer = VISUALIZERS.build(dict(cfg.visualizer, name="infer", vis_backends=None))
            self.visualizer.dataset_meta = self.meta = self.complete(dataset_meta(cfg, checkpoint))
        report = load_weights(self.model, weights)
        own = {name.partition(".")[0] for name, _ in self.model.named_parameters()}
        surplus = [name for name in report.unexpected if name.partition(".")[0] in own]  # of a larger model
        if report.missing or report.mismatched or surplus:
            raise BadInput(f"the checkpoint {checkpoint} is not one of this config's model: {report}")
        try:
            self.model.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            raise BadInput(f"cannot run on --device {device}: {error}") from error

    def complete(self, meta: dict) -> dict:
        """Class names and colours as far as this model's predictions cannot be drawn without."""
        return meta

    def read(self, path: str) -> np.ndarray:
        """The photo at `path` as (H, W, 3), BGR; `BadInput` if it is damaged or none."""
        return self.load(dict(img_path=path))["img"]

    def predict(self, image: np.ndarray) -> BaseDataElement:
        """What the model finds in an image, in the image's own pixels, on the CPU."""
        cut = tiles(*image.shape[:2], self.tile, self.overlap) if self.tile else []
        if len(cut) < 2:
            return self.predict_whole(image)
        return self.merge(((tile, self.predict_whole(part(image, tile.view))) for tile in cut), *image.shape[:2])

    @torch.no_grad()
    def predict_whole(self, image: np.ndarray) -> BaseDataElement:
        size = image.shape[:2]
        about = dict(img_path="", img_id=0, ori_shape=size, img_shape=size, scale_factor=(1.0, 1.0))
        data = self.prepare(dict(img=np.ascontiguousarray(image), **about))
        return self.keep(self.model.test_step(pseudo_collate([data]))[0], *size).cpu()

    def keep(self, sample: BaseDataElement, height: int, width: int) -> BaseDataElement:
        """The part of a prediction that is of use."""
        return sample

    def merge(self, parts: Iterable[tuple[Tile, BaseDataElement]], height: int, width: int) -> BaseDataElement:
        """One prediction for an image out of those for its tiles."""
        raise NotImplementedError

    def describe(self, sample: BaseDataElement) -> list[dict]:
        """A prediction as plain numbers and names."""
        raise NotImplementedError

    def draw(self, image: np.ndarray, sample: BaseDataElement) -> np.ndarray:
        """The image with its prediction drawn over it, of the same size, BGR."""
        rgb = np.broadcast_to(image.reshape(*image.shape[:2], -1)[..., ::-1], (*image.shape[:2], 3)).astype(np.uint8)
        drawn = np.empty_like(rgb)
        side = self.drawn_side(sample)
        for view, own in tiles(*image.shape[:2], side, side // 3):
            self.paint(part(rgb, view), self.crop(sample, view))
            inner = (own[0] - view[0], own[1] - view[1], own[2] - view[0], own[3] - view[1])
            part(drawn, own)[:] = part(self.visualizer.get_image(), inner)
        return drawn[..., ::-1]

    def drawn_side(self, sample: BaseDataElement) -> int:
        """Side in px of the pieces that are drawn at a time: matplotlib takes over 100 bytes for each pixel."""
        return PIECE

    def paint(self, rgb: np.ndarray, sample: BaseDataElement) -> None:
        """Have the visualizer draw a prediction over an image."""
        raise NotImplementedError

    def crop(self, sample: BaseDataElement, view: tuple[int, int, int, int]) -> BaseDataElement:
        """What of a prediction is to be drawn in a piece of the image."""
        return sample

    def class_map(self, sample: BaseDataElement) -> Image.Image | None:
        """The class of each pixel, where the model tells."""
        return None

    def named(self, label: int) -> dict:
        names = self.meta.get("classes") or ()
        return dict(label=label, class_name=names[label] if label < len(names) else str(label))


class Detector(Predictor):
    """Boxes, with masks if the model has them."""

    def keep(self, sample: BaseDataElement, height: int, width: int) -> BaseDataElement:
        if "pred_instances" not in sample:
            raise BadInput(f"{type(self.model).__name__} predicts no boxes or masks, which is all that is drawn")
        found = sample.pred_instances
        found = found[found.scores >= self.score_thr]
        if "masks" in found and not found.bboxes.any():  # as from SOLO, which knows masks alone
            from mmdet.structures.mask import mask2bbox

            found.bboxes = mask2bbox(found.masks)
        found.bboxes = found.bboxes.clamp(found.bboxes.new_zeros(4), found.bboxes.new_tensor([width, height] * 2))
        found.offset = found.labels.new_zeros(len(found), 2)  # of a mask's first pixel in the image
        sample.pred_instances = found
        return sample

    def merge(self, parts: Iterable[tuple[Tile, BaseDataElement]], height: int, width: int) -> BaseDataElement:
        """Each box comes from the tile in whose own part its centre lies, so not from one that cuts it.

        Up to a tenth of its size beyond that part it stays too, lest both tiles leave it to the other: between those
        the config's NMS decides. What is larger than the overlap may still come in pieces.
        """
        kept = []
        for tile, sample in parts:
            found = sample.pred_instances
            found.offset = found.offset + torch.tensor(tile.view[:2])
            found.bboxes = found.bboxes + found.offset.repeat(1, 2)
            centre, slack = found.bboxes.reshape(-1, 2, 2).mean(1), (found.bboxes[:, 2:] - found.bboxes[:, :2]) / 10
            left_top, right_bottom = torch.tensor(tile.own).reshape(2, 2)
            kept.append(found[((centre >= left_top - slack) & (centre <= right_bottom + slack)).all(1)])
        merged = InstanceData.cat(kept)
        if len(merged):
            boxes, order = batched_nms(merged.bboxes, merged.scores, merged.labels, self.nms())
            merged = merged[order]
            merged.scores = boxes[:, -1]  # soft NMS lowers them
        sample.pred_instances = merged
        sample.set_metainfo(dict(ori_shape=(height, width)))
        return sample

    def nms(self) -> dict:
        """The config's suppression of the last stage's boxes; a plain one for models that need none in one image."""
        last = self.test_cfg.get("rcnn") or self.test_cfg
        return last.get("nms") or dict(type="nms", iou_threshold=0.5)

    def describe(self, sample: BaseDataElement) -> list[dict]:
        from pycocotools.mask import encode  # mmdet's own requirement

        found = sample.pred_instances
        records = [
            dict(bbox=[round(v, 2) for v in box], score=round(score, 4), **self.named(label))
            for box, score, label in zip(found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist())
        ]
        if "masks" in found:
            height, width = sample.ori_shape
            for record, mask, offset in zip(records, found.masks, found.offset.tolist()):
                rle = encode(np.asfortranarray(mask_within(mask, offset, (0, 0, width, height)), np.uint8))
                record["mask"] = dict(size=rle["size"], counts=rle["counts"].decode())
        return records

    def drawn_side(self, sample: BaseDataElement) -> int:
        return WHOLE if "masks" in sample.pred_instances else PIECE  # mmdet draws masks in colours of chance

    def paint(self, rgb: np.ndarray, sample: BaseDataElement) -> None:
        self.visualizer.add_datasample("", rgb, sample, draw_gt=False, pred_score_thr=self.score_thr)

    def crop(self, sample: BaseDataElement, view: tuple[int, int, int, int]) -> BaseDataElement:
        (left_top, right_bottom), found = torch.tensor(view).reshape(2, 2), sample.pred_instances
        found = found[((found.bboxes[:, :2] < right_bottom) & (found.bboxes[:, 2:] > left_top)).all(1)]
        # Clipped: mmdet takes boxes of negative sum for none, and matplotlib shrinks a picture to show what is outside
        corners = found.bboxes.reshape(-1, 2, 2).clamp(left_top, right_bottom) - left_top
        found.bboxes = corners.reshape(-1, 4)
        if "masks" in found:
            masks = [mask_within(mask, offset, view) for mask, offset in zip(found.masks, found.offset.tolist())]
            found.masks = (
                torch.stack(masks) if masks else found.masks.new_zeros(0, view[3] - view[1], view[2] - view[0])
            )
        sample = sample.new()
        sample.pred_instances = found
        return sample


def mask_within(mask: torch.Tensor, offset: tuple[int, int], view: tuple[int, int, int, int]) -> torch.Tensor:
    """What a view of an image shows of a mask whose first pixel is at `offset` (x, y) in the image."""
    (x, y), (height, width), (x0, y0, x1, y1) = offset, mask.shape, view
    shown = mask.new_zeros(y1 - y0, x1 - x0)
    left, top, right, bottom = max(x, x0), max(y, y0), min(x + width, x1), min(y + height, y1)
    if left < right and top < bottom:
        inner = part(mask, (left - x, top - y, right - x, bottom - y))
        part(shown, (left - x0, top - y0, right - x0, bottom - y0))[:] = inner
    return shown


class Segmentor(Predictor):
    """A class for each pixel."""

    def complete(self, meta: dict) -> dict:
        count = max(self.model.num_classes, 2)  # one channel tells two classes apart
        names, palette = list(meta.get("classes") or ()), list(meta.get("palette") or ())
        names += [str(label) for label in range(len(names), count)]
        palette += np.random.default_rng(0).integers(0, 256, (max(len(names) - len(palette), 0), 3)).tolist()
        return dict(meta, classes=names, palette=palette)

    def keep(self, sample: BaseDataElement, height: int, width: int) -> BaseDataElement:
        sample.pop("seg_logits", None)  # by far the largest part
        return sample

    def merge(self, parts: Iterable[tuple[Tile, BaseDataElement]], height: int, width: int) -> BaseDataElement:
        """Each pixel's class comes from the tile that has it in its own part, away from where the tile is cut."""
        classes = torch.zeros(1, height, width, dtype=torch.int16)
        for ((x, y, *_), (left, top, right, bottom)), sample in parts:
            inner = (left - x, top - y, right - x, bottom - y)
            part(classes[0], (left, top, right, bottom))[:] = part(sample.pred_sem_seg.data[0], inner)
        sample.pred_sem_seg = PixelData(data=classes)
        return sample

    def describe(self, sample: BaseDataElement) -> list[dict]:
        """Each class that was found, with its share of the pixels, the largest first."""
        counts = sample.pred_sem_seg.data.flatten().long().bincount()
        shares, labels = (counts / counts.sum()).sort(descending=True)
        found = zip(shares.tolist(), labels.tolist())
        return [dict(**self.named(label), share=round(share, 6)) for share, label in found if share > 0]

    def paint(self, rgb: np.ndarray, sample: BaseDataElement) -> None:
        # Without names: to place them, mmseg sorts a list of all pixels
        self.visualizer.add_datasample("", rgb, sample, draw_gt=False, with_labels=False)

    def crop(self, sample: BaseDataElement, view: tuple[int, int, int, int]) -> BaseDataElement:
        classes, sample = sample.pred_sem_seg.data, sample.new()
        sample.pred_sem_seg = PixelData(data=part(classes[0], view)[None])
        return sample

    def class_map(self, sample: BaseDataElement) -> Image.Image:
        classes = sample.pred_sem_seg.data[0].numpy()
        if len(self.meta["classes"]) > 256:
            return Image.fromarray(classes.astype(np.uint16))
        image = Image.fromarray(classes.astype(np.uint8))
        image.putpalette(np.array(self.meta["palette"], np.uint8).tobytes())
        return image


class Classifier(Predictor):
    """A class for the whole image, which no tile can tell."""

    def __init__(self, *args, tile: int | None = None, **kwargs) -> None:
        if tile:
            raise BadInput(f"a classifier tells one class of the whole image: leave out --tile {tile}")
        super().__init__(*args, **kwargs)

    def describe(self, sample: BaseDataElement) -> list[dict]:
        """The five likeliest classes, the likeliest first."""
        scores, labels = sample.pred_score.topk(min(5, len(sample.pred_score)))
        return [dict(score=round(s, 4), **self.named(label)) for s, label in zip(scores.tolist(), labels.tolist())]

    def drawn_side(self, sample: BaseDataElement) -> int:
        return WHOLE

    def paint(self, rgb: np.ndarray, sample: BaseDataElement) -> None:
        self.visualizer.visualize_cls(rgb, sample, draw_gt=False)


PREDICTORS = {"mmdet": Detector, "mmseg": Segmentor, "mmpretrain": Classifier}  # by a config's default_scope


def pipeline(cfg: Config, size: tuple[int, int] | None, config_size: bool) -> list[dict]:
    """The config's test pipeline without truth, resizing and cropping; the first step reads an image."""
    steps = [(step["type"].split(".")[-1], step) for step in dataset(cfg).get("pipeline") or ()]
    load = [step for name, step in steps if name == "LoadImageFromFile"]
    if not load:
        raise BadInput("the config's test pipeline has no LoadImageFromFile, which would say how its images are read")
    resize = [dict(type="Resize", scale=tuple(size), keep_ratio=True)] if size else []
    rest = [step for name, step in steps if not name.startswith("Load")
            and (config_size or not ("Resize" in name or "Crop" in name))]  # fmt: skip
    return [load[0], *resize, *rest]


def dataset_meta(cfg: Config, checkpoint: str) -> dict:
    """Class names and colours: the checkpoint's, else those in the config, else those of the config's dataset class."""
    saved = {}
    if not checkpoint.endswith(".safetensors"):  # which holds weights alone, and mmengine cannot read
        path = str(local_file(checkpoint))
        saved = CheckpointLoader.load_checkpoint(path, "cpu", logger="silent").get("meta") or {}
    saved = saved.get("dataset_meta") or saved  # as before mmengine
    with DATASETS.switch_scope_and_registry(None) as registry:
        known = getattr(registry.get(dataset(cfg).get("type")), "METAINFO", {})
    meta = {**known, **dataset(cfg).get("metainfo", {}), **{key.lower(): value for key, value in saved.items()}}
    classes, palette = meta.get("classes"), meta.get("palette")
    short = palette is not None and classes is not None and len(palette) < len(classes)
    return dict(classes=classes, palette=None if short or palette is None else list(palette))


def dataset(cfg: Config) -> dict:
    """The dataset that the config tests on, out of what wraps it."""
    part = (cfg.get("test_dataloader") or cfg.get("val_dataloader") or {}).get("dataset") or {}
    while "pipeline" not in part and (inner := part.get("dataset") or part.get("datasets")):
        part = inner[0] if isinstance(inner, list) else inner
    return part
