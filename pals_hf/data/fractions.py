"""Reproducible fractions of a training set: seeded, nested, and the same on every process and machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..files import atomic_write_text, has_type, read_bytes

if TYPE_CHECKING:
    from datasets import Dataset

METHODS = ("random", "balanced")
MANIFEST = "train_fraction.json"  # in a run's folder


def order_ids(ids: Iterable[str], seed: int | str = 0) -> list[str]:
    """Sort ids in a pseudo-random order: by `sha256(f"{seed}/{id}")`.

    The result depends only on the set of ids and the seed, not on the process, the machine or the version of a random
    number generator.

    Raises:
        InputError: there are no ids, or an id occurs twice.
    """
    order = sorted(ids, key=lambda identifier: hashlib.sha256(f"{seed}/{identifier}".encode()).digest())
    if not order:
        raise InputError("there are no images to draw a fraction from")
    if len(set(order)) < len(order):
        duplicate = next(first for first, second in pairwise(order) if first == second)
        raise InputError(f"the id {duplicate!r} occurs more than once. Ids must be unique to draw a fraction.")
    return order


def draw_ids(
    ids: Iterable[str], fraction: float | None = None, seed: int | str = 0, *, count: int | None = None
) -> list[str]:
    """Draw a share or a number of ids: the first ids of [`order_ids`].

    A smaller fraction is always a subset of a larger fraction. A share of n ids is `round(fraction * n)` ids, rounded
    half up, but at least one.

    Raises:
        InputError: `fraction` is not in (0, 1], `count` is not in 1..n, there are no ids, or an id occurs twice.

    Example:
        >>> draw_ids(["a", "b", "c", "d"], 0.5)
        ['c', 'b']
    """
    order = order_ids(ids, seed)
    return order[: _number(len(order), fraction, count)]


def draw_balanced_ids(
    ids: Iterable[str],
    class_pixels: Iterable[Iterable[int]],
    fraction: float | None = None,
    seed: int | str = 0,
    *,
    count: int | None = None,
) -> list[str]:
    """Draw ids greedily, so that every class appears early and rare classes are over-represented.

    Each step looks at the classes that have been drawn the fewest times. Among them, it takes the class that the
    fewest remaining images contain, and of its images the one with most of these classes (ties: the order of
    [`order_ids`]). A smaller draw is always the beginning of a larger draw. Multi-label stratification, as in other
    libraries, divides a set into parts of given sizes, which are not nested.

    Args:
        ids, fraction, seed, count: as in [`draw_ids`].
        class_pixels: for every id, the number of pixels of each class.

    Raises:
        InputError: as in [`draw_ids`].

    Example:
        >>> draw_balanced_ids(["a", "b", "c"], [[9, 0], [9, 0], [0, 9]], count=2)
        ['c', 'b']
    """
    ids = list(ids)
    order = order_ids(ids, seed)
    place = {identifier: row for row, identifier in enumerate(ids)}
    shows = np.asarray([list(row) for row in class_pixels], dtype=np.int64)[[place[id] for id in order]] > 0
    remaining = np.ones(len(order), dtype=bool)
    times_drawn = np.zeros(shows.shape[1], dtype=np.int64)
    drawn: list[int] = []
    for _ in range(_number(len(order), fraction, count)):
        left = shows[remaining].sum(axis=0)
        candidates = remaining.copy()
        if left.any():
            scarcest = times_drawn == times_drawn[left > 0].min()
            scarcest &= left > 0
            rarest = np.where(scarcest, left, left.max() + 1).argmin()
            candidates &= shows[:, rarest]
            wanted = np.where(candidates, shows[:, scarcest].sum(axis=1), -1)
        else:
            wanted = np.where(candidates, 0, -1)
        drawn.append(int(wanted.argmax()))
        remaining[drawn[-1]] = False
        times_drawn += shows[drawn[-1]]
    return [order[index] for index in drawn]


def _number(available: int, fraction: float | None, count: int | None) -> int:
    if (fraction is None) == (count is None):
        raise InputError("exactly one of fraction and count must be given")
    if count is not None:
        if not 1 <= count <= available:
            raise InputError(f"train_count must be between 1 and {available} (the number of images), got {count}")
        return count
    if not 0.0 < fraction <= 1.0:
        raise InputError(f"train_fraction must be above 0 and at most 1, got {fraction}")
    return max(1, int(fraction * available + 0.5))


def fingerprint(dataset: Dataset) -> str:
    """Hash the ids and the contents of a data set with SHA-256, independent of the machine and the order."""
    columns = [name for name in ("id", "image_sha256", "labels_sha256") if name in dataset.column_names]
    rows = sorted(zip(*(dataset[name] for name in columns), strict=True))
    return hashlib.sha256(json.dumps([columns, rows]).encode()).hexdigest()


def cache_key(dataset: Dataset) -> str:
    """Return a key for caches: [`fingerprint`], and the fingerprint of `datasets` for the order and other columns."""
    return f"{fingerprint(dataset)} {dataset._fingerprint}"


@dataclass(frozen=True)
class FractionManifest:
    """The record of a drawn fraction. Publish it to let others train on the same images.

    Attributes:
        dataset: name of the data set.
        fingerprint: [`fingerprint`] of the data set that the fraction was drawn from.
        method: `random`, `balanced`, or `list` for a given list of ids.
        fraction: share of the data set, above 0 and at most 1.
        seed: seed of the draw, or None for a list.
        available: number of images in the data set.
        ids: ids of the drawn images, in the order of the draw.
        class_pixels: class name to number of pixels in the drawn images, with `void` for unlabelled pixels last. Empty
            if pixels were not counted.
        sha256: hash of the other fields, to detect changes.
    """

    dataset: str
    fingerprint: str
    method: str
    fraction: float
    seed: int | None
    available: int
    ids: list[str]
    class_pixels: dict[str, int]
    sha256: str = ""

    def __post_init__(self):
        if not self.sha256:
            object.__setattr__(self, "sha256", self._digest())

    def _digest(self) -> str:
        fields = {name: value for name, value in asdict(self).items() if name != "sha256"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @classmethod
    def draw(
        cls,
        dataset: Dataset,
        fraction: float | None = None,
        seed: int = 0,
        *,
        count: int | None = None,
        method: str = "random",
        name: str = "",
        id2label: dict[int, str] | None = None,
    ) -> FractionManifest:
        """Draw a fraction of a data set.

        Args:
            dataset: column `id`, and for `balanced` also `class_pixels`, as returned by
                [`load_segmentation_dataset`].
            fraction, count: give one: the share of the images, or their number.
            seed: seed of the draw. Draws of different seeds are independent.
            method: `random` ([`draw_ids`]) or `balanced` ([`draw_balanced_ids`]).
            name, id2label: name of the data set and of its classes, for the record.

        Raises:
            InputError: as in [`draw_ids`], or `method` is unknown, or the column `class_pixels` is missing.
        """
        if method not in METHODS:
            raise InputError(f"fraction_method must be one of {', '.join(METHODS)}, got {method!r}")
        if method == "balanced":
            if "class_pixels" not in dataset.column_names:
                raise InputError(
                    "a balanced fraction needs the column class_pixels. Load the data with load_segmentation_dataset."
                )
            labelled = [row[:-1] for row in dataset["class_pixels"]]
            ids = draw_balanced_ids(dataset["id"], labelled, fraction, seed, count=count)
        else:
            ids = draw_ids(dataset["id"], fraction, seed, count=count)
        return cls._of(dataset, ids, method, seed, name, id2label)

    @classmethod
    def _of(cls, dataset, ids, method, seed, name, id2label) -> FractionManifest:
        pixels: dict[str, int] = {}
        if "class_pixels" in dataset.column_names:
            rows = dict(zip(dataset["id"], dataset["class_pixels"], strict=True))
            totals = np.sum([rows[identifier] for identifier in ids], axis=0).tolist()
            names = list((id2label or dict(enumerate(map(str, range(len(totals) - 1))))).values())
            pixels = dict(zip([*names, "void"], totals, strict=True))
        available = len(dataset)
        return cls(name, fingerprint(dataset), method, len(ids) / available, seed, available, ids, pixels)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        dataset: Dataset | None = None,
        *,
        name: str = "",
        id2label: dict[int, str] | None = None,
    ) -> FractionManifest:
        """Read a manifest that [`save`] wrote or, if `dataset` is given, a published list of images.

        A list has one image per line: its id, its path, or the paths of image and mask. Folders before the image's
        name and Cityscapes' ending `_leftImg8bit` are ignored if the rest identifies the image.

        Raises:
            InputError: the file cannot be read, was changed after it was written, or lists an unknown image.
        """
        try:
            text = unicodedata.normalize("NFC", read_bytes(path).decode("utf-8-sig"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a readable fraction manifest: {error}") from error
        if not text.lstrip().startswith(("{", "[")):
            if dataset is None:
                raise InputError(
                    f"{path} is not a readable fraction manifest. A list of images needs a data set that is not "
                    "streamed."
                )
            ids = _ids_of_list(text, dataset["id"], path)
            return cls._of(dataset, ids, "list", None, name, id2label)
        try:
            manifest = cls(**json.loads(text))
        except (RecursionError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a readable fraction manifest: {error}") from error
        if not has_type(manifest.ids, list[str]) or not manifest.ids:
            raise InputError(f"{path} is not a readable fraction manifest: ids must be a list, got {manifest.ids!r}")
        if manifest.sha256 != replace(manifest, sha256="").sha256:
            raise InputError(f"{path} was changed after it was written: its sha256 does not match its contents")
        return manifest

    def save(self, path: str | os.PathLike) -> None:
        """Write the manifest as JSON, atomically."""
        atomic_write_text(Path(path), json.dumps(asdict(self), indent=2) + "\n")

    def refuse_other(self, path: str | os.PathLike, *pools: Dataset) -> None:
        """Make sure that the manifest, which was read from `path`, was drawn from one of the data sets `pools`.

        Raises:
            InputError: the ids or the contents of the images differ, so the manifest describes other images.
        """
        if self.fingerprint not in map(fingerprint, pools):
            raise InputError(
                f"{path} was drawn from other images ({self.available} images of {self.dataset or 'a data set'}), "
                "whose ids or contents differ. To train on images with the same ids, give a text file with the ids."
            )

    def select(self, dataset: Dataset) -> Dataset:
        """Return the images of the manifest, in the order of the data set.

        Raises:
            InputError: an image of the manifest is not in the data set.
        """
        wanted = set(self.ids)
        missing = sorted(wanted.difference(dataset["id"]))
        if missing:
            raise InputError(
                f"{len(missing)} of {len(wanted)} images of the manifest are not in the data set, e.g. {missing[0]!r}"
            )
        return dataset.select([index for index, identifier in enumerate(dataset["id"]) if identifier in wanted])


def _ids_of_list(text: str, known: Iterable[str], path: str | os.PathLike) -> list[str]:
    """Return the ids that the lines of a published list refer to."""
    meant: dict[str, list[str]] = {}
    for identifier in known:
        composed = unicodedata.normalize("NFC", identifier)
        for key in {composed, PurePosixPath(composed).name}:
            meant.setdefault(key, []).append(identifier)
    ids: dict[str, None] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        found = next((meant[key] for key in _names_in(line.strip()) if key in meant), [])
        if len(found) != 1:
            reason = "is not in the data set" if not found else f"matches both {found[0]!r} and {found[1]!r}"
            raise InputError(f"{path}, line {number}: {line.strip()!r} {reason}")
        ids[found[0]] = None
    if not ids:
        raise InputError(f"{path} lists no images")
    return list(ids)


def _names_in(line: str) -> Iterable[str]:
    """Yield the ids that a line may refer to, the most exact id first. The line may be an id that contains spaces."""
    for text in (line, re.split(r"[\s,]+", line)[0]):
        path = PurePosixPath(text)
        without_suffix = path.with_suffix("") if path.name else path
        for candidate in (text, str(without_suffix), path.name, without_suffix.name):
            yield candidate
            yield candidate.removesuffix("_leftImg8bit")


def train_fraction(dataset: Dataset, fraction: float, seed: int = 0) -> Dataset:
    """Keep a random share of the training images, at least one image.

    Fractions are nested: the images of 10 % are a subset of those of 30 %. They are the same on every machine.

    Args:
        dataset: a data set with an `id` column of unique strings, as returned by [`load_segmentation_dataset`].
        fraction: share to keep, above 0 and at most 1.
        seed: seed of the draw.

    Raises:
        InputError: `fraction` is out of range, or the ids are not unique.
    """
    return FractionManifest.draw(dataset, fraction, seed).select(dataset)
