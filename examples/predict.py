#!/usr/bin/env python
"""Segment an image, a folder of images or a video with a trained model.

    python examples/predict.py street.jpg --model runs/mine --output_dir predictions
    python examples/predict.py photos --model runs/mine --output_dir predictions --uncertainty
    python examples/predict.py large --model runs/mine --output_dir predictions --window 512 512 --flip

The model is a folder or a name on the Hub. The output folder gets, for each image NAME or frame NAME_00012:

- `NAME_overlay.png`: the image under the colours of its classes, with a legend;
- `NAME_mask.png`: the class indices, in a palette PNG that opens in these colours;
- `NAME_uncertainty.png`, with `--uncertainty`: the entropy of the class distribution over its largest value, log C;

and `predictions.json`: of each image the size, pixels and share of each class and mean entropy, and the model. NAME is
the image's path in the folder without its ending; where two would be alike, all images keep their endings.

Without `--window`, `--flip` and `--batch_size` the masks are those of `pipeline("image-segmentation")`. Animated GIF,
PNG and WebP are read frame by frame; other videos need the extra `video`. Every file is decoded once before the first
is predicted: one that is damaged ends the run with one line, exit code 2, and nothing written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from run_seg_pals import OneLineParser, fail
from tqdm import tqdm

from pals_hf.data.classes import MAX_CLASSES
from pals_hf.errors import InputError, first_line
from pals_hf.inference import Prediction, load_for_inference, predict, read_pictures
from pals_hf.visualize import heat_map, index_picture, overlay

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

RESULTS = "predictions.json"
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")


class Picture(NamedTuple):
    """An image, or a frame of one that moves."""

    file: Path
    frame: int | None
    name: str  # of its results, in the output folder


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse_arguments(argv)
        root, files = find_files(args.input, args.output_dir)
        pictures = list_pictures(root, files)
        check_output_dir(args, pictures)
        model, processor = load_for_inference(args.model, args.device)
        num_classes = model.config.num_labels
        if num_classes > MAX_CLASSES:
            raise InputError(f"{args.model} has {num_classes} classes: a mask can hold {MAX_CLASSES}")
        options = {"window": args.window, "overlap": args.overlap, "flip": args.flip}
        report = {"model": args.model, "revision": revision_of(args.model), **options, "images": []}
        for batch, predictions in predict_all(model, processor, files, pictures, args.batch_size, options):
            if not report["images"]:  # the network has shown that it can do it
                prepare_output_dir(args.output_dir)
            for (picture, image), prediction in zip(batch, predictions, strict=True):
                report["images"].append(write_results(picture, image, prediction, model.config.id2label, args))
    except InputError as error:
        fail(error)
    (args.output_dir / RESULTS).write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    print_table(report["images"], num_classes)
    print(f"\nwritten to {args.output_dir}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="Image, folder of images (also in folders in it), or video.")
    parser.add_argument("--model", required=True, help="Folder of a trained model, or its name on the Hub.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the results.")
    parser.add_argument("--uncertainty", action="store_true", help="Also write NAME_uncertainty.png.")
    parser.add_argument(
        "--window",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="Predict by windows that slide over the image: their size in pixels of the image as the model's image "
        "processor resizes it.",
    )
    parser.add_argument(
        "--overlap", type=float, default=1 / 3, help="Share of a window that the next one covers again."
    )
    parser.add_argument(
        "--flip", action="store_true", help="Also look at the mirrored image, and take the mean of both logits."
    )
    parser.add_argument("--batch_size", type=int, default=1, help="Images that go through the network at once.")
    parser.add_argument("--device", help="Default: a GPU if there is one.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the predictions that --output_dir holds.")
    args = parser.parse_args(argv)
    if args.window is not None and min(args.window) < 1:
        raise InputError(f"window must be two positive numbers, height and width, got {args.window}")
    if not 0.0 <= args.overlap < 1.0:
        raise InputError(f"overlap must lie in [0, 1), got {args.overlap}")
    if args.batch_size < 1:
        raise InputError(f"batch_size must be positive, got {args.batch_size}")
    return args


# ---- What to predict ----


def find_files(given: Path, output_dir: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files, sorted."""
    if given.is_file():
        return given.parent, [given]
    if not given.is_dir():
        raise InputError(f"{given} is neither a file nor a folder")
    output = output_dir.resolve()
    if output == given.resolve():
        raise InputError(f"output_dir {output_dir} is the folder of the images: give another one")
    # Results in a folder among the images are no images; an output folder around the images is another matter.
    within = output.is_relative_to(given.resolve())
    files = [
        path
        for path in sorted(given.rglob("*"))
        if path.suffix.lower() in IMAGES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(given).parts)
        and not (within and path.resolve().is_relative_to(output))
    ]
    if not files:
        raise InputError(f"{given} has no images ({', '.join(IMAGES)})")
    return given, files


def list_pictures(root: Path, files: list[Path]) -> list[Picture]:
    """Every image and frame in the files, each with a name of its own.

    Raises:
        InputError: a file cannot be decoded.
    """
    frames = [sum(1 for _ in read_file(file)) for file in tqdm(files, desc="Checking files", disable=None)]
    for keep_ending in (False, True):
        pictures = [
            Picture(file, frame if count > 1 else None, result_name(file.relative_to(root), keep_ending, frame, count))
            for file, count in zip(files, frames, strict=True)
            for frame in range(count)
        ]
        if len({picture.name.casefold() for picture in pictures}) == len(pictures):
            break
    return pictures


def result_name(path: Path, keep_ending: bool, frame: int, count: int) -> str:
    name = (path if keep_ending else path.with_suffix("")).as_posix()
    return f"{name}_{frame:05d}" if count > 1 else name


def read_file(path: Path) -> Iterator[Image.Image]:
    """The pictures in a file, upright and in RGB."""
    return read_video(path) if path.suffix.lower() in VIDEOS else read_pictures(path)


def read_video(path: Path) -> Iterator[Image.Image]:
    """The frames of a video, upright and in RGB.

    Raises:
        InputError: PyAV is not installed, or the file cannot be decoded.
    """
    try:
        import av
    except ImportError as error:
        raise InputError(f"{path}: videos need PyAV: pip install 'pals_hf[video]'") from error
    found = False
    try:
        with av.open(str(path)) as video:
            for frame in video.decode(video=0):
                found = True
                yield frame.to_image().rotate(frame.rotation, expand=True)
    except (OSError, IndexError, av.FFmpegError) as error:
        raise InputError(f"{path} is not a readable video: {first_line(error)}") from error
    if not found:
        raise InputError(f"{path} is not a readable video: it has no frames")


def predict_all(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    files: list[Path],
    pictures: list[Picture],
    batch_size: int,
    options: dict[str, Any],
) -> Iterator[tuple[list[tuple[Picture, Image.Image]], list[Prediction]]]:
    """Batches of pictures, each with its image, and their predictions.

    Raises:
        InputError: the network cannot work on an image, for want of pixels or of memory, or its logits are NaN.
    """
    images = (image for file in files for image in read_file(file))
    pairs = zip(pictures, images, strict=True)
    with tqdm(total=len(pictures), desc="Predicting", disable=None) as progress:
        while batch := list(islice(pairs, batch_size)):
            try:
                predictions = predict(model, processor, [image for _, image in batch], **options)
            except (RuntimeError, ValueError) as error:
                raise InputError(
                    f"{batch[0][0].file}: the network fails on {batch[0][1].width}x{batch[0][1].height} pixels in a "
                    f"batch of {len(batch)}: {first_line(error)}: use another --window, or a smaller --batch_size"
                ) from error
            for (picture, _), prediction in zip(batch, predictions, strict=True):
                if not prediction.entropy.isfinite().all():
                    raise InputError(f"{picture.file}: the network's logits are not finite: its weights are of no use")
            yield batch, predictions
            progress.update(len(batch))


# ---- What comes out ----


def check_output_dir(args: argparse.Namespace, pictures: list[Picture]) -> None:
    """Refuse to write over anything, unless told to."""
    folder = args.output_dir
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file")
    wanted = [RESULTS, *(name for picture in pictures for name in file_names(picture, args.uncertainty).values())]
    existing = next((name for name in wanted if (folder / name).exists()), None)
    if existing is not None and not args.overwrite:
        raise InputError(f"output_dir {folder} already holds {existing}: use --overwrite or another folder")


def prepare_output_dir(folder: Path) -> None:
    """Make the folder, and take out of it what an earlier run wrote."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in written_before(folder):
            (folder / name).unlink(missing_ok=True)
        (folder / RESULTS).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"output_dir {folder} cannot be written: {error.strerror}") from error


def written_before(folder: Path) -> list[str]:
    try:
        report = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        names = [name for entry in report["images"] for name in entry["files"].values()]
    except (KeyError, OSError, TypeError, ValueError):  # none, or not from here
        return []
    return [name for name in names if (folder / name).resolve().is_relative_to(folder.resolve())]


def file_names(picture: Picture, uncertainty: bool) -> dict[str, str]:
    """The files of a picture's results in the output folder, by what they are."""
    kinds = ("overlay", "mask", "uncertainty") if uncertainty else ("overlay", "mask")
    return {kind: f"{picture.name}_{kind}.png" for kind in kinds}


def write_results(
    picture: Picture,
    image: Image.Image,
    prediction: Prediction,
    id2label: dict[int, str],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Write the pictures of a prediction.

    Returns:
        Its entry in the report.
    """
    mask, names = prediction.mask.numpy(), file_names(picture, args.uncertainty)
    (args.output_dir / picture.name).parent.mkdir(parents=True, exist_ok=True)
    overlay(image, mask, id2label).save(args.output_dir / names["overlay"])
    index_picture(mask, len(id2label)).save(args.output_dir / names["mask"])
    if args.uncertainty:
        heat_map(prediction.entropy / log(len(id2label))).save(args.output_dir / names["uncertainty"])
    pixels = np.bincount(mask.ravel(), minlength=len(id2label)).tolist()
    return {
        "file": picture.file.as_posix(),
        "frame": picture.frame,
        "width": image.width,
        "height": image.height,
        "mean_entropy": float(prediction.entropy.mean()),
        "classes": [
            {"id": index, "name": name, "pixels": pixels[index], "share": pixels[index] / mask.size}
            for index, name in id2label.items()
        ],
        "files": names,
    }


def revision_of(name_or_path: str) -> str | None:
    """The commit of a model from the Hub, None for one from a folder."""
    if Path(name_or_path).exists():
        return None
    config = try_to_load_from_cache(name_or_path, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None


def print_table(images: list[dict[str, Any]], num_classes: int) -> None:
    """Share of all pixels, and number of images, of each class that occurs."""
    pixels = np.array([[entry["pixels"] for entry in image["classes"]] for image in images])
    print(f"{'class':<20}{'share of pixels':>16}{'images':>8}")
    for index, entry in enumerate(images[0]["classes"]):
        if pixels[:, index].any():
            share, shown = pixels[:, index].sum() / pixels.sum(), (pixels[:, index] > 0).sum()
            print(f"{entry['name']:<20}{share:>16.2%}{shown:>8}")
    entropy = np.average([image["mean_entropy"] for image in images], weights=pixels.sum(axis=1))
    print(f"\n{len(images)} images, mean entropy {entropy:.3f} nats of at most {log(num_classes):.3f}")


if __name__ == "__main__":
    main()
