"""Masks as sparse labelling would give them, made from dense ones, to study how far such labels go."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage

from ..errors import InputError
from .checking import cache_file
from .classes import IGNORE_INDEX
from .fractions import fingerprint

BRUSH = 5  # pixels across: what one click paints


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
    meaning = f"clicked {fingerprint(dataset)} {clicks} {seed} {BRUSH}"
    cache = cache_file(meaning)
    return dataset.map(
        _click,
        fn_kwargs={"clicks": clicks, "seed": seed},
        features=dataset.features,
        keep_in_memory=cache is None,
        cache_file_name=cache,
        new_fingerprint=hashlib.sha256(meaning.encode()).hexdigest()[:16],
        desc="Labelling by clicks",
    )


def _click(example: dict[str, Any], clicks: int, seed: int) -> dict[str, Any]:
    dense = np.array(example["labels"])
    digest = hashlib.sha256(f"{seed}/{example['id']}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
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
    buffer = io.BytesIO()
    PILImage.fromarray(sparse).save(buffer, format="png", compress_level=1)
    classes = len(example["class_pixels"]) - 1
    counts = np.bincount(sparse.ravel(), minlength=256)
    return {
        "labels": {"bytes": buffer.getvalue(), "path": None},
        "class_pixels": [*counts[:classes].tolist(), int(counts[IGNORE_INDEX])],
    }
