"""Hold out training images - a share, a fold or matching ids - and drop images that are in both splits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from datasets import Dataset, concatenate_datasets

from ..errors import InputError
from .checking import raise_first_problem
from .fractions import draw_ids, order_ids

if TYPE_CHECKING:
    from .loading import SegmentationData


def hold_out(
    data: SegmentationData,
    *,
    share: float | None = None,
    pattern: str | None = None,
    seed: int = 0,
    skip_bad_samples: bool = False,
) -> SegmentationData:
    """Replace the validation split by some of the training images, to tune settings on.

    Args:
        data: a data set from [`load_segmentation_dataset`].
        share, pattern: give one: the share of the images, or a regular expression that matches their ids.
        seed: seed of the share.
        skip_bad_samples: drop training images that are also held out, instead of raising.

    Raises:
        InputError: no image or every image would be held out, or an image is in both splits.
    """
    train, held_out = cut_validation(data.train, share, seed) if pattern is None else cut_matching(data.train, pattern)
    train, leaked = drop_leaks(train, held_out)
    if not skip_bad_samples:
        raise_first_problem(leaked)
    return replace(data, train=train, validation=held_out, skipped=data.skipped | leaked)


def cut_validation(train: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out a random share of the images. Return the remaining images and those held out.

    Raises:
        InputError: `share` is out of range, or leaves no image for training.
    """
    if not 0.0 < share < 1.0:
        raise InputError(f"the share of images to hold out must be between 0 and 1, got {share}")
    if len(train) < 2:
        raise InputError(
            f"a validation split can only be held out from at least 2 training images, got {len(train)}. Add images, "
            "or a validation split."
        )
    held_out = set(draw_ids(train["id"], share, seed=f"validation/{seed}"))
    if len(held_out) == len(train):
        raise InputError(f"holding out {share} of the {len(train)} images leaves none for training. Lower the share.")
    return _part(train, held_out)


def cut_matching(train: Dataset, pattern: str) -> tuple[Dataset, Dataset]:
    """Hold out the images whose id contains a match of a regular expression. Return the remaining and these images.

    Raises:
        InputError: `pattern` is not a regular expression, or matches no image or every image.
    """
    try:
        held_out = {id for id in train["id"] if re.search(pattern, id)}
    except re.error as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}") from error
    if not 0 < len(held_out) < len(train):
        raise InputError(
            f"{pattern!r} matches {len(held_out)} of the {len(train)} training images, but must match some of them "
            f"and not all. An example of an id is {train['id'][0]!r}."
        )
    return _part(train, held_out)


def cut_fold(
    train: Dataset, validation: Dataset | None, num_folds: int, fold: int, seed: int
) -> tuple[Dataset, Dataset]:
    """Divide all images into folds. Return the images of the other folds and those of one fold.

    Raises:
        InputError: `num_folds` or `fold` is out of range.
    """
    if validation is not None:
        if not set(train["id"]).isdisjoint(validation["id"]):
            train, validation = _prefix_ids(train, "train"), _prefix_ids(validation, "validation")
        train = concatenate_datasets([train, validation])
    if not 2 <= num_folds <= len(train):
        raise InputError(f"num_folds must be between 2 and {len(train)} (the number of images), got {num_folds}")
    if not 0 <= fold < num_folds:
        raise InputError(f"fold must be between 0 and {num_folds - 1}, got {fold}")
    return _part(train, set(order_ids(train["id"], f"folds/{seed}")[fold::num_folds]))


def drop_leaks(train: Dataset, validation: Dataset) -> tuple[Dataset, dict[str, str]]:
    """Drop the training images whose contents are also in the validation split.

    Returns:
        The remaining training images, and for each dropped image `train/ID` to the reason.
    """
    scored = dict(zip(validation["image_sha256"], validation["id"], strict=True))
    leaked = {
        f"train/{id}": (
            f"training image {id!r} is also validation image {scored[content]!r}, so its score would be inflated. "
            "Remove one of the two."
        )
        for id, content in zip(train["id"], train["image_sha256"], strict=True)
        if content in scored
    }
    if leaked:
        train = train.select([index for index, id in enumerate(train["id"]) if f"train/{id}" not in leaked])
    return train, leaked


def _prefix_ids(split: Dataset, name: str) -> Dataset:
    """Make ids unique across splits: ids from folders are paths below the folder of the split."""
    ids = Dataset.from_dict({"id": [f"{name}/{id}" for id in split["id"]]})
    return concatenate_datasets([ids, split.remove_columns("id")], axis=1)


def _part(dataset: Dataset, held_out: set[str]) -> tuple[Dataset, Dataset]:
    """Return the images that are not held out, and those that are."""
    return tuple(
        dataset.select([index for index, id in enumerate(dataset["id"]) if (id in held_out) is wanted])
        for wanted in (False, True)
    )
