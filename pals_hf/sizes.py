"""The sizes of images that a network can take: plain vision transformers need multiples of their patch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import InputError
from .tap import patch_size_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def size_multiple(config: PreTrainedConfig) -> int:
    """Return the number of pixels that the sides of an image must be a multiple of.

    It is the patch size of a plain vision transformer (DINOv2, BEiT, DPT, ...), which drops the rest of an image
    without a word, and 1 for all other networks. Hierarchical networks (Swin, ConvNeXt, ...) pad, or lose a few pixels
    at the border.

    Args:
        config: config of the segmentation network.
    """
    encoder = getattr(config, "backbone_config", None) or config
    is_plain = isinstance(getattr(encoder, "hidden_size", None), int) and not hasattr(encoder, "depths")
    return (is_plain and patch_size_of(encoder)) or 1


def nearest_multiple(size: Sequence[int], multiple: int) -> list[int]:
    """Return (height, width) rounded to the nearest multiples, at least one multiple.

    UniMatch V2 (Yang et al. 2024) resizes images for DINOv2 in this way.
    """
    return [max(1, int(side / multiple + 0.5)) * multiple for side in size]


def refuse_size(config: PreTrainedConfig, size: Sequence[int], what: str) -> None:
    """Refuse a size of which the network would drop the last rows or columns.

    Args:
        config: config of the segmentation network.
        size: (height, width) of what the network sees.
        what: what has the size, for the error message.

    Raises:
        InputError: a side is not a multiple of [`size_multiple`].
    """
    multiple = size_multiple(config)
    if any(side % multiple for side in size):
        height, width = nearest_multiple(size, multiple)
        raise InputError(
            f"the network has patches of {multiple}x{multiple} pixels and would drop the rest of {what} of "
            f"{size[0]}x{size[1]} pixels. Use {height}x{width}."
        )
