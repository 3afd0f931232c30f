"""From a checkpoint and pictures to predictions, also of images larger than the training crops, by sliding windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
from transformers.utils import logging

from .data.checking import is_deep
from .errors import InputError, first_line
from .functional import entropy, upsample, upsample_argmax
from .fused import tiles

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

_ANIMATED = ("GIF", "PNG", "WEBP")  # what other formats hold beside the first picture is a preview or another page


class Prediction(NamedTuple):
    """What a network says of one picture, at the picture's own size."""

    mask: Tensor
    """`(H, W)`, int64: the most likely class."""
    entropy: Tensor
    """`(H, W)`, float32: entropy of the class distribution in nats, 0 to log C."""


def load_for_inference(
    name_or_path: str, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A trained network and its image processor, as `pipeline` loads them.

    Args:
        name_or_path: a folder, or a name on the Hub.
        device: where the network runs. Default: a GPU if there is one.

    Raises:
        InputError: it cannot be loaded, is no trained segmentation model, or there is no such device.
    """
    where = "" if Path(name_or_path).exists() else "there is no such folder, and on the Hub: "
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of weights that are missing there is one line below
    try:
        model, info = AutoModelForSemanticSegmentation.from_pretrained(
            name_or_path, ignore_mismatched_sizes=True, output_loading_info=True
        )
        processor = AutoImageProcessor.from_pretrained(name_or_path)
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise InputError(f"cannot load the model {name_or_path!r}: {where}{first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    # The encoder of a classifier loads too, with a head of random weights.
    untrained = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if untrained:
        raise InputError(
            f"{name_or_path!r} is no trained segmentation model: it has no weights for {untrained[0]} "
            f"and {len(untrained) - 1} more: train it first"
        )
    if model.config.num_labels < 2:
        raise InputError(f"{name_or_path!r} has num_labels={model.config.num_labels}: at least two classes are needed")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device), processor
    except (AssertionError, RuntimeError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {first_line(error)}") from error


def read_pictures(path: Path) -> Iterator[Image.Image]:
    """The picture in an image file, upright and in RGB; all of them, if it is animated.

    Raises:
        InputError: the file cannot be decoded, also in the middle of reading.
    """
    try:
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        with Image.open(path) as opened:
            if is_deep(opened):
                raise ValueError(f"images of more than 8 bits a channel (mode {opened.mode}) are not read")
            for frame in ImageSequence.Iterator(opened) if opened.format in _ANIMATED else [opened]:
                yield ImageOps.exif_transpose(frame).convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a readable image: its format is not known") from error
    except Exception as error:  # decoders stumble over damaged files in all sorts of ways
        raise InputError(f"{path} is not a readable image: {first_line(error)}") from error


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Sequence[Image.Image],
    window: Sequence[int] | None = None,
    overlap: float = 1 / 3,
    flip: bool = False,
) -> list[Prediction]:
    """What a network says of some pictures, each at its own size.

    One picture without options is predicted as evaluation and `pipeline` do it, to the bit. In a batch the network
    rounds differently, which can turn a few pixels.

    Args:
        model, processor: see [`load_for_inference`].
        images: pictures of any size. Those that the processor gives one size go through the network together, if all
            of them do.
        window, overlap, flip: see [`image_logits`].

    Example:
        >>> predict(model, processor, [Image.open("street.jpg")])[0].mask.shape  # doctest: +SKIP
        torch.Size([1024, 2048])
    """
    inputs = [processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"] for image in images]
    batches = [torch.cat(inputs)] if len({pixels.shape for pixels in inputs}) == 1 else inputs
    predictions: list[Prediction] = []
    for batch in batches:
        pixel_values = batch.to(model.device, model.dtype)
        for logits in image_logits(model, pixel_values, window, overlap, flip).split(1):
            image = images[len(predictions)]
            size = (image.height, image.width)
            predictions.append(Prediction(upsample_argmax(logits, size)[0].cpu(), entropy_map(logits, size)[0].cpu()))
    return predictions


def entropy_map(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Entropy of `softmax(upsample(logits, size))` at every pixel, tile by tile.

    Args:
        logits: `(B, C, h, w)`.
        size: (H, W).

    Returns:
        Nats, 0 to log C, float32 `(B, H, W)`.
    """
    z = logits.float()
    result = z.new_empty(len(z), *size)
    for tile in tiles(z, result):  # the labels of a tile are a part of what is tiled, here of the result
        tile.labels.copy_(entropy(tile.up(z).softmax(dim=1)))
    return result


@torch.no_grad()
def image_logits(
    model: nn.Module,
    pixel_values: Tensor,
    window: Sequence[int] | None = None,
    overlap: float = 1 / 3,
    flip: bool = False,
) -> Tensor:
    """Logits of whole images.

    Args:
        model: `model(pixel_values=...)` returns `logits` `(B, C, h, w)`.
        pixel_values: `(B, 3, H, W)`.
        window, overlap: see [`window_logits`]; None gives the images to the network whole. Windows lie on the
            pixel values: where the image processor resizes, their size is meant at its size, not at the picture's.
        flip: also look at the mirrored images, and take the mean of both logits (of the log-probabilities, up to a
            constant: a geometric mean of probabilities), as it is taken where windows overlap.

    Returns:
        `(B, C, h, w)`, see [`window_logits`] with a window.
    """
    if flip:
        straight, mirrored = (
            image_logits(model, view, window, overlap) for view in (pixel_values, pixel_values.flip(3))
        )
        return (straight + mirrored.flip(3)) / 2
    if window is None:
        return model(pixel_values=pixel_values).logits
    return window_logits(model, pixel_values, window, overlap)


@torch.no_grad()
def window_logits(model: nn.Module, pixel_values: Tensor, window: Sequence[int], overlap: float = 1 / 3) -> Tensor:
    """Logits of large images by windows that slide over them; where windows overlap, their mean.

    Windows lie evenly from edge to edge. Their logits are put together on the network's own grid where the windows
    lie on it, and else at the size of the image.

    Args:
        model: `model(pixel_values=...)` returns `logits` `(B, C, h, w)`.
        pixel_values: `(B, 3, H, W)`.
        window: height and width of a window; cut to the size of the image.
        overlap: share of a window that the next one covers again, 0 to below 1.

    Returns:
        `(B, C, H / s, W / s)` with s the network's stride, or `(B, C, H, W)`; float32.

    Example:
        >>> pixel_values = torch.randn(1, 3, 1024, 2048)  # doctest: +SKIP
        >>> window_logits(model, pixel_values, (1024, 1024)).shape  # from 0, 512 and 1024  # doctest: +SKIP
        torch.Size([1, 19, 256, 512])
        >>> window_logits(model, pixel_values, (768, 768)).shape  # from 0, 427, 853 and 1280  # doctest: +SKIP
        torch.Size([1, 19, 1024, 2048])
    """
    size = pixel_values.shape[2:]
    window = [min(wanted, available) for wanted, available in zip(window, size, strict=True)]
    tops, lefts = (_starts(whole, part, overlap) for whole, part in zip(size, window, strict=True))
    total = covered = stride = None
    for top in tops:
        for left in lefts:
            part = pixel_values[:, :, top : top + window[0], left : left + window[1]]
            logits = model(pixel_values=part).logits.float()
            if total is None:
                stride = _common_stride(logits.shape[2:], window, (*size, *tops, *lefts))
                total = logits.new_zeros(*logits.shape[:2], size[0] // stride, size[1] // stride)
                covered = total.new_zeros(total.shape[2:])
            if stride == 1:
                logits = upsample(logits, window)
            place = (
                slice(top // stride, top // stride + logits.shape[2]),
                slice(left // stride, left // stride + logits.shape[3]),
            )
            total[(..., *place)] += logits
            covered[place] += 1
    return total / covered


def _starts(whole: int, part: int, overlap: float) -> list[int]:
    """Where windows begin: evenly from the first to the last pixel, at least as dense as the overlap wants it."""
    steps = math.ceil((whole - part) / max(1.0, part * (1.0 - overlap)))
    return [round(index * (whole - part) / steps) for index in range(steps)] + [whole - part]


def _common_stride(grid: torch.Size, window: Sequence[int], positions: Sequence[int]) -> int:
    """The stride of the network's grid, if it is the same both ways and the windows lie on it; else 1."""
    stride = window[0] // grid[0]
    fits = [grid[0] * stride, grid[1] * stride] == list(window)
    return stride if fits and all(position % stride == 0 for position in positions) else 1
