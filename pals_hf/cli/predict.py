"""Segment an image, a folder of images or a video with a trained model.

    pals-hf predict street.jpg --model runs/mine --output_dir predictions
    pals-hf predict photos --model runs/mine --output_dir predictions --uncertainty
    pals-hf predict large --model runs/mine --output_dir predictions --window 512 512 --flip

The model is a folder or a name on the Hub. For each image NAME, or video frame NAME_00012, the program writes:

- `NAME_overlay.png`: the image blended with the colours of its classes, and a legend;
- `NAME_mask.png`: the class indices, as a palette PNG in the same colours;
- `NAME_uncertainty.png`, with `--uncertainty`: the entropy of the C class probabilities divided by its maximum, log C.

NAME is the path of the image in the input folder without its extension. If two names are equal, all images keep their
extensions. `predictions.json` lists the model and the size, mean entropy and class shares of each image.

A model that was trained on images of more than 8 bits, or of other than three bands, is given such images. They are
scaled as its training images were.

Without `--window`, `--flip` and `--batch_size` the masks equal those of `pipeline("image-segmentation")`. Animated
GIF, PNG and WebP files are read frame by frame. Other videos need PyAV, from the extra `video`. All files are decoded
once before the first prediction, so a damaged file ends the program with one line and exit code 2, and nothing is
written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from tqdm import tqdm

from ..data.classes import MAX_CLASSES
from ..data.pictures import size_of
from ..data.scaling import Scaling
from ..errors import InputError, first_line
from ..files import make_folder, read_json, refuse_unwritable, walk, write_result
from ..inference import Prediction, load_for_inference, predict, read_pictures
from ..options import check_size
from ..pretrained import load_processor
from ..visualize import heat_map, index_picture, overlay
from .ending import one_line
from .parser import OneLineParser

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

RESULTS = "predictions.json"
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
KINDS = ("overlay", "mask", "uncertainty")
_ENDINGS = tuple(f"_{kind}.png" for kind in KINDS)
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")


class Picture(NamedTuple):
    """An image, or a frame of an animation or a video."""

    file: Path
    frame: int | None
    name: str  # the names of its result files begin with this


@one_line()
def main(argv: list[str] | None = None) -> None:
    """Run the program on a command line, by default that of this process."""
    args = parse_arguments(argv)
    root, files = find_files(args.input, args.output_dir)
    pictures = list_pictures(root, files, Scaling.of(load_processor(args.model, "the model")))
    check_output_dir(args, pictures)
    model, processor = load_for_inference(args.model, args.device)
    num_classes = model.config.num_labels
    if num_classes > MAX_CLASSES:
        raise InputError(f"{args.model} has {num_classes} classes, but a mask can hold at most {MAX_CLASSES}")
    options = {"window": args.window, "overlap": args.overlap, "flip": args.flip}
    report = {"model": args.model, "revision": revision_of(args.model), **options, "images": []}
    for batch, predictions in predict_all(model, processor, files, pictures, args.batch_size, options):
        if not report["images"]:  # only now, because the network may fail on the first batch
            prepare_output_dir(args.output_dir)
        for (picture, image), prediction in zip(batch, predictions, strict=True):
            report["images"].append(write_results(picture, image, prediction, model.config.id2label, args))
    write_result(args.output_dir / RESULTS, json.dumps(report, indent=2, ensure_ascii=False))
    print_table(report["images"], num_classes)
    print(f"\nThe results are in {args.output_dir}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="pals-hf predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, help="Image, folder of images (including subfolders), or video.")
    parser.add_argument("--model", required=True, help="Folder of a trained model, or its name on the Hub.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the results.")
    parser.add_argument("--uncertainty", action="store_true", help="Also write NAME_uncertainty.png.")
    parser.add_argument(
        "--window",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="Predict with sliding windows of this height and width, in pixels of the image that the image processor "
        "has resized.",
    )
    parser.add_argument(
        "--overlap", type=float, default=1 / 3, help="Share of a window that the next window overlaps. Default: 1/3."
    )
    parser.add_argument("--flip", action="store_true", help="Average the logits of the image and of its mirror image.")
    parser.add_argument("--batch_size", type=int, default=1, help="Number of images per forward pass. Default: 1.")
    parser.add_argument("--device", help="Device of the model, like cpu or cuda:1. Default: a GPU if there is one.")
    parser.add_argument("--overwrite", action="store_true", help="Replace earlier predictions in --output_dir.")
    args = parser.parse_args(argv)
    check_size("window", args.window)
    if not 0.0 <= args.overlap < 1.0:
        raise InputError(f"overlap must lie in [0, 1), got {args.overlap}")
    if args.batch_size < 1:
        raise InputError(f"batch_size must be positive, got {args.batch_size}")
    return args


# ---- Input ----


def find_files(given: Path, output_dir: Path) -> tuple[Path, list[Path]]:
    """Return the folder that names are relative to, and the sorted files.

    Raises:
        InputError: there is no image, or the images are in the output folder itself.
    """
    if given.is_file():
        return given.parent, [given]
    if not given.is_dir():
        raise InputError(f"{given} is neither a file nor a folder")
    output = output_dir.resolve()
    if output == given.resolve():
        raise InputError(f"output_dir {output_dir} is the folder of the images. Choose another folder.")
    # Earlier results in a subfolder of the input are not images. An output folder around the input excludes nothing.
    within = output.is_relative_to(given.resolve())
    files = sorted(
        path
        for place, names in walk(given, onerror=_unreadable)
        for path in (Path(place, name) for name in names)
        if path.suffix.lower() in IMAGES
        and not path.name.startswith(".")
        and not (within and path.resolve().is_relative_to(output))
    )
    if not files:
        raise InputError(f"{given} has no images. The supported extensions are {', '.join(IMAGES)}.")
    return given, files


def _unreadable(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def list_pictures(root: Path, files: list[Path], scaling: Scaling | None) -> list[Picture]:
    """List every image and frame in the files, each with a unique name.

    Raises:
        InputError: a file cannot be decoded.
    """
    frames = [sum(1 for _ in read_file(file, scaling)) for file in tqdm(files, desc="Checking files", disable=None)]
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


def read_file(path: Path, scaling: Scaling | None) -> Iterator[Image.Image | np.ndarray]:
    """Yield the image or the frames in a file, see [`read_pictures`].

    Raises:
        InputError: the file cannot be decoded, or is a video and the model reads deep pictures.
    """
    if path.suffix.lower() not in VIDEOS:
        return read_pictures(path, scaling=scaling)
    if scaling is not None:
        raise InputError(f"{path} is a video, but the model was trained on {scaling.depth}. Give it such images.")
    return read_video(path)


def read_video(path: Path) -> Iterator[Image.Image]:
    """Yield the frames of a video, upright and in RGB.

    Raises:
        InputError: PyAV is not installed, or the file cannot be decoded.
    """
    try:
        import av
    except ImportError as error:
        raise InputError(f"{path}: videos need PyAV. Install it with: pip install 'pals_hf[video]'") from error
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
) -> Iterator[tuple[list[tuple[Picture, Image.Image | np.ndarray]], list[Prediction]]]:
    """Yield batches of pictures with their images, and the predictions for each batch.

    Raises:
        InputError: the network fails on an image that is too small or too large for it, or its logits are not finite.
    """
    scaling = Scaling.of(processor)
    images = (image for file in files for image in read_file(file, scaling))
    pairs = zip(pictures, images, strict=True)
    with tqdm(total=len(pictures), desc="Predicting", disable=None) as progress:
        while batch := list(islice(pairs, batch_size)):
            try:
                predictions = predict(model, processor, [image for _, image in batch], **options)
            except Exception as error:  # a network may fail in any way on an image that it was not made for
                (picture, image), *_ = batch
                height, width = size_of(image)
                raise InputError(
                    f"{picture.file}: the network fails on {width}x{height} pixels in a batch of "
                    f"{len(batch)} ({first_line(error)}). Use another --window, or a smaller --batch_size."
                ) from error
            for (picture, _), prediction in zip(batch, predictions, strict=True):
                if not prediction.entropy.isfinite().all():
                    raise InputError(f"{picture.file}: the logits are not finite. Choose another checkpoint.")
            yield batch, predictions
            progress.update(len(batch))


# ---- Output ----


def check_output_dir(args: argparse.Namespace, pictures: list[Picture]) -> None:
    """Check that no file would be overwritten, unless `--overwrite` is given.

    Raises:
        InputError: the output folder cannot be written to, or contains a file that would be overwritten.
    """
    folder = args.output_dir
    refuse_unwritable(folder)
    wanted = [RESULTS, *(name for picture in pictures for name in file_names(picture, args.uncertainty).values())]
    existing = next((name for name in wanted if (folder / name).exists()), None)
    if existing is not None and not args.overwrite:
        raise InputError(f"output_dir {folder} already contains {existing}. Use --overwrite or another folder.")


def prepare_output_dir(folder: Path) -> None:
    """Create the folder, and delete the results of an earlier run from it.

    Raises:
        InputError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in written_before(folder):
            path.unlink(missing_ok=True)
        (folder / RESULTS).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"output_dir {folder} cannot be written: {error.strerror}") from error


def written_before(folder: Path) -> list[Path]:
    """Return the pictures in the folder that its report lists.

    Another program may have written the report, so it is believed only where a picture has a name that this program
    gives, and is a file in this folder that no link on the way leads out of.
    """
    try:
        names = [name for entry in read_json(folder / RESULTS)["images"] for name in entry["files"].values()]
    except (AttributeError, InputError, KeyError, TypeError):  # there is no report, or not one of this program
        return []
    paths = [folder / name for name in names if isinstance(name, str) and name.endswith(_ENDINGS) and "\0" not in name]
    top = folder.resolve()
    inside = [path for path in paths if path.resolve().is_relative_to(top) and ".." not in path.parts]
    return [path for path in inside if path.is_file() and not path.is_symlink()]


def file_names(picture: Picture, uncertainty: bool) -> dict[str, str]:
    """Map each kind of result to its file name in the output folder."""
    return {kind: f"{picture.name}_{kind}.png" for kind in KINDS[: 3 if uncertainty else 2]}


def write_results(
    picture: Picture,
    image: Image.Image | np.ndarray,
    prediction: Prediction,
    id2label: dict[int, str],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Write the pictures of a prediction, and return its entry in the report."""
    mask, names = prediction.mask.numpy(), file_names(picture, args.uncertainty)
    height, width = size_of(image)
    make_folder((args.output_dir / picture.name).parent)
    write_result(args.output_dir / names["overlay"], overlay(image, mask, id2label))
    write_result(args.output_dir / names["mask"], index_picture(mask, len(id2label)))
    if args.uncertainty:
        heat = heat_map(prediction.entropy / log(len(id2label)))
        write_result(args.output_dir / names["uncertainty"], heat)
    pixels = np.bincount(mask.ravel(), minlength=len(id2label)).tolist()
    return {
        "file": picture.file.as_posix(),
        "frame": picture.frame,
        "width": width,
        "height": height,
        "mean_entropy": float(prediction.entropy.mean()),
        "classes": [
            {"id": index, "name": name, "pixels": pixels[index], "share": pixels[index] / mask.size}
            for index, name in id2label.items()
        ],
        "files": names,
    }


def revision_of(name_or_path: str) -> str | None:
    """Return the commit of a model on the Hub, or None for a model in a folder."""
    if Path(name_or_path).exists():
        return None
    config = try_to_load_from_cache(name_or_path, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None


def print_table(images: list[dict[str, Any]], num_classes: int) -> None:
    """Print the share of all pixels and the number of images of each class that occurs."""
    pixels = np.array([[entry["pixels"] for entry in image["classes"]] for image in images])
    print(f"{'class':<20}{'share of pixels':>16}{'images':>8}")
    for index, entry in enumerate(images[0]["classes"]):
        if pixels[:, index].any():
            share, shown = pixels[:, index].sum() / pixels.sum(), (pixels[:, index] > 0).sum()
            print(f"{entry['name']:<20}{share:>16.2%}{shown:>8}")
    entropy = np.average([image["mean_entropy"] for image in images], weights=pixels.sum(axis=1))
    print(f"\n{len(images)} images, mean entropy {entropy:.3f} nats (the maximum is {log(num_classes):.3f})")
