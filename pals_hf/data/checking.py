"""Check every image and mask once: decode both, compare their sizes, store the mask as class indices, count pixels.

The results are kept in the cache folder of `datasets`, so that the next run does not check again. Their name is a hash
of the files' names, sizes and times and of the meaning of the mask values.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from PIL import Image as PILImage
from PIL import ImageOps

from ..errors import InputError, first_line
from ..files import read_bytes
from .annotations.drawing import Sizes
from .caching import cached_map
from .classes import Classes, Color, Palettes
from .pictures import (
    RGB,
    Depth,
    decode_any,
    decode_picture,
    orientation_of_mask,
    refuse_deep,
    refuse_other_bands,
    size_of,
    turn,
)

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

LOOKED_AT = 1000  # images of a stream that are read before training, if labels are scarce
_FORMAT = 5  # of the cached results: increase it when they change
_FOUND = Features(
    {
        "labels": Image(decode=False),
        "class_pixels": List(Value("int64")),
        "image_sha256": Value("string"),
        "labels_sha256": Value("string"),
        "palette": Value("string"),  # the mask's name and the colours of its values, as JSON
        "depth": Value("string"),  # of a deep image, as JSON
        "problem": Value("string"),
    }
)


def check_split(
    split: Dataset,
    classes: Classes,
    palettes: Palettes,
    depths: Depths,
    *,
    channels: int = RGB,
    fingerprint: str | None = None,
    num_proc: int | None = None,
) -> tuple[Dataset, dict[str, str]]:
    """Check all pairs of a split.

    Args:
        split: columns `id`, `image` and `labels`, the latter two of feature `Image`.
        classes: meaning of the mask values.
        palettes: the palettes of the masks so far, to which those of this split are added.
        depths: the depths of the images so far, to which those of this split are added.
        channels: the number of channels of the network, see [`decode_any`].
        fingerprint: a string that changes when the contents of the split change. Without it, nothing is cached.
        num_proc: number of processes.

    Returns:
        The valid samples, and the problem of each invalid sample by its id. Valid samples have the columns `id`,
        `image`, `labels` (class indices, and 255 for unlabelled pixels), `class_pixels` (number of pixels of each
        class, then of unlabelled pixels), `image_sha256` of the encoded image and `labels_sha256` of the class
        indices.

    Raises:
        InputError: two masks show a value in different colours, see [`Palettes`], or two images differ in depth.
    """
    raw = split.cast_column("image", Image(decode=False)).cast_column("labels", Image(decode=False))
    meaning = f"{_FORMAT} {fingerprint} {len(classes.names)} {sorted(classes.codes.items())} {channels}"
    if classes.annotations is not None:
        meaning += f" {classes.annotations}"
    found = cached_map(
        raw,
        lambda example: _check_pair(example, classes, channels),
        None if fingerprint is None else meaning,
        features=_FOUND,
        remove_columns=raw.column_names,
        num_proc=num_proc,
        desc="Checking images and masks",
    )
    problems = {id: problem for id, problem in zip(split["id"], found["problem"], strict=True) if problem is not None}
    for palette in filter(None, found["palette"]):
        name, colors = json.loads(palette)
        palettes.add(name, {int(value): tuple(color) for value, color in colors.items()})
    for id, depth in zip(split["id"], found["depth"], strict=True):
        if id not in problems:
            depths.add(id, None if depth is None else Depth(*json.loads(depth)))
    # The images are not copied: only the masks are stored again.
    found = found.remove_columns(["palette", "depth", "problem"]).cast_column("labels", Image())
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


def hash_of_labels(labels: np.ndarray) -> str:
    """Return the SHA-256 of class indices `(H, W)`, independent of the file format."""
    return hashlib.sha256(f"{labels.shape} ".encode() + labels.tobytes()).hexdigest()


class Depths:
    """The depth of the images of a data set, which must be the same for all of them.

    Attributes:
        depth: their depth, or None if all of them are usual pictures of at most 8 bits.
    """

    def __init__(self) -> None:
        self.depth: Depth | None = None
        self._first: str | None = None

    def add(self, id: str, depth: Depth | None) -> None:
        """Add an image.

        Raises:
            InputError: its depth is not that of the first image.
        """
        if self._first is None:
            self._first, self.depth = id, depth
        if depth != self.depth:
            one, other = (each or "8 bits per channel" for each in (depth, self.depth))
            raise InputError(
                f"image {id!r} has {one}, but image {self._first!r} has {other}. All images must have the same "
                "depth and number of bands. Convert or remove the others."
            )


def raise_first_problem(problems: dict[str, str]) -> None:
    """Raise `InputError` for the first of the problems that [`check_split`] found, if there are any."""
    if problems:
        first, *others = problems.values()
        more = f" and {len(others)} more" if others else ""
        raise InputError(f"{first} (Set skip_bad_samples to skip this sample{more}.)")


def refuse_empty(split: Dataset, name: str, problems: dict[str, str]) -> None:
    """Raise `InputError` if no image of a split is left, with the problem of the first one."""
    if len(split) == 0:
        reasons = f": {len(problems)} samples failed a check. {next(iter(problems.values()))}" if problems else ""
        raise InputError(f"the {name} split contains no valid images{reasons}")


class LabelCount:
    """Count the labelled pixels of a split, and say whether the images can be trained on or scored.

    Args:
        classes: the classes of the split.
        name: the name of the images, like "training".
        is_training: whether the labels must show two classes, or any.
    """

    def __init__(self, classes: Classes, name: str, is_training: bool):
        self.classes, self.name, self.is_training = classes, name, is_training
        self.pixels = np.zeros(len(classes.names) + 1, dtype=np.int64)

    def add(self, class_pixels: Sequence[int]) -> LabelCount:
        """Add the pixels of each class, then the unlabelled pixels, of one or more images."""
        self.pixels += np.asarray(class_pixels, dtype=np.int64)
        return self

    @property
    def is_enough(self) -> bool:
        """Whether two classes are labelled, or for validation one class and no pixel is left that may be another."""
        present = np.count_nonzero(self.pixels[:-1])
        may_be_class = self.pixels[-1] > 0 and self.classes.has_raw_values
        return present >= 2 or (present == 1 and not self.is_training and not may_be_class)

    def check(self) -> None:
        """Raise `InputError` if the labels are not enough."""
        if self.is_enough:
            return
        *pixels, unlabelled = self.pixels
        present = [name for name, count in zip(self.classes.names, pixels, strict=True) if count]
        found = f"labels of the class {present[0]!r} only" if present else "no labels"
        but = "training needs at least two classes" if self.is_training else "without labels there is no score"
        if present and not self.is_training:
            but = "also unlabelled pixels, which may be another class"
        hint = "Check void_labels." if self.classes.annotations is None else "Check the annotations and unlabelled."
        if unlabelled and self.classes.has_raw_values:
            hint += " The value 255 always means no label."
            is_binary = len(self.classes.names) == 2
            other = f"name it by 255 in id2label: {{'0': {self.classes.names[0]!r}, '255': {self.classes.names[1]!r}}}"
            hint += f" If 255 is a class, {other if is_binary else 'give a palette file, which names colours'}."
        raise InputError(f"the {self.name} images have {found}, but {but}. {hint}")


def check_labels(split: Dataset, classes: Classes, name: str, is_training: bool) -> None:
    """Make sure that a checked split has labels: of at least two classes for training, of any for validation.

    Raises:
        InputError: the labels are not enough.
    """
    LabelCount(classes, name, is_training).add(np.sum(split["class_pixels"], axis=0)).check()


def check_stream(
    rows: Iterable[dict[str, Any]], classes: Classes, name: str, is_training: bool, skip_bad_samples: bool
) -> None:
    """Read a stream until its labels are enough to train on or to score, at most [`LOOKED_AT`] images.

    Args:
        rows: encoded images and masks.
        classes: meaning of the mask values.
        name: the name of the images, like "training".
        is_training: as in [`LabelCount`].
        skip_bad_samples: skip samples that fail a check.

    Raises:
        InputError: a sample fails a check, or the labels are not enough.
    """
    count, problems, number = LabelCount(classes, name, is_training), {}, 0
    for row in itertools.islice(rows, LOOKED_AT):
        number += 1
        try:
            pair = read_pair(row, classes)
        except InputError as error:
            if not skip_bad_samples:
                raise
            problems[row["id"]] = str(error)
            continue
        if count.add(count_pixels(pair.labels, classes)).is_enough:
            return
    refuse_empty(range(number - len(problems)), name, problems)
    if number == LOOKED_AT:
        count.name = f"first {LOOKED_AT} {name}"
    count.check()


def is_black_and_white(class_pixels: np.ndarray) -> bool:
    """Tell whether masks of two classes, 0 and 1, hold 0 and 255 only, by the numbers of their pixels."""
    first, second, unlabelled = class_pixels.tolist()
    return first > 0 and second == 0 and unlabelled > 0


def shows_black_and_white(streams: Iterable[Iterable[dict[str, Any]]], classes: Classes) -> bool:
    """Tell whether the first masks of streams hold 0 and 255 only, as far as they can be read."""
    pixels = np.zeros(3, dtype=np.int64)
    for row in itertools.chain.from_iterable(itertools.islice(rows, LOOKED_AT) for rows in streams):
        with suppress(InputError):  # which is raised by `check_stream`, unless it is to be skipped
            pixels += count_pixels(read_pair(row, classes).labels, classes)
        if pixels[1]:
            return False
    return is_black_and_white(pixels)


class Pair(NamedTuple):
    """A decoded and checked image and mask."""

    image: Picture | np.ndarray
    """The upright image. A deep one is an array, see [`decode_any`]."""
    labels: np.ndarray
    """Class indices and 255, uint8 `(H, W)`."""
    image_sha256: str
    """SHA-256 of the encoded image."""
    mask_name: str
    """The mask's name, for messages."""
    colors: dict[int, Color]
    """The colours in the mask's palette, see [`Classes.colors_of`]."""

    @property
    def depth(self) -> Depth | None:
        """The depth of a deep image, or None."""
        return Depth.of(self.image) if isinstance(self.image, np.ndarray) else None


def _check_pair(example: dict[str, Any], classes: Classes, channels: int) -> dict[str, Any]:
    """Return the row that is stored for one image and mask, which may be the problem with them."""
    try:
        pair = read_pair(example, classes, channels)
    except InputError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno not in (None, errno.ENOENT):
            raise  # a problem of the disk or its permissions must not be cached as a problem of the image
        return {**dict.fromkeys(_FOUND), "problem": str(error)}
    buffer = io.BytesIO()
    PILImage.fromarray(pair.labels).save(buffer, format="png", compress_level=1)
    return {
        "labels": {"bytes": buffer.getvalue(), "path": None},
        "class_pixels": count_pixels(pair.labels, classes),
        "image_sha256": pair.image_sha256,
        "labels_sha256": hash_of_labels(pair.labels),
        "palette": json.dumps([pair.mask_name, pair.colors]) if pair.colors else None,
        "depth": json.dumps(pair.depth) if pair.depth else None,
        "problem": None,
    }


def count_pixels(labels: np.ndarray, classes: Classes) -> list[int]:
    """Count the pixels of each class, then the unlabelled pixels."""
    counts = np.bincount(labels.ravel(), minlength=256)
    return [*counts[: len(classes.names)].tolist(), int(counts[255])]


def read_pair(example: dict[str, Any], classes: Classes, channels: int | None = None) -> Pair:
    """Decode and check an encoded image and its mask.

    Args:
        example: encoded `image` and `labels`.
        classes: meaning of the mask values.
        channels: the number of channels of the network, see [`decode_any`]. Default: 3, and deep images are refused.

    Raises:
        InputError: the image or the mask cannot be read, the mask holds an unknown value, or their sizes differ.
    """
    content, image_name = _encoded(example, "image")
    image = decode_picture(content, image_name) if channels is None else decode_any(content, image_name, channels)
    is_deep = isinstance(image, np.ndarray)
    upright = image if is_deep else ImageOps.exif_transpose(image)  # deep images are stored upright
    height, width = size_of(upright)
    mask_content, mask_name = _encoded(example, "labels")
    if classes.annotations is None:
        mask = decode_picture(mask_content, mask_name)
    else:
        with _naming(mask_name):
            mask = classes.annotations.draw(
                mask_content, Sizes((width, height), (width, height) if is_deep else image.size)
            )
    with _naming(mask_name):
        labels = classes.encode(mask)
    if channels is None:
        with _naming(image_name):
            refuse_deep(image, image.info["bits"], "by a stream. Train without streaming, or convert them to 8 bits.")
    if is_deep:
        refuse_other_bands(image, image_name, channels)
    orientation = orientation_of_mask(mask, mask if is_deep else image)
    if orientation is not None:
        labels = np.asarray(turn(PILImage.fromarray(labels), orientation))
    if labels.shape != (height, width):
        raise InputError(
            f"{mask_name}: the mask has {mask.width}x{mask.height} pixels, but its image {image_name} has "
            f"{width}x{height}. Both must have the same size."
        )
    return Pair(upright, labels, hashlib.sha256(content).hexdigest(), mask_name, classes.colors_of(mask))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the name of a file before the message of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _encoded(example: dict[str, Any], column: str) -> tuple[bytes, str]:
    """Return the bytes of an encoded picture, and its name for messages."""
    encoded = example[column]
    if encoded is None:
        raise InputError(f"{column} of {example['id']} is missing")
    name = encoded["path"] or f"{column} of {example['id']}"
    if encoded["bytes"] is None and encoded["path"] is None:
        raise InputError(f"{name} is empty: it has neither bytes nor a path")
    try:
        return encoded["bytes"] if encoded["bytes"] is not None else read_bytes(encoded["path"]), name
    except (OSError, ValueError) as error:
        raise InputError(f"{name} is not a readable image: {first_line(error)}") from error
