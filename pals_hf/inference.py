"""Inference on images larger than the training crops: windows that slide over them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .functional import upsample


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
        >>> window_logits(model, torch.randn(1, 3, 1024, 2048), (768, 768)).shape  # doctest: +SKIP
        torch.Size([1, 19, 256, 512])
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
