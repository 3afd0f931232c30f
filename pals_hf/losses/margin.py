"""Margin-based label smoothing: a penalty on large logits, with which papers on calibration compare."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .base import PixelLoss


class MarginLoss(PixelLoss):
    """Cross-entropy and a penalty on logits far below the largest one, averaged over labelled pixels.

    `L = mean over labelled pixels u of -log p_u + weight / C sum_c max(0, max_k up(z)_uk - up(z)_uc - margin)`, with
    `p_u = softmax(up(z)_u)[y_u]`. With `weight=0` this is cross-entropy.

    Args:
        margin: distance between logits from which on it is penalised. The default is that of the paper's code.
        weight: weight of the penalty. The default is that of the paper's code.
        ignore_index, class_weights: see [`SegmentationLoss`].

    References:
        Liu et al. The Devil is in the Margin: Margin-based Label Smoothing for Network Calibration. CVPR 2022. Its
        code averages the penalty over classes, and so does this module.

    Inputs:
        `loss(logits, labels, features=None, num_items=None)`: see [`SegmentationLoss.compute`]. `features` are not
        used.

    Parts:
        `one_hot`, the cross-entropy with the label, and `margin`, the penalty times its weight.

    Raises:
        ValueError: `margin` or `weight` is negative.
    """

    def __init__(
        self,
        margin: float = 10.0,
        weight: float = 0.1,
        ignore_index: int = 255,
        class_weights: Sequence[float] | Tensor | None = None,
    ):
        super().__init__(ignore_index, class_weights)
        if not (margin >= 0.0 and weight >= 0.0):
            raise ValueError(f"margin and weight must be at least 0, got {margin} and {weight}")
        self.margin, self.weight = margin, weight

    def of_pixels(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        below = logits.amax(dim=1, keepdim=True) - logits
        penalty = F.relu(below - self.margin).mean(dim=1)
        return {"one_hot": F.cross_entropy(logits, target, reduction="none"), "margin": self.weight * penalty}

    def extra_repr(self) -> str:
        return f"margin={self.margin}, weight={self.weight}, ignore_index={self.ignore_index}"
