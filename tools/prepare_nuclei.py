"""Make a small, real segmentation dataset (cell nuclei, photo and mask) from a micrograph in a PyPI wheel.

The stardist wheel carries one fluorescence micrograph of the 2018 Data Science Bowl (Caicedo et al., Nature Methods
16, 2019), 512 x 512 grey px, with 125 nuclei outlined by hand. The left three quarters are `train`, the right one is
`val`: two regions of one photo that share no pixel, so `val` says nothing about other microscopes or tissues. Masks
hold 0 for background and 1 for nucleus; which nucleus, the original knows, is not kept.
The output folder is a build product: it appears whole or not at all, and edits by hand in it can be lost.
"""

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import wheel_dataset
from PIL import Image
from wheel_dataset import Recipe, Wheel

PACKAGE = "stardist==0.9.2"
WHEEL_SHA256 = "2316c0feb7bd5621e7a277cb3868df475c338943c591925c420ee3622c42f023"
CHOICE = wheel_dataset.for_platform("manylinux_2_28_x86_64")
DATA = "stardist/data/images"  # the photo's folder in the wheel
VAL_SHARE = 0.25  # of the photo's columns, the rightmost ones
FORMAT = 1  # to be raised whenever the same wheel would give other files
SPLITS = ("train", "val")
OUR_FILES = re.compile(r"manifest\.json|(images|masks)(/(train|val)(/nuclei\.png)?)?")


def read_photo(wheel: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """The photo as "images", the mask of classes as "masks", both (H, W) bytes."""
    photo, numbers = (
        np.asarray(Image.open(io.BytesIO(wheel.read(f"{DATA}/{name}.tif")))) for name in ("img2d", "mask2d")
    )
    if photo.ndim != 2 or photo.shape != numbers.shape or photo.max() > 255:
        raise ValueError(f"{DATA} holds no grey photo of 8 bits and its mask: {photo.shape=} {numbers.shape=}")
    return {"images": np.uint8(photo), "masks": np.uint8(numbers > 0)}


def write_regions(photo: dict[str, np.ndarray], folder: Path) -> None:
    """Fill the new directory `folder` with {images,masks}/{train,val}/nuclei.png."""
    for kind, pixels in photo.items():
        border = int(pixels.shape[1] * (1 - VAL_SHARE))
        for split, region in (("train", pixels[:, :border]), ("val", pixels[:, border:])):
            (folder / kind / split).mkdir(parents=True)
            Image.fromarray(region).save(folder / kind / split / "nuclei.png")


def count_splits(folder: Path) -> dict[str, dict]:
    return {split: wheel_dataset.count_files(folder / "images" / split, folder / "masks" / split) for split in SPLITS}


def main(argv: list[str] | None = None) -> int:
    recipe = Recipe(
        made_by="tic_backbone tools/prepare_nuclei.py",
        out="data/nuclei",
        wheel=Wheel(PACKAGE, WHEEL_SHA256, megabytes=3, choice=CHOICE),
        files=OUR_FILES,
        read=read_photo,
        write=write_regions,
        count=count_splits,
        told=("files",),
        settings={"format": FORMAT, "val_share": VAL_SHARE},
    )
    return wheel_dataset.main(recipe, __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    wheel_dataset.run(main)
