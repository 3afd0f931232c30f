"""Cache training images at their training size on disk, so that no epoch has to decode and resize them again."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image as PILImage
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..errors import InputError
from .caching import cached_map
from .fractions import cache_key
from .pictures import to_tensor
from .transforms import resize_of

if TYPE_CHECKING:
    from transformers import BaseImageProcessor


_FORMAT = 1  # of the cached images: increase it when they change


def cache_resized(dataset: Dataset, processor: BaseImageProcessor, num_proc: int | None = None) -> Dataset:
    """Resize images and masks once, exactly as [`TrainTransform`] would resize them in every epoch.

    They are stored without compression, 4 bytes per pixel, in the cache folder of `datasets`. The name of the cache
    file is a hash of their contents and size.

    Args:
        dataset: columns `image` and `labels`, as returned by [`load_segmentation_dataset`].
        processor: image processor of the model, which must resize.
        num_proc: number of processes.

    Raises:
        InputError: the image processor does not resize, or the images are not RGB.
    """
    if not processor.do_resize:
        raise InputError("cache_images needs an image processor that resizes. Set image_size.")
    if isinstance(dataset[0]["image"], np.ndarray):
        raise InputError("cache_images works with 3 channels only. Leave it out.")
    meaning = f"resized {_FORMAT} {cache_key(dataset)} {processor.size} {processor.resample}"
    return cached_map(
        dataset,
        _resize_pair,
        meaning,
        fn_kwargs={"resize": resize_of(processor)},
        features=datasets.Features({**dataset.features, "image": datasets.Image(), "labels": datasets.Image()}),
        num_proc=num_proc,
        desc="Resizing images and masks",
    )


def _resize_pair(example: dict[str, Any], resize: v2.Resize) -> dict[str, Any]:
    picture = tv_tensors.Image(to_tensor(example["image"]))
    mask = tv_tensors.Mask(np.array(example["labels"]))
    picture, mask = resize(picture, mask)
    return {
        "image": _uncompressed(PILImage.fromarray(picture.permute(1, 2, 0).numpy())),
        "labels": _uncompressed(PILImage.fromarray(mask.numpy())),
    }


def _uncompressed(picture: PILImage.Image) -> dict[str, Any]:
    """Encode a picture in a format that is fast to decode."""
    buffer = io.BytesIO()
    picture.save(buffer, format="ppm")
    return {"bytes": buffer.getvalue(), "path": None}
