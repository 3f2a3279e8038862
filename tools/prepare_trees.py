"""Make a small, real detection dataset (tree crowns from the air, COCO format) from photos in a PyPI wheel.

The deepforest wheel carries NEON aerial photos (about 10 cm a pixel) with hand-drawn boxes. Two Yellowstone
photos give `train` and `val`, split by ground; plots from two other states give `test`, out of distribution.
The output folder is a build product: it appears whole or not at all, and edits by hand in it can be lost.
"""

import hashlib
import io
import json
import re
import xml.etree.ElementTree as ET
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import wheel_dataset
from PIL import Image
from tqdm import tqdm
from wheel_dataset import Recipe, Wheel

PACKAGE = "deepforest==1.5.2"
WHEEL_SHA256 = "705f08a80f33514044010865f61eefe5037d5492055c47574d213db74bebdf25"
DATA = "deepforest/data"  # the photos' folder in the wheel
SPLIT_PHOTOS = ("2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop")
TEST_PHOTOS = ("OSBS_029", "SOAP_061")
SPLITS = ("train", "val", "test")
TILE = 400  # px a side
STRIDE = 200  # px between train tiles
VAL_SHARE = 0.25  # of a split photo's rows, the lowest ones
MIN_VISIBLE = 0.5  # share of a box's area that a tile must show for the box to be a target there
FORMAT = 1  # to be raised whenever the same wheel would give other files
MADE_BY = "tic_backbone tools/prepare_trees.py"
OUR_FILES = re.compile(r"manifest\.json|annotations(/(train|val|test)\.json)?|(train|val|test)(/\w+_x\d+_y\d+\.png)?")

Box = tuple[float, float, float, float]  # left, top, right, bottom in px; right and bottom are exclusive
Region = tuple[int, int, int, int]  # the same in whole px of a photo


@dataclass(frozen=True)
class Photo:
    """One aerial photo and its crowns, in px of the photo."""

    name: str
    image: Image.Image
    boxes: list[Box]


def read_voc(xml: bytes, width: int, height: int) -> list[Box]:
    """Boxes of a VOC file, of all its labels, clipped to the photo of `width` x `height` px.

    VOC counts pixels from 1 and includes the last one (these files hold 1 to width, never 0), hence the -1
    on the left and the top: VOC's [1, width] is the half-open [0, width]. Swapped corners are mended.
    """
    boxes = []
    for bndbox in ET.fromstring(xml).iterfind("object/bndbox"):
        x0, y0, x1, y1 = (float(bndbox.findtext(key, "")) for key in ("xmin", "ymin", "xmax", "ymax"))
        left, top = max(min(x0, x1) - 1, 0), max(min(y0, y1) - 1, 0)
        right, bottom = min(max(x0, x1), width), min(max(y0, y1), height)
        if left < right and top < bottom:
            boxes.append((left, top, right, bottom))
    return boxes


def read_photos(wheel: zipfile.ZipFile) -> list[Photo]:
    """The four photos in the wheel, decoded."""
    photos = []
    for name in SPLIT_PHOTOS + TEST_PHOTOS:
        image = Image.open(io.BytesIO(wheel.read(f"{DATA}/{name}.png"))).convert("RGB")
        photos.append(Photo(name, image, read_voc(wheel.read(f"{DATA}/{name}.xml"), *image.size)))
    return photos


def split_regions(name: str, width: int, height: int) -> dict[str, Region]:
    """Which part of a photo belongs to which split: whole regions that share no pixel."""
    if name in TEST_PHOTOS:
        return {"test": (0, 0, width, height)}
    border = int(height * (1 - VAL_SHARE))
    return {"train": (0, 0, width, border), "val": (0, border, width, height)}


def tiles(region: Region, size: int, stride: int) -> list[Region]:
    """Windows of `size` px a side, every `stride` px, that cover `region` (and are cut where it is smaller).

    The last one of a row or column is moved back to end flush with the region, so that it is full-size too.
    """
    assert 0 < stride <= size, f"tiles would leave gaps: {stride=} {size=}"

    def offsets(start: int, stop: int) -> list[int]:
        last = max(start, stop - size)
        return [*range(start, last, stride), last]

    left, top, right, bottom = region
    return [
        (x, y, min(x + size, right), min(y + size, bottom)) for y in offsets(top, bottom) for x in offsets(left, right)
    ]


def cells(region: Region, size: int) -> list[Region]:
    """`region` cut into the fewest equal rows and columns of at most `size` px; sides differ by 1 px at most.

    Every pixel is in exactly one cell, so that an evaluation counts a crown about once.
    """

    def edges(start: int, stop: int) -> list[tuple[int, int]]:
        count = -(-(stop - start) // size)
        cuts = [start + (stop - start) * i // count for i in range(count + 1)]
        return list(pairwise(cuts))

    left, top, right, bottom = region
    return [(x0, y0, x1, y1) for y0, y1 in edges(top, bottom) for x0, x1 in edges(left, right)]


def boxes_in_tile(boxes: list[Box], tile: Region) -> list[tuple[Box, bool]]:
    """(box clipped to the tile, in px of the tile; iscrowd) of each box with at least 1 px a side in it.

    With less than MIN_VISIBLE of its area inside, a box is a crowd: whether to draw that rest of a crown is
    a matter of taste, so finding it is neither asked for nor a false positive.
    """
    seen = []
    for left, top, right, bottom in boxes:
        x0, y0, x1, y1 = max(left, tile[0]), max(top, tile[1]), min(right, tile[2]), min(bottom, tile[3])
        if x1 - x0 >= 1 and y1 - y0 >= 1:
            is_crowd = (x1 - x0) * (y1 - y0) < MIN_VISIBLE * (right - left) * (bottom - top)
            seen.append(((x0 - tile[0], y0 - tile[1], x1 - tile[0], y1 - tile[1]), is_crowd))
    return seen


def count_splits(folder: Path) -> dict[str, dict]:
    """What lies in a dataset's folder; of pictures only number and bytes."""
    found = {}
    for split in SPLITS:
        text = (folder / "annotations" / f"{split}.json").read_bytes()
        crowds = [annotation["iscrowd"] for annotation in json.loads(text)["annotations"]]
        sizes = [path.stat().st_size for path in (folder / split).glob("*.png")]
        found[split] = {
            "tiles": len(sizes),
            "boxes": crowds.count(0),
            "ignored": crowds.count(1),
            "picture_bytes": sum(sizes),
            "annotations_sha256": hashlib.sha256(text).hexdigest(),
        }
    return found


def write_dataset(photos: list[Photo], folder: Path) -> None:
    """Fill the new directory `folder` with tiles and annotations."""
    info = {
        "description": "Tree crowns in NEON aerial photos",
        "source": f"{DATA} in {PACKAGE} on PyPI",
        "licence": "CC0",
        "tile": TILE,
        "stride": STRIDE,
    }
    coco = {
        split: {"info": info, "images": [], "annotations": [], "categories": [{"id": 1, "name": "Tree"}]}
        for split in SPLITS
    }
    for name in (*SPLITS, "annotations"):
        (folder / name).mkdir(parents=True)
    cut = {
        "train": lambda region: tiles(region, TILE, STRIDE),
        "val": lambda region: cells(region, TILE),
        "test": lambda region: [region],
    }
    windows = [
        (photo, split, tile)
        for photo in photos
        for split, region in split_regions(photo.name, *photo.image.size).items()
        for tile in cut[split](region)
    ]
    for photo, split, tile in tqdm(windows, desc="tiles", unit="tile", disable=None):
        images, annotations = coco[split]["images"], coco[split]["annotations"]
        file_name = f"{photo.name}_x{tile[0]:04}_y{tile[1]:04}.png"
        photo.image.crop(tile).save(folder / split / file_name)
        images.append(
            {"id": len(images) + 1, "file_name": file_name, "width": tile[2] - tile[0], "height": tile[3] - tile[1]}
        )
        for (x0, y0, x1, y1), is_crowd in boxes_in_tile(photo.boxes, tile):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": int(is_crowd),
                }
            )
    for split in SPLITS:
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(coco[split]))


def main(argv: list[str] | None = None) -> int:
    recipe = Recipe(
        made_by=MADE_BY,
        out="data/neon_trees",
        wheel=Wheel(PACKAGE, WHEEL_SHA256, megabytes=23),
        files=OUR_FILES,
        read=read_photos,
        write=write_dataset,
        count=count_splits,
        told=("tiles", "boxes", "ignored"),
        settings={"format": FORMAT, "tile": TILE, "stride": STRIDE, "val_share": VAL_SHARE, "min_visible": MIN_VISIBLE},
    )
    return wheel_dataset.main(recipe, __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    wheel_dataset.run(main)
