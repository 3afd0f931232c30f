"""Images and masks to tensors: joint augmentation for training, only the image processor for evaluation."""

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
from .pictures import RGB, to_tensor
from .scaling import channels_of

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image
    from transformers import BaseImageProcessor


ID = "id"  # key of the id in an example, and of the ids in a batch


def process(processor: BaseImageProcessor, image: Image | np.ndarray | Tensor, **options: Any) -> Tensor:
    """Return the `pixel_values`, float32 `(1, C, H, W)`, that an image processor makes of a picture of 8 bits.

    Args:
        processor: image processor of the model.
        image: a PIL image, which becomes RGB, an array `(H, W, C)`, or a tensor `(C, H, W)`; uint8.
        options: options of the image processor.
    """
    if isinstance(image, np.ndarray):
        image = to_tensor(image)
    if isinstance(image, Tensor):
        options["input_data_format"] = "channels_first"  # the number of channels does not tell
    else:
        image = image.convert("RGB")
    return processor(images=image, return_tensors="pt", **options)["pixel_values"]


class TrainTransform:
    """Random scale, crop, flip and colour jitter of an image and its mask, then the image processor's normalisation.

    Images that are smaller than the crop are padded with the mean colour, and their masks with `padding_index`.

    Args:
        processor: image processor of the model. It resizes before the augmentation, if it resizes, and normalises
            after it, exactly as in evaluation.
        crop_size: (height, width) of the training crops.
        scale_range: (low, high) of the random factor by which the image is resized before the crop.
        color_jitter: strength of random brightness, contrast and saturation, 0 to 1.
        padding_index: label of padding: the ignore index, or [`functional.PADDING_INDEX`] for losses that distinguish
            padding from unlabelled pixels of the image.
        rare_classes: class indices that the next two options favour, see [`balance.rare_classes`].
        rare_crop: probability that a crop contains a chosen pixel of a rare class, if the image has a rare class.
        copy_paste: probability that the rare classes of a second image are pasted over the crop (Ghiasi et al. Simple
            Copy-Paste. CVPR 2021). [`TransformedDataset`] passes the second image.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        crop_size: tuple[int, int],
        scale_range: tuple[float, float] = (0.75, 1.5),
        color_jitter: float = 0.3,
        padding_index: int = IGNORE_INDEX,
        rare_classes: Sequence[int] = (),
        rare_crop: float = 0.0,
        copy_paste: float = 0.0,
    ):
        self.processor = processor
        self.padding_index = padding_index
        self.rare_classes = torch.tensor(rare_classes, dtype=torch.int16)
        self.copy_paste = copy_paste if len(rare_classes) else 0.0
        mean = [round(255 * value) for value in processor.image_mean or [0.5] * channels_of(processor)]
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

    def __call__(
        self, image: Image | np.ndarray, labels: Image, donor: tuple[Image | np.ndarray, Image] | None = None
    ) -> dict[str, Tensor]:
        """Return `pixel_values`, float32 `(C, H, W)`, and `labels`, int64 `(H, W)`.

        Args:
            image, labels: an image, which is an array `(H, W, C)` if it is not RGB, and its mask of class indices.
            donor: a second image and mask, whose rare classes are pasted over the crop.

        Raises:
            InputError: the image processor changes the size of the crop.
        """
        picture, mask = self._crop(image, labels)
        if donor is not None:
            other_picture, other_mask = self._crop(*donor)
            pasted = torch.isin(other_mask, self.rare_classes)
            picture = tv_tensors.Image(torch.where(pasted, other_picture, picture))
            mask = tv_tensors.Mask(torch.where(pasted, other_mask, mask))
        pixel_values = self._process(self._jitter(picture), mask.shape)
        return {"pixel_values": pixel_values, "labels": mask.as_subclass(Tensor).long()}

    def _crop(self, image: Image | np.ndarray, labels: Image) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        return self.geometry(tv_tensors.Image(to_tensor(image)), tv_tensors.Mask(np.array(labels, dtype=np.int16)))

    def _jitter(self, picture: tv_tensors.Image) -> Tensor:
        """Jitter colours, or the bands of other pictures than RGB: each as a grey image, all by the same factors."""
        if picture.shape[0] == RGB:
            return self.jitter(picture)
        return self.jitter(picture.as_subclass(Tensor)[:, None])[:, 0]

    def _process(self, picture: Tensor, size: torch.Size) -> Tensor:
        pixel_values = process(self.processor, picture.as_subclass(Tensor), do_resize=False)[0]
        if pixel_values.shape[1:] != size:
            raise InputError(
                f"{type(self.processor).__name__} changes the size of a crop from {tuple(size)} to "
                f"{tuple(pixel_values.shape[1:])}. Create it with build_image_processor."
            )
        return pixel_values


def resize_of(processor: BaseImageProcessor) -> v2.Resize:
    """Return the resize of an image processor as a transform of an image and its mask."""
    interpolation = pil_torch_interpolation_mapping[processor.resample]
    return v2.Resize((processor.size["height"], processor.size["width"]), interpolation)


class EvalTransform:
    """Apply the image processor to the image, and keep the mask at its own size, without resizing or padding.

    Args:
        processor: image processor of the model.
    """

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, image: Image | np.ndarray, labels: Image) -> dict[str, Tensor]:
        return {
            "pixel_values": process(self.processor, image)[0],
            "labels": torch.from_numpy(np.array(labels, dtype=np.int64)),
        }


class RandomScale(v2.Transform):
    """Resize an image and its mask by the same random factor, uniform between `low` and `high`."""

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
    """A random crop that, with some probability, contains a random pixel of a rare class of the mask.

    The class is drawn uniformly from the rare classes in the mask, and the pixel uniformly from its pixels.

    Args:
        size: (height, width) of the crop.
        rare_classes: class indices, int16.
        probability: probability of the crop around a rare class. 0 is a plain random crop.
        kwargs: arguments of [`~torchvision.transforms.v2.RandomCrop`].
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
    """A data set with a transform whose randomness depends only on (seed, epoch, index).

    Training therefore sees the same crops with any number of workers and processes, and after a resume in the middle
    of an epoch.

    Args:
        dataset: a data set with the columns `image` and `labels`, and for `copy_paste` also `class_pixels`.
        transform: called as `transform(image, labels)`. A [`TrainTransform`] with `copy_paste` is also passed a
            `donor`, an image with a rare class.
        seed: seed of the transform's randomness.
    """

    def __init__(
        self, dataset: datasets.Dataset, transform: Callable[[Image, Image], dict[str, Tensor]], seed: int = 0
    ):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        # In shared memory, so that persistent workers see a change of the epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._copy_paste = getattr(transform, "copy_paste", 0.0)
        self._donors: list[int] = []
        if self._copy_paste:
            rare = transform.rare_classes.tolist()
            rows = dataset["class_pixels"]
            self._donors = [index for index, row in enumerate(rows) if any(row[label] for label in rare)]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the crops."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        example, donor = self.dataset[int(index)], []
        with seeded(self.seed, int(self._epoch), int(index)):
            if self._donors and torch.rand(()) < self._copy_paste:
                other = self.dataset[self._donors[int(torch.randint(len(self._donors), ()))]]
                donor = [(other["image"], other["labels"])]
            tensors = self.transform(example["image"], example["labels"], *donor)
        return {**tensors, ID: example[ID]} if ID in example else tensors


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed torch's CPU generator with a hash of `parts`, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every device, which is slower than the transform.
        digest = hashlib.sha256(repr(parts).encode()).digest()
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little"))
        yield


def collate(
    examples: list[dict[str, Any] | Any], with_ids: bool = False
) -> dict[str, Tensor | list[Tensor] | list[str]]:
    """Stack a batch. Tensors of different sizes stay a list, because padding would change pooling and attention.

    Examples of a [`StreamedDataset`] are loaded here, in the process that uses them.

    Args:
        examples: examples of a [`TransformedDataset`] or [`StreamedDataset`].
        with_ids: keep the ids, as a list of strings under `id`, which a model does not accept.
    """
    examples = [example if isinstance(example, dict) else example.load() for example in examples]
    batch = {key: [example[key] for example in examples] for key in examples[0]}
    ids = batch.pop(ID, None)
    stacked = {
        key: torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors
        for key, tensors in batch.items()
    }
    return {**stacked, ID: ids} if with_ids and ids is not None else stacked
