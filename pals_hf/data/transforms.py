"""Pictures and masks to tensors: joint augmentation for training, nothing but the image processor for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers.image_utils import pil_torch_interpolation_mapping

from ..errors import InputError
from .sources import IGNORE_INDEX

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image
    from transformers import BaseImageProcessor


WEAK_VIEW = "weak_pixel_values"


class TrainTransform:
    """Random scale, crop, flip and colour jitter of an image and its mask, then the image processor's normalisation.

    Padding of small images is the mean colour in the image and `padding_index` in the mask.

    Args:
        processor: image processor of the model. It resizes first, if it resizes at all, and normalises last, exactly
            as for evaluation.
        crop_size: (height, width) of the training crops.
        scale_range: the image is resized by a random factor from this range before the crop.
        color_jitter: strength of random brightness, contrast and saturation, 0 to 1.
        padding_index: label of padding: the ignore index, or [`functional.PADDING_INDEX`] for losses that must tell
            it from void pixels of the image.
        weak_view: also give `weak_pixel_values`, the same crop without colour jitter.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        crop_size: tuple[int, int],
        scale_range: tuple[float, float] = (0.75, 1.5),
        color_jitter: float = 0.3,
        padding_index: int = IGNORE_INDEX,
        weak_view: bool = False,
    ):
        self.processor = processor
        self.weak_view = weak_view
        self.padding_index = padding_index
        mean = [round(255 * value) for value in processor.image_mean or (0.5, 0.5, 0.5)]
        steps: list[v2.Transform] = []
        if processor.do_resize:
            interpolation = pil_torch_interpolation_mapping[processor.resample]
            steps.append(v2.Resize((processor.size["height"], processor.size["width"]), interpolation))
        self.geometry = v2.Compose(
            [
                *steps,
                RandomScale(*scale_range),
                v2.RandomCrop(
                    tuple(crop_size),
                    pad_if_needed=True,
                    fill={tv_tensors.Image: mean, tv_tensors.Mask: padding_index},
                ),
                v2.RandomHorizontalFlip(),
            ]
        )
        self.jitter = v2.ColorJitter(brightness=color_jitter, contrast=color_jitter, saturation=color_jitter)

    def __call__(self, image: Image, labels: Image) -> dict[str, Tensor]:
        picture = tv_tensors.Image(image.convert("RGB"))
        mask = tv_tensors.Mask(np.array(labels, dtype=np.int16))
        picture, mask = self.geometry(picture, mask)
        views = {"pixel_values": self._process(self.jitter(picture), mask.shape)}
        if self.weak_view:
            views[WEAK_VIEW] = self._process(picture, mask.shape)
        return {**views, "labels": mask.as_subclass(Tensor).long()}

    def _process(self, picture: tv_tensors.Image, size: torch.Size) -> Tensor:
        processed = self.processor(images=picture.as_subclass(Tensor), do_resize=False, return_tensors="pt")
        pixel_values = processed["pixel_values"][0]
        if pixel_values.shape[1:] != size:
            raise InputError(
                f"{type(self.processor).__name__} changes the size of a crop from {tuple(size)} to "
                f"{tuple(pixel_values.shape[1:])}: build it by build_image_processor"
            )
        return pixel_values


class EvalTransform:
    """The image as the image processor makes it; the mask at its own size, never resized or padded.

    Args:
        processor: image processor of the model.
    """

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, image: Image, labels: Image) -> dict[str, Tensor]:
        pixel_values = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": torch.from_numpy(np.array(labels, dtype=np.int64))}


class RandomScale(v2.Transform):
    """Resize an image and its mask by one random factor, drawn evenly between `low` and `high`."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = self.low + (self.high - self.low) * torch.rand(()).item()
        height, width = v2.functional.get_size(flat_inputs[0])
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.resize, inpt, size=params["size"])


class TransformedDataset(Dataset):
    """A data set with a transform, whose randomness is a function of (seed, epoch, index) and of nothing else.

    So the number of workers and processes, and a resume in the middle of an epoch, do not change what is seen.

    Args:
        dataset: a data set with the columns `image` and `labels`.
        transform: called as `transform(image, labels)`.
        seed: seed of the transform's randomness.
    """

    def __init__(
        self, dataset: datasets.Dataset, transform: Callable[[Image, Image], dict[str, Tensor]], seed: int = 0
    ):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        # In shared memory, so that persistent workers see the epoch change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch: another epoch sees other crops."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = self.dataset[int(index)]
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that seeds every device, and is slower than the transform.
            torch.default_generator.manual_seed(_mix(self.seed, int(self._epoch), int(index)))
            return self.transform(example["image"], example["labels"])


def _mix(*numbers: int) -> int:
    """A seed from several numbers: close inputs give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little")


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor | list[Tensor]]:
    """Stack a batch; what differs in size stays a list, because padding would change pooling and attention."""
    batch = {key: [example[key] for example in examples] for key in examples[0]}
    return {
        key: torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors
        for key, tensors in batch.items()
    }
