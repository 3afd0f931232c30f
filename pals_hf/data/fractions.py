"""Fractions of a training set that others can reproduce: seeded, nested, the same on every process and machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


def draw_ids(ids: Iterable[str], fraction: float, seed: int | str = 0) -> list[str]:
    """Draw a share of ids, at least one, in a fixed pseudo-random order.

    Ids are ordered by `sha256(f"{seed}/{id}")` and the first `round(fraction * n)` are taken (halves up). So the draw
    depends on nothing but the ids and the seed - not on their order, the process, the machine or the version of a
    random number generator - and a smaller fraction is always part of a larger one.

    Raises:
        InputError: `fraction` is not in (0, 1], there are no ids, or an id occurs twice.

    Example:
        >>> draw_ids(["a", "b", "c", "d"], 0.5)
        ['c', 'b']
    """
    if not 0.0 < fraction <= 1.0:
        raise InputError(f"train_fraction must be above 0 and at most 1, got {fraction}")
    order = sorted(ids, key=lambda identifier: hashlib.sha256(f"{seed}/{identifier}".encode()).digest())
    if not order:
        raise InputError("there are no images to draw a fraction from")
    if len(set(order)) < len(order):
        duplicate = next(first for first, second in pairwise(order) if first == second)
        raise InputError(f"the id {duplicate!r} occurs more than once, so a fraction is not well defined")
    return order[: max(1, int(fraction * len(order) + 0.5))]


@dataclass(frozen=True)
class FractionManifest:
    """The record of a drawn fraction: what to publish so that others train on the same images.

    Attributes:
        fraction: the share that was asked for.
        seed: the seed of the draw.
        available: the number of images it was drawn from.
        ids: the images, in the order of the draw.
    """

    fraction: float
    seed: int
    available: int
    ids: list[str]

    @classmethod
    def draw(cls, dataset: Dataset, fraction: float, seed: int = 0) -> FractionManifest:
        """Draw from a data set with an `id` column: see [`draw_ids`]."""
        available = dataset["id"]
        return cls(fraction, seed, len(available), draw_ids(available, fraction, seed))

    @classmethod
    def load(cls, path: str | os.PathLike) -> FractionManifest:
        """Read a manifest that [`save`] wrote.

        Raises:
            InputError: there is no such file, or it is not a manifest.
        """
        try:
            manifest = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} is not a readable fraction manifest: {error}") from error
        if not isinstance(manifest.ids, list) or not manifest.ids:
            raise InputError(f"{path} is not a readable fraction manifest: ids must be a list, got {manifest.ids!r}")
        return manifest

    def save(self, path: str | os.PathLike) -> None:
        """Write the manifest as JSON, complete or not at all."""
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

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
