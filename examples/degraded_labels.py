"""Simulate cheaper labels - sparse or partly wrong masks - to study their effect on training."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage

from pals_hf.data.caching import cached_map
from pals_hf.data.checking import hash_of_labels
from pals_hf.data.classes import IGNORE_INDEX
from pals_hf.data.fractions import cache_key
from pals_hf.errors import InputError

_FORMAT = 2  # of the cached masks: increase it when they change
BRUSH = 5  # width in pixels of the square that one click labels
BLOCK = 32  # width in pixels of the blocks that are mislabelled


def label_by_clicks(dataset: Dataset, clicks: int, seed: int = 0) -> Dataset:
    """Keep the labels that a few clicks per image would give, instead of dense labels.

    Each click is at a random labelled pixel, and labels those of the 5 x 5 pixels around it that have the same class.
    All other pixels become unlabelled. A mask depends only on its contents, its id, `clicks` and `seed`.

    Args:
        dataset: columns `id`, `labels` and `class_pixels`, as returned by [`load_segmentation_dataset`].
        clicks: number of clicks per image, at least 1.
        seed: seed of the positions.

    Raises:
        InputError: `clicks` is less than 1.
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
    """Give some objects, or parts of objects, the label of another class.

    Each block of 32 x 32 pixels of a mask is drawn with probability `share`. In a drawn block, all pixels of the most
    frequent class get one other class of the mask, at random. Unlabelled pixels and masks of one class do not change.
    A mask depends only on its contents, its id, `share` and `seed`.

    Args:
        dataset: as in [`label_by_clicks`].
        share: share of the blocks, above 0 and at most 1.
        seed: seed of the mistakes.

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
    dataset: Dataset, change: Callable[..., np.ndarray], description: str, seed: int, **options: float
) -> Dataset:
    """Replace every mask by `change(mask, generator, **options)`, and cache the masks with those of `datasets`."""
    meaning = f"{description} {seed} {_FORMAT} {cache_key(dataset)}"
    return cached_map(
        dataset,
        _change_mask,
        meaning,
        fn_kwargs={"change": change, "seed": seed, "options": options},
        features=dataset.features,
        desc="Degrading masks",
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
