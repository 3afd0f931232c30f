"""Pictures and masks to tensors: joint augmentation for training, nothing but the image processor for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers.image_utils import pil_torch_interpolation_mapping

from ..errors import InputError
from .classes import IGNORE_INDEX

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image
    from transformers import BaseImageProcessor


WEAK_VIEW = "weak_pixel_values"
ID = "id"  # key of an example's id in what a data set gives, and of the ids of a batch


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
        rare_classes: classes that the next two options favour, see [`balance.rare_classes`].
        rare_crop: probability that a crop is laid around a pixel of a rare class, where the image has one.
        copy_paste: probability that the rare classes of a second image are pasted over the crop (Ghiasi et al. Simple
            Copy-Paste. CVPR 2021); [`TransformedDataset`] gives the second image.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        crop_size: tuple[int, int],
        scale_range: tuple[float, float] = (0.75, 1.5),
        color_jitter: float = 0.3,
        padding_index: int = IGNORE_INDEX,
        weak_view: bool = False,
        rare_classes: Sequence[int] = (),
        rare_crop: float = 0.0,
        copy_paste: float = 0.0,
    ):
        self.processor = processor
        self.weak_view = weak_view
        self.padding_index = padding_index
        self.rare_classes = torch.tensor(rare_classes, dtype=torch.int16)
        self.copy_paste = copy_paste if len(rare_classes) else 0.0
        mean = [round(255 * value) for value in processor.image_mean or (0.5, 0.5, 0.5)]
        steps = [resize_of(processor)] if processor.do_resize else []
        self.geometry = v2.Compose(
            [
                *steps,
                RandomScale(*scale_range),
                RareClassCrop(
                    tuple(crop_size),
                    self.rare_classes,
                    rare_crop,
                    pad_if_needed=True,
                    fill={tv_tensors.Image: mean, tv_tensors.Mask: padding_index},
                ),
                v2.RandomHorizontalFlip(),
            ]
        )
        self.jitter = v2.ColorJitter(brightness=color_jitter, contrast=color_jitter, saturation=color_jitter)

    def __call__(self, image: Image, labels: Image, donor: tuple[Image, Image] | None = None) -> dict[str, Tensor]:
        """Tensors for training: `pixel_values` float32 `(3, H, W)`, `labels` int64 `(H, W)`, perhaps the weak view.

        Args:
            image, labels: a picture and its mask of class indices.
            donor: another such pair, whose rare classes are pasted over the crop.
        """
        picture, mask = self._crop(image, labels)
        if donor is not None:
            other_picture, other_mask = self._crop(*donor)
            pasted = torch.isin(other_mask, self.rare_classes)
            picture = tv_tensors.Image(torch.where(pasted, other_picture, picture))
            mask = tv_tensors.Mask(torch.where(pasted, other_mask, mask))
        views = {"pixel_values": self._process(self.jitter(picture), mask.shape)}
        if self.weak_view:
            views[WEAK_VIEW] = self._process(picture, mask.shape)
        return {**views, "labels": mask.as_subclass(Tensor).long()}

    def _crop(self, image: Image, labels: Image) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        return self.geometry(tv_tensors.Image(image.convert("RGB")), tv_tensors.Mask(np.array(labels, dtype=np.int16)))

    def _process(self, picture: tv_tensors.Image, size: torch.Size) -> Tensor:
        processed = self.processor(images=picture.as_subclass(Tensor), do_resize=False, return_tensors="pt")
        pixel_values = processed["pixel_values"][0]
        if pixel_values.shape[1:] != size:
            raise InputError(
                f"{type(self.processor).__name__} changes the size of a crop from {tuple(size)} to "
                f"{tuple(pixel_values.shape[1:])}: build it by build_image_processor"
            )
        return pixel_values


def resize_of(processor: BaseImageProcessor) -> v2.Resize:
    """The resize of an image processor, for an image and its mask at once. Nothing for an image of that size."""
    interpolation = pil_torch_interpolation_mapping[processor.resample]
    return v2.Resize((processor.size["height"], processor.size["width"]), interpolation)


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


class RareClassCrop(v2.RandomCrop):
    """A random crop that, with some probability, is laid around a pixel of one of the rare classes of the mask.

    Of these classes one is drawn, each as likely as the others, and of its pixels one.

    Args:
        size: (height, width) of the crop.
        rare_classes: class indices, int16.
        probability: 0 is a plain random crop.
        kwargs: what [`~torchvision.transforms.v2.RandomCrop`] takes.
    """

    def __init__(self, size: tuple[int, int], rare_classes: Tensor, probability: float, **kwargs: Any):
        super().__init__(size, **kwargs)
        self.rare_classes, self.probability = rare_classes, probability

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        if self.probability == 0.0 or not params["needs_crop"] or torch.rand(()) >= self.probability:
            return params
        mask = next(value for value in flat_inputs if isinstance(value, tv_tensors.Mask))
        present = [label for label in self.rare_classes if (mask == label).any()]
        if not present:
            return params
        label = present[int(torch.randint(len(present), ()))]
        pixels = (mask == label).nonzero()
        pixel = pixels[int(torch.randint(len(pixels), ()))].tolist()
        left, top, right, bottom = params["padding"]
        for name, at, before, after, size, crop in (
            ("top", pixel[0], top, bottom, mask.shape[0], params["height"]),
            ("left", pixel[1], left, right, mask.shape[1], params["width"]),
        ):
            first, last = max(0, at + before - crop + 1), min(at + before, size + before + after - crop)
            params[name] = int(torch.randint(first, last + 1, ()))
        return params


class TransformedDataset(Dataset):
    """A data set with a transform, whose randomness is a function of (seed, epoch, index) and of nothing else.

    So the number of workers and processes, and a resume in the middle of an epoch, do not change what is seen.

    Args:
        dataset: a data set with the columns `image` and `labels`.
        transform: called as `transform(image, labels)`; a [`TrainTransform`] with `copy_paste` also gets a `donor`,
            one of the images that show a rare class (the data set has a column `class_pixels` then).
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
        self._copy_paste = getattr(transform, "copy_paste", 0.0)
        self._donors: list[int] = []
        if self._copy_paste:
            rare = transform.rare_classes.tolist()
            rows = dataset["class_pixels"]
            self._donors = [index for index, row in enumerate(rows) if any(row[label] for label in rare)]

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch: another epoch sees other crops."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        example, donor = self.dataset[int(index)], []
        with seeded(self.seed, int(self._epoch), int(index)):
            if self._donors and torch.rand(()) < self._copy_paste:
                other = self.dataset[self._donors[int(torch.randint(len(self._donors), ()))]]
                donor = [(other["image"], other["labels"])]
            views = self.transform(example["image"], example["labels"], *donor)
        return {**views, ID: example[ID]} if ID in example else views


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Torch's randomness as a function of `parts`; close ones are unrelated. Outside all is as it was."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that seeds every device, and is slower than the transform.
        digest = hashlib.sha256(repr(parts).encode()).digest()
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little"))
        yield


def collate(
    examples: list[dict[str, Any] | Any], with_ids: bool = False
) -> dict[str, Tensor | list[Tensor] | list[str]]:
    """Stack a batch; what differs in size stays a list, because padding would change pooling and attention.

    Examples of a [`StreamedDataset`] are loaded here, in the process that wants them.

    Args:
        examples: of a [`TransformedDataset`] or [`StreamedDataset`].
        with_ids: keep their ids, as a list of strings under `id`. A model would not know what to do with it.
    """
    examples = [example if isinstance(example, dict) else example.load() for example in examples]
    batch = {key: [example[key] for example in examples] for key in examples[0]}
    ids = batch.pop(ID, None)
    stacked = {
        key: torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors
        for key, tensors in batch.items()
    }
    return {**stacked, ID: ids} if with_ids and ids is not None else stacked
