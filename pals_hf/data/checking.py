"""Check every image and mask once: decode both, compare their sizes, store the mask as class indices, count pixels.

The results are kept in the cache folder of `datasets`, so that the next run does not check again. The name of the
cache file is a hash of the files' names, sizes and times and of the meaning of the mask values.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tempfile
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

_FORMAT = 3  # of the cached results: increase it when they change
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
        classes: meaning of the mask values.
        fingerprint: a string that changes when the contents of the split change. Without it, nothing is cached.
        num_proc: number of processes.

    Returns:
        The valid samples, and the problem of each invalid sample by its id. Valid samples have the columns `id`,
        `image`, `labels` (class indices, and 255 for unlabelled pixels), `class_pixels` (number of pixels of each
        class, then of unlabelled pixels), `image_sha256` of the encoded image and `labels_sha256` of the class
        indices.
    """
    raw = split.cast_column("image", Image(decode=False)).cast_column("labels", Image(decode=False))
    meaning = f"{_FORMAT} {fingerprint} {len(classes.names)} {sorted(classes.codes.items())}"
    cache = None if fingerprint is None else cache_file(meaning)
    found = raw.map(
        lambda example: _check_pair(example, classes),
        features=_FOUND,
        remove_columns=raw.column_names,
        keep_in_memory=cache is None,
        cache_file_name=cache,
        new_fingerprint=hashlib.sha256(meaning.encode()).hexdigest()[:16],
        num_proc=num_proc,
        desc="Checking images and masks",
    )
    problems = {id: problem for id, problem in zip(split["id"], found["problem"], strict=True) if problem is not None}
    # The images are not copied: only the masks are stored again.
    found = found.remove_columns("problem").cast_column("labels", Image())
    checked = concatenate_datasets([split.select_columns(["id", "image"]), found], axis=1)
    checked = checked.select_columns(["id", "image", "labels", "class_pixels", "image_sha256", "labels_sha256"])
    if problems:
        checked = checked.select([index for index, id in enumerate(split["id"]) if id not in problems])
    return checked, problems


def fingerprint_of_files(paths: list[str]) -> str:
    """Hash the names, sizes and modification times of files, which is cheap and changes when a file is written."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        digest.update(f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def cache_file(contents: str) -> str | None:
    """Return the path of a cache file that is named by a hash of `contents`, or None if no folder is writable."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "pals_hf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:  # the folder may belong to somebody else, and its disk may be full
        return None
    return str(folder / f"{hashlib.sha256(contents.encode()).hexdigest()[:32]}.arrow")


def hash_of_labels(labels: np.ndarray) -> str:
    """Return the SHA-256 of class indices `(H, W)`, independent of the file format."""
    return hashlib.sha256(f"{labels.shape} ".encode() + labels.tobytes()).hexdigest()


def raise_first_problem(problems: dict[str, str]) -> None:
    """Raise `InputError` for the first of the problems that [`check_split`] found, if there are any."""
    if problems:
        first, *others = problems.values()
        more = f" and {len(others)} more" if others else ""
        raise InputError(f"{first} (Set skip_bad_samples to skip this sample{more}.)")


def check_labels(train: Dataset, classes: Classes) -> None:
    """Make sure that a checked training split has labels of at least two classes.

    Raises:
        InputError: the split is empty, or has labels of one class or none.
    """
    if len(train) == 0:
        raise InputError("the training split contains no valid images")
    *pixels, unlabelled = np.sum(train["class_pixels"], axis=0)
    present = [name for name, count in zip(classes.names, pixels, strict=True) if count]
    if len(present) >= 2:
        return
    found = f"labels of the class {present[0]!r} only" if present else "no labels"
    hint = "Check void_labels."
    if unlabelled and not classes.by_color:
        hint += " The value 255 always means no label. If 255 is a class, give a palette file, which names colours."
    raise InputError(f"the training images have {found}, but training needs at least two classes. {hint}")


def _check_pair(example: dict[str, Any], classes: Classes) -> dict[str, Any]:
    """Return the row that is stored for one image and mask, which may be the problem with them."""
    try:
        _, labels, image_hash = read_pair(example, classes)
    except InputError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno not in (None, errno.ENOENT):
            raise  # a problem of the disk or its permissions must not be cached as a problem of the image
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
        The upright image, its labels (class indices and 255, uint8 `(H, W)`), and the SHA-256 of its bytes.

    Raises:
        InputError: the image or the mask cannot be read, the mask holds an unknown value, or their sizes differ.
    """
    image, image_hash, image_name = _decode(example, "image")
    mask, _, mask_name = _decode(example, "labels")
    try:
        labels = classes.encode(mask)
    except InputError as error:
        raise InputError(f"{mask_name}: {error}") from error
    labels = _rotate_like(labels, mask, image)
    upright = ImageOps.exif_transpose(image)
    if is_deep(upright):
        raise InputError(
            f"{image_name}: images with more than 8 bits per channel (mode {upright.mode}) are not supported. Convert "
            "the image to 8 bits."
        )
    if labels.shape != (upright.height, upright.width):
        raise InputError(
            f"{mask_name}: the mask has {mask.width}x{mask.height} pixels, but its image {image_name} has "
            f"{upright.width}x{upright.height}. Both must have the same size."
        )
    return upright, labels, image_hash


def is_deep(picture: Picture) -> bool:
    """Return whether a picture has more than 8 bits per channel (`I`, `I;16`, `F`, ...), which PIL clips in RGB."""
    return picture.mode.startswith(("I", "F"))


def _decode(example: dict[str, Any], column: str) -> tuple[Picture, str, str]:
    """Return a picture as it is stored (not rotated), the hash of its bytes, and its name for messages."""
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
    if picture.format == "PNG" and content[25] == 0:  # grey, with the number of bits in the header
        picture.info["grey_bits"] = content[24]
    return picture, hashlib.sha256(content).hexdigest(), name


def _rotate_like(labels: np.ndarray, mask: Picture, image: Picture) -> np.ndarray:
    """Rotate labels like their image, which cameras store as the sensor was held, with an orientation tag (EXIF).

    A mask with an orientation tag of its own follows that tag. A mask without a tag is rotated with the image if it
    has the size of the stored image and not of the upright image. If both sizes are equal, the mask is taken as
    upright.
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
