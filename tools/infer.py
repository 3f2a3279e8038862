"""Predict on photos of any size, folders of them, and videos: boxes and masks, a class for each pixel, or one class.

    python tools/infer.py configs/tic_retinanet.py work_dirs/tic_retinanet/epoch_16.pth photos film.mp4
    python tools/infer.py CONFIG CHECKPOINT aerial.png --tile 1024 --overlap 200

Nothing is resized, whatever the config's test pipeline does, unless --size or --config-size asks for it. The folder
--out-dir gets every input with its predictions drawn in, for semantic segmentation also a PNG of class indices (in the
dataset's colours) beside each photo's, and results.json, a list with for each input

    path, width, height, picture; for segmentation class_map (files of this folder)
    predictions   detection: bbox [x0, y0, x1, y1] in px of the input, score, label, class_name; mask as COCO's RLE
                  segmentation: label, class_name, share of the pixels, the largest share first
                  classification: label, class_name, score of the five likeliest classes
    frames        in place of predictions for a video: a list of such lists (its picture, an mp4, has even sides)

What cannot be predicted on is named on stderr and left out; the exit code is then 1. On Ctrl-C what is done is kept.
"""

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import cv2
import mmcv
import torch
from mmengine.device import is_cuda_available
from tqdm import tqdm

from tic_backbone.cli import BadInput, argument_parser, explain, read_config, readable_errors
from tic_backbone.inference import PREDICTORS, Predictor

VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Predict on photos of any size, folders of them, and videos")
    parser.add_argument("checkpoint", help="checkpoint that training wrote")
    parser.add_argument("inputs", nargs="+", help="photos, videos, folders of them")
    parser.add_argument("--out-dir", type=Path, default=Path("predictions"), help="default: %(default)s")
    parser.add_argument("--score-thr", type=float, default=0.3, help="least score of a detection (default: 0.3)")
    parser.add_argument("--device", default="cuda" if is_cuda_available() else "cpu", help="default: %(default)s")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--tile", type=int, metavar="SIDE", help="predict in tiles of so many px, where memory is short")
    sizes.add_argument("--size", type=int, nargs=2, metavar=("LONG", "SHORT"), help="fit each image into so many px")
    sizes.add_argument("--config-size", action="store_true", help="resize and crop as the config's test pipeline does")
    parser.add_argument(
        "--overlap", type=int, metavar="PX", help="of tiles: the largest object's size (default: SIDE/4)"
    )
    args = parser.parse_args(argv)
    if args.overlap is None:
        args.overlap = (args.tile or 0) // 4
    if args.tile is not None and not 0 <= args.overlap < args.tile:
        parser.error(f"--overlap {args.overlap} must be less than --tile {args.tile}")
    if args.size and min(args.size) < 1:
        parser.error(f"--size must be positive, got {args.size}")
    return args


def find_inputs(given: list[str], out: Path) -> Iterator[tuple[Path, Path]]:
    """Each file to predict on, and its path relative to the folder it was found in.

    Of folders come all files but hidden ones and those in `out`, also in folders inside.
    """
    for path in map(Path, given):
        if path.is_dir():
            inside = [(file, file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
            inside = [(file, name) for file, name in inside if not any(part.startswith(".") for part in name.parts)]
            inside = [(file, name) for file, name in inside if out.resolve() not in file.resolve().parents]
            if not inside:
                raise BadInput(f"the folder {path} has no files to predict on")
            yield from inside
        elif path.is_file():
            yield path, Path(path.name)
        else:
            raise BadInput(f"there is no photo, video or folder at {path}")


def plan(given: list[str], out: Path) -> list[tuple[Path, Path]]:
    """Each file to predict on with the picture to draw; no output is another's or an input."""
    if out.exists() and not (out / "results.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} holds other things than predictions: give another --out-dir")
    files = {path.resolve(): (path, name) for path, name in find_inputs(given, out)}  # a file given twice counts once
    taken = {*files, (out / "results.json").resolve()}
    jobs = []
    for path, name in files.values():
        kind = path.suffix.lower()
        suffix = ".mp4" if kind in VIDEOS else ".jpg" if kind in (".jpg", ".jpeg") else ".png"
        for n in count(1):
            picture = out / name.with_name(name.stem + (f"_{n}" if n > 1 else "") + suffix)
            files_of_it = {picture.resolve(), class_map(picture).resolve()}
            if not files_of_it & taken:
                break
        taken |= files_of_it
        jobs.append((path, picture))
    return jobs


def class_map(picture: Path) -> Path:
    return picture.with_suffix(".classes.png")


def predict_photo(predictor: Predictor, path: Path, picture: Path, results: list[dict], out: Path) -> None:
    image = predictor.read(str(path))
    sample = predictor.predict(image)
    record = dict(path=str(path), width=image.shape[1], height=image.shape[0], picture=str(picture.relative_to(out)))
    mmcv.imwrite(predictor.draw(image, sample), str(picture))
    classes = predictor.class_map(sample)
    if classes is not None:
        classes.save(class_map(picture))
        record["class_map"] = str(class_map(picture).relative_to(out))
    results.append(dict(record, predictions=predictor.describe(sample)))


def predict_video(predictor: Predictor, path: Path, picture: Path, results: list[dict], out: Path) -> None:
    video = cv2.VideoCapture(str(path))
    found, frame = video.read()
    if not found:
        raise BadInput(f"cannot read the video {path}")
    height, width = frame.shape[:2]
    record = dict(path=str(path), width=width, height=height, picture=str(picture.relative_to(out)), frames=[])
    results.append(record)  # before it is complete, to be kept when interrupted
    picture.parent.mkdir(parents=True, exist_ok=True)
    fps = video.get(cv2.CAP_PROP_FPS)
    drawn = cv2.VideoWriter(str(picture), cv2.VideoWriter_fourcc(*"mp4v"), fps if fps > 0 else 25, (width, height))
    if not drawn.isOpened():
        raise BadInput(f"cannot write the video {picture}")
    try:
        with tqdm(total=int(video.get(cv2.CAP_PROP_FRAME_COUNT)), unit="frame", leave=False, disable=None) as bar:
            while found:
                sample = predictor.predict(frame)
                drawn.write(predictor.draw(frame, sample))
                record["frames"].append(predictor.describe(sample))
                bar.update()
                found, frame = video.read()
    finally:
        drawn.release()
        video.release()


def reason(error: Exception, path: Path) -> str | None:
    """Why there is no prediction for a file, in a line that names it, or None if the file is not to blame."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return f"{path}: not enough memory for it as a whole or in tiles so large: give a smaller --tile"
    line = explain(error, None)
    if line is None and isinstance(error, (AssertionError, RuntimeError)):  # as of models for multiples of 32 px alone
        line = f"not for this model in its own size, try --config-size: {type(error).__name__} {error}"
    return line if line is None or str(path) in line else f"{path}: {line}"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    warnings.filterwarnings("ignore", "Warning: The .* is out of bounds")  # of visualizers, at an image's very border
    with readable_errors():
        cfg = read_config(args)
        if cfg.get("default_scope") not in PREDICTORS:
            raise BadInput(f"default_scope={cfg.get('default_scope')!r} of {args.config} is none of {list(PREDICTORS)}")
        jobs = plan(args.inputs, args.out_dir)
        options = {name: getattr(args, name) for name in ("score_thr", "tile", "overlap", "size", "config_size")}
        predictor = PREDICTORS[cfg.default_scope](cfg, args.checkpoint, args.device, **options)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    results: list[dict] = []
    write_results(results, args.out_dir)  # marks the folder as one of predictions
    failed, interrupted = 0, False
    try:
        for path, picture in tqdm(jobs, unit="input", disable=None):
            predict = predict_video if picture.suffix == ".mp4" else predict_photo
            try:
                predict(predictor, path, picture, results, args.out_dir)
            except Exception as error:
                line = reason(error, path)
                if line is None:
                    raise
                results[:] = [record for record in results if record["path"] != str(path)]  # what a video came to
                failed += 1
                tqdm.write("error: " + " ".join(line.split()), file=sys.stderr)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        write_results(results, args.out_dir)
    print(f"{len(results)} of {len(jobs)} inputs predicted{', interrupted' * interrupted}: {args.out_dir}/results.json")
    return 130 if interrupted else int(failed > 0)


def write_results(results: list[dict], out: Path) -> None:
    lines = ",\n".join(map(json.dumps, results))
    part = out / "results.json.part"
    part.write_text(f"[\n{lines}\n]\n")
    os.replace(part, out / "results.json")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` keeps what is done as Ctrl-C does
    sys.exit(main())
