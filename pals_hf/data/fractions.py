"""Fractions of a training set that others can reproduce: seeded, nested, the same on every process and machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..files import write_whole

if TYPE_CHECKING:
    from datasets import Dataset

METHODS = ("random", "balanced")
MANIFEST = "train_fraction.json"  # in a run's folder


def order_ids(ids: Iterable[str], seed: int | str = 0) -> list[str]:
    """Ids in a fixed pseudo-random order: by `sha256(f"{seed}/{id}")`.

    It depends on nothing but the ids and the seed - not on their order, the process, the machine or the version of a
    random number generator.

    Raises:
        InputError: there are no ids, or one occurs twice.
    """
    order = sorted(ids, key=lambda identifier: hashlib.sha256(f"{seed}/{identifier}".encode()).digest())
    if not order:
        raise InputError("there are no images to draw a fraction from")
    if len(set(order)) < len(order):
        duplicate = next(first for first, second in pairwise(order) if first == second)
        raise InputError(f"the id {duplicate!r} occurs more than once, so a fraction is not well defined")
    return order


def draw_ids(
    ids: Iterable[str], fraction: float | None = None, seed: int | str = 0, *, count: int | None = None
) -> list[str]:
    """Draw a share of ids, at least one, or a number of them: the first of [`order_ids`].

    So a smaller fraction is always part of a larger one. A share is `round(fraction * n)` ids, halves up.

    Raises:
        InputError: `fraction` is not in (0, 1], `count` not in 1..n, there are no ids, or an id occurs twice.

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
    """Draw so that every class is present as early as possible, and the rare ones again and again.

    Greedy: of the classes that have been drawn the fewest times, take the one that the fewest remaining images show,
    and of its images the one that shows most classes of that kind (the first of [`order_ids`], if several do). A
    smaller draw is always the beginning of a larger one. Libraries for multi-label stratification cut a set into
    parts of given sizes, which are not nested, so none is used here.

    Args:
        ids, fraction, seed, count: as in [`draw_ids`].
        class_pixels: for every id its pixels of each class.

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
        raise InputError("give either a fraction or a count of images")
    if count is not None:
        if not 1 <= count <= available:
            raise InputError(f"train_count must lie between 1 and the {available} images there are, got {count}")
        return count
    if not 0.0 < fraction <= 1.0:
        raise InputError(f"train_fraction must be above 0 and at most 1, got {fraction}")
    return max(1, int(fraction * available + 0.5))


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 of what is in a data set, whatever the machine and the order: its ids and the hashes of its contents."""
    columns = [name for name in ("id", "image_sha256", "labels_sha256") if name in dataset.column_names]
    rows = sorted(zip(*(dataset[name] for name in columns), strict=True))
    return hashlib.sha256(json.dumps([columns, rows]).encode()).hexdigest()


def cache_key(dataset: Dataset) -> str:
    """What a cache is named by: [`fingerprint`], and what `datasets` knows of the order and of other columns."""
    return f"{fingerprint(dataset)} {dataset._fingerprint}"


@dataclass(frozen=True)
class FractionManifest:
    """The record of a drawn fraction: what to publish so that others train on the same images.

    Attributes:
        dataset: the name of the data set.
        fingerprint: of the images it was drawn from, see [`fingerprint`].
        method: `random`, `balanced`, or `list` for ids that were given.
        fraction: the share of the images that it holds.
        seed: the seed of the draw, None for a list.
        available: the number of images it was drawn from.
        ids: the images, in the order of the draw.
        class_pixels: pixels of each class in them, by class name, `void` last; empty where they were not counted.
        sha256: of all that, so that a change shows.
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
        """Draw from a data set with an `id` column, and for `balanced` a column `class_pixels`.

        Args:
            dataset: as [`load_segmentation_dataset`] gives it.
            fraction, count: the share of the images, or their number.
            seed: another seed is another, independent draw.
            method: `random` ([`draw_ids`]) or `balanced` ([`draw_balanced_ids`]).
            name, id2label: name of the data set and of its classes, for the record.
        """
        if method not in METHODS:
            raise InputError(f"split_method must be one of {METHODS}, got {method!r}")
        if method == "balanced":
            if "class_pixels" not in dataset.column_names:
                raise InputError("a balanced fraction needs a column class_pixels, as load_segmentation_dataset gives")
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
        """Read a manifest that [`save`] wrote or, with its `dataset`, a published list of images.

        A list has one image a line: its id, its path, or the paths of image and mask. What is before the image's name
        and Cityscapes' ending `_leftImg8bit` do not matter, where the rest says which image is meant.

        Raises:
            InputError: there is no such file, it is neither, it was changed, or it names an unknown image.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a readable fraction manifest: {error}") from error
        if not text.lstrip().startswith(("{", "[")):
            if dataset is None:
                raise InputError(
                    f"{path} is not a readable fraction manifest; a list of images needs all of them, which a stream "
                    "has not"
                )
            ids = _ids_of_list(text, dataset["id"], path)
            return cls._of(dataset, ids, "list", None, name, id2label)
        try:
            manifest = cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is not a readable fraction manifest: {error}") from error
        if not isinstance(manifest.ids, list) or not manifest.ids:
            raise InputError(f"{path} is not a readable fraction manifest: ids must be a list, got {manifest.ids!r}")
        if manifest.sha256 != replace(manifest, sha256="").sha256:
            raise InputError(f"{path} was changed after it was written: its sha256 does not fit the rest")
        return manifest

    def save(self, path: str | os.PathLike) -> None:
        """Write the manifest as JSON, complete or not at all."""
        write_whole(Path(path), json.dumps(asdict(self), indent=2) + "\n")

    def refuse_other(self, path: str | os.PathLike, *pools: Dataset) -> None:
        """Make sure that the manifest, read from `path`, was drawn from one of these sets of images.

        Raises:
            InputError: their ids or contents are others, so that the record would be of images that are not these.
        """
        if self.fingerprint not in map(fingerprint, pools):
            raise InputError(
                f"{path} was drawn from other images, {self.available} of {self.dataset or 'a data set'}: their ids "
                "or contents differ from these. To train on images of the same names give a text file of these"
            )

    def select(self, dataset: Dataset) -> Dataset:
        """The images of the manifest, in the order of the data set.

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
    """The ids that the lines of a published list mean."""
    meant: dict[str, list[str]] = {}
    for identifier in known:
        for key in {identifier, PurePosixPath(identifier).name}:
            meant.setdefault(key, []).append(identifier)
    ids: dict[str, None] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        found = next((meant[key] for key in _names_in(line.strip()) if key in meant), [])
        if len(found) != 1:
            why = "is not in the data set" if not found else f"may be {found[0]!r} or {found[1]!r}"
            raise InputError(f"{path}, line {number}: {line.strip()!r} {why}")
        ids[found[0]] = None
    if not ids:
        raise InputError(f"{path} names no images")
    return list(ids)


def _names_in(line: str) -> Iterable[str]:
    """What a line may call its image, the most exact first: the line itself may be an id with spaces in it."""
    for text in (line, re.split(r"[\s,]+", line)[0]):
        path = PurePosixPath(text)
        without_suffix = path.with_suffix("") if path.name else path
        for candidate in (text, str(without_suffix), path.name, without_suffix.name):
            yield candidate
            yield candidate.removesuffix("_leftImg8bit")


def train_fraction(dataset: Dataset, fraction: float, seed: int = 0) -> Dataset:
    """Keep a share of the training images, at least one: seeded, nested, the same everywhere.

    Nested means that the images of 10 % are among those of 30 %, and these among those of 50 %.

    Args:
        dataset: a data set with an `id` column of unique strings, as [`load_segmentation_dataset`] returns it.
        fraction: the share to keep, above 0 and at most 1.
        seed: another seed is another draw.

    Raises:
        InputError: `fraction` is out of range, or the ids are not unique.
    """
    return FractionManifest.draw(dataset, fraction, seed).select(dataset)
