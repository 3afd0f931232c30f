"""Predict images with a checkpoint, also images larger than the training crops, with sliding windows."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor, nn
from transformers.utils import logging

from .data.pictures import bits_of, count_pages, is_deep, refuse_deep, size_of
from .data.scaling import Scaling, channels_of
from .data.transforms import process
from .errors import InputError, first_line
from .files import read_bytes
from .functional import entropy, upsample, upsample_argmax
from .functional.fused import tiles
from .pretrained import channels_of_network, load_config, load_network, load_processor
from .sizes import refuse_size

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

logger = logging.get_logger(__name__)

_NOT_DEEP = (
    "by a model that was trained on 8 bits. Convert them as its training images were, for example with `magick IN "
    "-depth 8 OUT.png`"
)
_ANIMATED = ("GIF", "PNG", "WEBP")  # in other formats, further pictures are previews or pages


class Prediction(NamedTuple):
    """The prediction for one picture, at the size of the picture."""

    mask: Tensor
    """`(H, W)`, int64: the most likely class."""
    entropy: Tensor
    """`(H, W)`, float32: entropy of the class distribution in nats, 0 to log C."""


def load_for_inference(
    name_or_path: str, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a trained network and its image processor, as `pipeline` does.

    Args:
        name_or_path: a folder, or a name on the Hub.
        device: device of the network. Default: a GPU if there is one.

    Returns:
        The network in evaluation mode, and its image processor.

    Raises:
        InputError: the model cannot be loaded, it is not a trained segmentation model, its image processor makes
            images of another number of channels, or the device does not exist.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are reported in one line below
    try:
        model, info = load_network(name_or_path, load_config(name_or_path))
        processor = load_processor(name_or_path, "the model")
    finally:
        logging.set_verbosity(verbosity)
    # The encoder of a classifier also loads, but with a random head.
    untrained = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if untrained:
        raise InputError(
            f"{name_or_path!r} is not a trained segmentation model: it has no weights for {untrained[0]} and "
            f"{len(untrained) - 1} other parameters. Train it first."
        )
    if model.config.num_labels < 2:
        raise InputError(f"{name_or_path!r} has num_labels={model.config.num_labels}, but at least 2 are needed")
    channels, made = channels_of_network(model.config), channels_of(processor)
    if channels not in (made, None):
        raise InputError(
            f"{name_or_path!r}: the network takes {channels} channels, but the image processor makes images of {made}"
            ". Choose another checkpoint."
        )
    names = model.config.id2label
    if sorted(names) != list(range(len(names))) or not all(_is_text(name) for name in names.values()):
        raise InputError(
            f"{name_or_path!r}: id2label of its config.json must map 0 to {len(names) - 1} to class names"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device), processor
    except (AssertionError, RuntimeError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {first_line(error)}") from error


def _is_text(name: Any) -> bool:
    try:
        return isinstance(name, str) and name.encode() is not None
    except UnicodeEncodeError:  # half of a character, which cannot be printed or written
        return False


def read_pictures(
    path: Path, max_pixels: int | None = None, scaling: Scaling | None = None
) -> Iterator[Image.Image | np.ndarray]:
    """Yield the picture in an image file, or all frames of an animation, upright and in RGB.

    Args:
        path: the file.
        scaling: how the model reads deep pictures ([`Scaling.of`] its image processor). With it, the file must be like
            the images that the model was trained on, and for other than 3 channels the result is an array
            `(H, W, channels)`, uint8. Default: pictures of more than 8 bits are refused.
        max_pixels: refuse larger pictures before they are decoded. Default: the limit of Pillow, 179 megapixels.

    Raises:
        InputError: the file cannot be decoded. Damaged animations raise it after the frames before the damage.
    """
    if scaling is not None:
        yield _read_deep(path, max_pixels, scaling)
        return
    try:
        content = read_bytes(path)
        if not content:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(content)) as opened:
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                size = f"{opened.width}x{opened.height} pixels"
                raise ValueError(f"it has {size}, but at most {max_pixels / 1e6:g} megapixels are allowed")
            refuse_deep(opened, bits_of(opened), _NOT_DEEP)
            if opened.format not in _ANIMATED and count_pages(opened) > 1:
                logger.warning("%s has %d pages, of which only the first is read", path, count_pages(opened))
            for frame in ImageSequence.Iterator(opened) if opened.format in _ANIMATED else [opened]:
                yield ImageOps.exif_transpose(frame).convert("RGB")
    except UnidentifiedImageError as error:
        stack = ", or it is a stack of bands, which the model does not take" if is_deep(content) else ""
        raise InputError(f"{path} is not a readable image: its format is not known{stack}") from error
    except Exception as error:  # decoders raise many types of errors for damaged files
        raise InputError(f"{path} is not a readable image: {first_line(error)}") from error


def _read_deep(path: Path, max_pixels: int | None, scaling: Scaling) -> Image.Image | np.ndarray:
    try:
        content = read_bytes(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable image: {first_line(error)}") from error
    return scaling.read(content, str(path), max_pixels)


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Sequence[Image.Image | np.ndarray],
    window: Sequence[int] | None = None,
    overlap: float = 1 / 3,
    flip: bool = False,
) -> list[Prediction]:
    """Predict the classes of some pictures, each at its own size.

    The prediction for one picture without options is bit for bit that of evaluation and `pipeline`. In a batch the
    network rounds differently, which can change a few pixels.

    Args:
        model, processor: see [`load_for_inference`].
        images: pictures of 8 bits of any size, see [`read_pictures`]. They are one batch if the processor gives all of
            them the same size, and predicted one by one otherwise.
        window, overlap, flip: see [`image_logits`].

    Example:
        >>> predict(model, processor, [Image.open("street.jpg")])[0].mask.shape  # doctest: +SKIP
        torch.Size([1024, 2048])
    """
    inputs = [process(processor, image) for image in images]
    batches = [torch.cat(inputs)] if len({pixels.shape for pixels in inputs}) == 1 else inputs
    predictions: list[Prediction] = []
    for batch in batches:
        refuse_size(model.config, part_size(batch, window), "an image or window")
        pixel_values = batch.to(model.device, model.dtype)
        for logits in image_logits(model, pixel_values, window, overlap, flip).split(1):
            size = size_of(images[len(predictions)])
            predictions.append(Prediction(upsample_argmax(logits, size)[0].cpu(), entropy_map(logits, size)[0].cpu()))
    return predictions


def entropy_map(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the entropy of `softmax(upsample(logits, size))` at every pixel, computed tile by tile.

    Args:
        logits: `(B, C, h, w)`.
        size: (H, W).

    Returns:
        `(B, H, W)`, float32, in nats from 0 to log C.
    """
    z = logits.float()
    result = z.new_empty(len(z), *size)
    for tile in tiles(z, result):  # tile.labels is a view of the result
        tile.labels.copy_(entropy(tile.up(z).softmax(dim=1)))
    return result


def part_size(pixel_values: Tensor, window: Sequence[int] | None) -> list[int]:
    """Return (height, width) of what a network sees at once: a window, or the whole image if there is none."""
    size = pixel_values.shape[2:]
    return [min(sides) for sides in zip(size, size if window is None else window, strict=True)]


@torch.no_grad()
def image_logits(
    model: nn.Module,
    pixel_values: Tensor,
    window: Sequence[int] | None = None,
    overlap: float = 1 / 3,
    flip: bool = False,
) -> Tensor:
    """Return the logits of whole images.

    Args:
        model: `model(pixel_values=...)` returns `logits` `(B, C, h, w)`.
        pixel_values: `(B, C, H, W)`.
        window, overlap: see [`window_logits`]. With None the network gets whole images. The size of a window is in
            pixels of `pixel_values`, which are the images after the image processor has resized them.
        flip: average the logits of the images and of their mirror images. The mean of logits is the geometric mean of
            the probabilities, up to normalisation.

    Returns:
        `(B, C, h, w)`, or the result of [`window_logits`].
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
    """Return the logits of large images from sliding windows, averaged where windows overlap.

    Windows are evenly spaced from edge to edge. Their logits are averaged on the network's own grid if all windows are
    aligned with it, and at the size of the image otherwise.

    Args:
        model: `model(pixel_values=...)` returns `logits` `(B, C, h, w)`.
        pixel_values: `(B, C, H, W)`.
        window: height and width of a window, at most those of the image.
        overlap: share of a window that the next window overlaps, 0 to below 1.

    Returns:
        `(B, C, H / s, W / s)` with the network's stride s, or `(B, C, H, W)`; float32.

    Example:
        >>> pixel_values = torch.randn(1, 3, 1024, 2048)  # doctest: +SKIP
        >>> window_logits(model, pixel_values, (1024, 1024)).shape  # lefts 0, 512, 1024  # doctest: +SKIP
        torch.Size([1, 19, 256, 512])
        >>> window_logits(model, pixel_values, (768, 768)).shape  # lefts 0, 427, 853, 1280  # doctest: +SKIP
        torch.Size([1, 19, 1024, 2048])
    """
    size, window = pixel_values.shape[2:], part_size(pixel_values, window)
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
    """Return the first pixel of each window, evenly spaced, with at least the given overlap."""
    steps = math.ceil((whole - part) / max(1.0, part * (1.0 - overlap)))
    return [round(index * (whole - part) / steps) for index in range(steps)] + [whole - part]


def _common_stride(grid: torch.Size, window: Sequence[int], positions: Sequence[int]) -> int:
    """Return the stride of the network's grid if it is the same both ways and divides all positions, else 1."""
    stride = window[0] // grid[0]
    fits = [grid[0] * stride, grid[1] * stride] == list(window)
    return stride if fits and all(position % stride == 0 for position in positions) else 1
