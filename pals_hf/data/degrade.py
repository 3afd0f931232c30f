"""Masks as cheaper labelling would give them, sparse or partly wrong, made from good ones to study what that costs."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage

from ..errors import InputError
from .checking import cache_file, hash_of_labels
from .classes import IGNORE_INDEX
from .fractions import cache_key

_FORMAT = 2  # of what is stored: raise it when that changes
BRUSH = 5  # pixels across: what one click paints
BLOCK = 32  # pixels across: within it an object is taken for another


def label_by_clicks(dataset: Dataset, clicks: int, seed: int = 0) -> Dataset:
    """The data set as if each image had been labelled by some clicks instead of densely.

    A click paints those of the 5 x 5 pixels around a random labelled pixel that have its class; what no click reached
    is void. A mask depends on its own contents, its id, `clicks` and `seed`, and on nothing else.

    Args:
        dataset: columns `id`, `labels` and `class_pixels`, as [`load_segmentation_dataset`] gives it.
        clicks: per image, at least one.
        seed: another seed clicks elsewhere.

    Raises:
        InputError: `clicks` is less than one.
    """
    if clicks < 1:
        raise InputError(f"label_clicks must be at least 1, got {clicks}")
    return _with_masks(dataset, _clicked, f"clicked {clicks} {BRUSH}", seed, clicks=clicks)


def _clicked(dense: np.ndarray, generator: np.random.Generator, clicks: int) -> np.ndarray:
    rows, columns = np.nonzero(dense != IGNORE_INDEX)
    sparse, reach = np.full_like(dense, IGNORE_INDEX), BRUSH // 2
    for pixel in generator.choice(len(rows), min(clicks, len(rows)), replace=False):
        row, column = rows[pixel], columns[pixel]
        around = (
            slice(max(0, row - reach), row + reach + 1),
            slice(max(0, column - reach), column + reach + 1),
        )
        painted = dense[around] == dense[row, column]
        sparse[around][painted] = dense[row, column]
    return sparse


def mislabel(dataset: Dataset, share: float, seed: int = 0) -> Dataset:
    """The data set as if some objects, or pieces of them, had been taken for something else.

    Of the blocks of 32 x 32 pixels of a mask, each is picked with probability `share`; all its pixels of its most
    frequent class get one other class of the same mask, drawn at random. Void pixels stay, and masks of one class. A
    mask depends on its own contents, its id, `share` and `seed`, and on nothing else.

    Args:
        dataset: as in [`label_by_clicks`].
        share: above 0, at most 1.
        seed: another seed makes other mistakes.

    Raises:
        InputError: `share` is out of range.
    """
    if not 0.0 < share <= 1.0:
        raise InputError(f"label_noise must be above 0 and at most 1, got {share}")
    return _with_masks(dataset, _mislabelled, f"mislabelled {share} {BLOCK}", seed, share=share)


def _mislabelled(good: np.ndarray, generator: np.random.Generator, share: float) -> np.ndarray:
    wrong, classes = good.copy(), np.setdiff1d(good, IGNORE_INDEX)
    for top in range(0, good.shape[0], BLOCK):
        for left in range(0, good.shape[1], BLOCK):
            picked, choice = generator.random() < share, generator.integers(max(1, len(classes) - 1))
            block = wrong[top : top + BLOCK, left : left + BLOCK]
            labels, counts = np.unique(block[block != IGNORE_INDEX], return_counts=True)
            if picked and len(labels) and len(classes) > 1:
                most = labels[counts.argmax()]
                block[block == most] = classes[classes != most][choice]
    return wrong


def _with_masks(
    dataset: Dataset, change: Callable[..., np.ndarray], what: str, seed: int, **options: float
) -> Dataset:
    """The data set with `change(mask, generator, **options)` for every mask, kept in the cache of `datasets`."""
    meaning = f"{what} {seed} {_FORMAT} {cache_key(dataset)}"
    cache = cache_file(meaning)
    return dataset.map(
        _change_mask,
        fn_kwargs={"change": change, "seed": seed, "options": options},
        features=dataset.features,
        keep_in_memory=cache is None,
        cache_file_name=cache,
        new_fingerprint=hashlib.sha256(meaning.encode()).hexdigest()[:16],
        desc="Making masks worse",
    )


def _change_mask(
    example: dict[str, Any], change: Callable[..., np.ndarray], seed: int, options: dict[str, float]
) -> dict[str, Any]:
    digest = hashlib.sha256(f"{seed}/{example['id']}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    mask = change(np.array(example["labels"]), generator, **options)
    buffer = io.BytesIO()
    PILImage.fromarray(mask).save(buffer, format="png", compress_level=1)
    classes = len(example["class_pixels"]) - 1
    counts = np.bincount(mask.ravel(), minlength=256)
    changed = {
        "labels": {"bytes": buffer.getvalue(), "path": None},
        "class_pixels": [*counts[:classes].tolist(), int(counts[IGNORE_INDEX])],
    }
    return {**changed, "labels_sha256": hash_of_labels(mask)} if "labels_sha256" in example else changed
