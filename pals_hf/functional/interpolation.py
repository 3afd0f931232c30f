"""From the classifier's grid to the labels' resolution."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Number of classes that are upsampled at once for the argmax.
_CLASSES_AT_ONCE = 4


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate `(B, C, h, w)` maps bilinearly to `size`, `align_corners=False`: the `up` of the formulas.

    The image processors of transformers do the same to logits before they take the argmax.
    """
    if maps.shape[2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def upsample_argmax(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return the most likely class of every pixel, bit for bit `upsample(logits, size).argmax(dim=1)`.

    A few classes are upsampled at a time, so that full-resolution logits never exist.

    Args:
        logits: `(B, C, h, w)`.
        size: (H, W).

    Returns:
        `(B, H, W)`, int64.

    Example:
        >>> upsample_argmax(torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]]), (1, 4))
        tensor([[[0, 0, 1, 1]]])
    """
    best = logits.new_full((logits.shape[0], *size), -torch.inf)
    winner = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, logits.shape[1], _CLASSES_AT_ONCE):
        maps = upsample(logits[:, start : start + _CLASSES_AT_ONCE], size)
        highest, index = maps.max(dim=1)
        is_better = highest > best  # of equals the first wins, as in argmax
        best = torch.where(is_better, highest, best)
        winner = torch.where(is_better, index + start, winner)
    return winner
