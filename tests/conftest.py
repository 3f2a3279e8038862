"""A tiny detection dataset in COCO's format, and the project's command lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin starve each other's processes
ROOT = Path(__file__).parents[1]


@pytest.fixture
def root():
    return ROOT


@pytest.fixture
def trees(tmp_path):
    """Six noisy pictures with a dark square each, laid out as tools/prepare_trees.py does; returns the folder."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "neon_trees"
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val", "test"):
        (folder / split).mkdir()
        images, annotations = [], []
        for i in range(1, 7):
            pixels = rng.integers(120, 255, (100 + 7 * i, 96, 3), np.uint8)
            x, y = rng.integers(5, 50, 2).tolist()
            pixels[y : y + 30, x : x + 30] //= 4
            Image.fromarray(pixels).save(folder / split / f"{i}.jpg", quality=95)
            images.append({"id": i, "file_name": f"{i}.jpg", "width": 96, "height": 100 + 7 * i})
            annotations.append(
                {"id": i, "image_id": i, "category_id": 1, "bbox": [x, y, 30, 30], "area": 900, "iscrowd": 0}
            )
        coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "Tree"}]}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(coco))
    return folder


def on_folder(folder):
    """--cfg-options that point configs/tic_retinanet.py at `folder`."""
    options = [f"{split}_dataloader.dataset.data_root={folder}/" for split in ("train", "val", "test")]
    return [*options, *(f"{s}_evaluator.ann_file={folder}/annotations/{s}.json" for s in ("val", "test"))]


def start(*args, **env):
    """Start a command line of the project with one thread, in a process group of its own; text pipes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(
        [sys.executable, *map(str, args)], cwd=ROOT, env=env, text=True, start_new_session=True, **pipes
    )


def run(*args, **env):
    """(exit code, stdout, stderr) of a command line of the project."""
    process = start(*args, **env)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err
