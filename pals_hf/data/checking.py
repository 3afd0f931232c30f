"""Look at every image and mask once: decode, check that they fit, store the mask as class indices, count pixels.

What was found is kept in the cache folder of `datasets`, under a name made from the files' names, sizes and times and
from what the masks mean, so that the next run does not look again.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets import Dataset, Features, Image, Sequence, Value, concatenate_datasets
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage

from ..errors import InputError, first_line
from .classes import Classes

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_FORMAT = 2  # of what is stored: raise it when that changes
_QUARTER_TURNS = {5, 6, 7, 8}  # orientations that swap width and height
_FOUND = Features(
    {
        "labels": Image(decode=False),
        "class_pixels": Sequence(Value("int64")),
        "image_sha256": Value("string"),
        "labels_sha256": Value("string"),
        "problem": Value("string"),
    }
)


def check_split(
    split: Dataset, classes: Classes, *, fingerprint: str | None = None, num_proc: int | None = None
) -> tuple[Dataset, dict[str, str]]:
    """Check all pairs of a split.

    Args:
        split: columns `id`, `image` and `labels`, the latter two of feature `Image`.
        classes: what the masks mean.
        fingerprint: stands for the contents of the split in the name of the cache; without it nothing is cached.
        num_proc: processes that look.

    Returns:
        The good examples, and what is wrong with the others by their id. The masks of the good ones are class indices
        and 255; their columns are `id`, `image`, `labels`, `class_pixels` (pixels of each class, void last), and the
        hashes `image_sha256` of the encoded image and `labels_sha256` of the class indices.
    """
    raw = split.cast_column("image", Image(decode=False)).cast_column("labels", Image(decode=False))
    meaning = f"{_FORMAT} {fingerprint} {len(classes.names)} {sorted(classes.codes.items())}"
    cache = None if fingerprint is None else cache_file(meaning)
    found = raw.map(
        lambda example: _look_at(example, classes),
        features=_FOUND,
        remove_columns=raw.column_names,
        keep_in_memory=cache is None,
        cache_file_name=cache,
        new_fingerprint=hashlib.sha256(meaning.encode()).hexdigest()[:16],
        num_proc=num_proc,
        desc="Checking images and masks",
    )
    problems = {id: problem for id, problem in zip(split["id"], found["problem"], strict=True) if problem is not None}
    # The images stay where they are: only the masks are stored anew.
    found = found.remove_columns("problem").cast_column("labels", Image())
    checked = concatenate_datasets([split.select_columns(["id", "image"]), found], axis=1)
    checked = checked.select_columns(["id", "image", "labels", "class_pixels", "image_sha256", "labels_sha256"])
    if problems:
        checked = checked.select([index for index, id in enumerate(split["id"]) if id not in problems])
    return checked, problems


def fingerprint_of_files(paths: list[str]) -> str:
    """Names, sizes and times of files: cheap to get, and different when one of them has been written."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        digest.update(f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def cache_file(contents: str) -> str | None:
    """Where to keep what was made from `contents`, or None where nothing can be kept."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "pals_hf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a machine without a home to write to
        return None
    return str(folder / f"{hashlib.sha256(contents.encode()).hexdigest()[:32]}.arrow")


def hash_of_labels(labels: np.ndarray) -> str:
    """SHA-256 of class indices `(H, W)`, whatever they were encoded as."""
    return hashlib.sha256(f"{labels.shape} ".encode() + labels.tobytes()).hexdigest()


def _look_at(example: dict[str, Any], classes: Classes) -> dict[str, Any]:
    """What is stored of one image and mask, or what is wrong with them."""
    try:
        _, labels, image_hash = read_pair(example, classes)
    except InputError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno not in (None, errno.ENOENT):
            raise  # the disk or its permissions are to blame: not to be kept as what is wrong with the image
        return {**dict.fromkeys(_FOUND), "problem": str(error)}
    buffer = io.BytesIO()
    PILImage.fromarray(labels).save(buffer, format="png", compress_level=1)
    counts = np.bincount(labels.ravel(), minlength=256)
    return {
        "labels": {"bytes": buffer.getvalue(), "path": None},
        "class_pixels": [*counts[: len(classes.names)].tolist(), int(counts[255])],
        "image_sha256": image_hash,
        "labels_sha256": hash_of_labels(labels),
        "problem": None,
    }


def read_pair(example: dict[str, Any], classes: Classes) -> tuple[Picture, np.ndarray, str]:
    """Decode and check an encoded image and its mask.

    Returns:
        The image as it is shown, its labels (class indices and 255, uint8 `(H, W)`), and the SHA-256 of its bytes.

    Raises:
        InputError: one of them cannot be read, the mask holds what has no meaning, or their sizes differ.
    """
    image, image_hash, image_name = _decode(example, "image")
    mask, _, mask_name = _decode(example, "labels")
    try:
        labels = classes.encode(mask)
    except InputError as error:
        raise InputError(f"{mask_name}: {error}") from error
    labels = _turn_alike(labels, mask, image)
    upright = ImageOps.exif_transpose(image)
    if is_deep(upright):
        raise InputError(f"{image_name}: images of more than 8 bits a channel (mode {upright.mode}) are not read")
    if labels.shape != (upright.height, upright.width):
        raise InputError(
            f"{mask_name}: the mask has {mask.width}x{mask.height} pixels, its image {image_name} "
            f"{upright.width}x{upright.height}: they must agree"
        )
    return upright, labels, image_hash


def is_deep(picture: Picture) -> bool:
    """Whether a picture has channels of more than 8 bits (`I`, `I;16`, `I;16B`, `F`, ...), which PIL clips to RGB."""
    return picture.mode.startswith(("I", "F"))


def _decode(example: dict[str, Any], column: str) -> tuple[Picture, str, str]:
    """An encoded picture as it is stored (not turned), the hash of its bytes, and its name for messages."""
    encoded = example[column]
    if encoded is None:
        raise InputError(f"{column} of {example['id']} is missing")
    name = encoded["path"] or f"{column} of {example['id']}"
    try:
        content = encoded["bytes"] if encoded["bytes"] is not None else Path(encoded["path"]).read_bytes()
        if not content:
            raise ValueError("the file is empty")
        picture = PILImage.open(io.BytesIO(content))
        picture.load()
    except PILImage.UnidentifiedImageError as error:
        raise InputError(f"{name} is not a readable image: its format is not known") from error
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        raise InputError(f"{name} is not a readable image: {first_line(error)}") from error
    if picture.format == "PNG" and content[25] == 0:  # grey: the header says in how many bits
        picture.info["grey_bits"] = content[24]
    return picture, hashlib.sha256(content).hexdigest(), name


def _turn_alike(labels: np.ndarray, mask: Picture, image: Picture) -> np.ndarray:
    """Labels as the image is shown: cameras store pictures as the sensor was held, with a note on how to turn them.

    A mask with a note of its own follows it. One without, as large as the stored image and not as the shown one, was
    drawn on the stored image and is turned with it. Where the size does not tell, it was drawn on what was shown.
    """
    orientation = mask.getexif().get(ExifTags.Base.Orientation)
    if orientation is None and mask.size == image.size and image.width != image.height:
        noted = image.getexif().get(ExifTags.Base.Orientation)
        orientation = noted if noted in _QUARTER_TURNS else None
    if orientation is None:
        return labels
    picture = PILImage.fromarray(labels)
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(picture))
