"""Training images at the size they are trained at, kept on disk, so that no epoch decodes and shrinks them again."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image as PILImage
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..errors import InputError
from .checking import cache_file
from .fractions import cache_key
from .transforms import resize_of

if TYPE_CHECKING:
    from transformers import BaseImageProcessor


_FORMAT = 1  # of what is stored: raise it when that changes


def cache_resized(dataset: Dataset, processor: BaseImageProcessor, num_proc: int | None = None) -> Dataset:
    """The data set with images and masks resized once, as [`TrainTransform`] would do it every time.

    They are kept uncompressed, 4 bytes a pixel, in the cache folder of `datasets`, under a name made from their
    contents and size. Training sees the same pixels as without.

    Args:
        dataset: columns `image` and `labels`, as [`load_segmentation_dataset`] gives it.
        processor: image processor of the model, which must resize.
        num_proc: processes that resize.

    Raises:
        InputError: the image processor does not resize.
    """
    if not processor.do_resize:
        raise InputError("cache_images keeps images at the size they are trained at: give an image_size")
    meaning = f"resized {_FORMAT} {cache_key(dataset)} {processor.size} {processor.resample}"
    cache = cache_file(meaning)
    return dataset.map(
        _resize_pair,
        fn_kwargs={"resize": resize_of(processor)},
        features=datasets.Features({**dataset.features, "image": datasets.Image(), "labels": datasets.Image()}),
        keep_in_memory=cache is None,
        cache_file_name=cache,
        new_fingerprint=hashlib.sha256(meaning.encode()).hexdigest()[:16],
        num_proc=num_proc,
        desc="Resizing images and masks",
    )


def _resize_pair(example: dict[str, Any], resize: v2.Resize) -> dict[str, Any]:
    picture = tv_tensors.Image(example["image"].convert("RGB"))
    mask = tv_tensors.Mask(np.array(example["labels"]))
    picture, mask = resize(picture, mask)
    return {
        "image": _uncompressed(PILImage.fromarray(picture.permute(1, 2, 0).numpy())),
        "labels": _uncompressed(PILImage.fromarray(mask.numpy())),
    }


def _uncompressed(picture: PILImage.Image) -> dict[str, Any]:
    """In a format that takes no time to decode."""
    buffer = io.BytesIO()
    picture.save(buffer, format="ppm")
    return {"bytes": buffer.getvalue(), "path": None}
