"""Make a small, real classification dataset (handwritten digits, a folder a class) from a table in a PyPI wheel.

The scikit-learn wheel carries 1,797 digits written by 13 people: the test part of UCI's "Optical Recognition of
Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998), 8 x 8 cells with 0 to 16 points of ink. The table names no
writer, but runs form by form, 14 of them, each begun with 0 to 9 three times over. The first ten forms are `train`, the
last four `test`: hands that training never saw, save for the one person who may have filled in two forms.
The output folder is a build product: it appears whole or not at all, and edits by hand in it can be lost.
"""

import csv
import gzip
import re
import zipfile
from pathlib import Path

import numpy as np
import wheel_dataset
from PIL import Image
from tqdm import tqdm
from wheel_dataset import Recipe, Wheel

PACKAGE = "scikit-learn==1.7.2"
WHEEL_SHA256 = "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d"
CHOICE = wheel_dataset.for_platform("manylinux2014_x86_64")
TABLE = "sklearn/datasets/data/digits.csv.gz"
FIRST_TEST_ROW = 1287  # of the table: where its eleventh form begins
SIDE = 32  # px of a picture, the least that TiC takes; a multiple of the 8 cells
FORMAT = 1  # to be raised whenever the same wheel would give other files
SPLITS = ("train", "test")
OUR_FILES = re.compile(r"manifest\.json|(train|test)(/\d(/\d{4}\.png)?)?")

Digit = tuple[int, np.ndarray]  # what it is, and its 8 x 8 cells of 0 (paper) to 16 (ink)


def read_digits(wheel: zipfile.ZipFile) -> list[Digit]:
    """The digits in the table's order, which is that of the forms."""
    rows = csv.reader(gzip.decompress(wheel.read(TABLE)).decode().splitlines())
    table = np.array([[float(cell) for cell in row] for row in rows]).astype(int)
    if table.ndim != 2 or table.shape[1] != 65 or table.min() < 0 or table[:, :64].max() > 16 or table[:, 64].max() > 9:
        raise ValueError(f"{TABLE} is no table of 8 x 8 cells of 0 to 16 and a digit")
    return [(int(row[64]), row[:64].reshape(8, 8)) for row in table]


def picture(cells: np.ndarray) -> Image.Image:
    """Light ink on black, interpolated between the centres of the cells."""
    small = Image.fromarray(np.uint8(np.round(cells * (255 / 16))))
    return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def write_pictures(digits: list[Digit], folder: Path) -> None:
    """Fill the new directory `folder` with <split>/<digit>/<row of the table>.png."""
    for split in SPLITS:
        for digit in range(10):
            (folder / split / str(digit)).mkdir(parents=True)
    for row, (digit, cells) in enumerate(tqdm(digits, desc="digits", unit="digit", disable=None)):
        split = "train" if row < FIRST_TEST_ROW else "test"
        picture(cells).save(folder / split / str(digit) / f"{row:04}.png")


def count_splits(folder: Path) -> dict[str, dict]:
    return {split: wheel_dataset.count_files(*(folder / split).iterdir()) for split in SPLITS}


def main(argv: list[str] | None = None) -> int:
    recipe = Recipe(
        made_by="tic_backbone tools/prepare_digits.py",
        out="data/digits",
        wheel=Wheel(PACKAGE, WHEEL_SHA256, megabytes=10, choice=CHOICE),
        files=OUR_FILES,
        read=read_digits,
        write=write_pictures,
        count=count_splits,
        told=("files",),
        settings={"format": FORMAT, "first_test_row": FIRST_TEST_ROW, "side": SIDE},
    )
    return wheel_dataset.main(recipe, __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    wheel_dataset.run(main)
