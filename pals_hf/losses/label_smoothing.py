"""Uniform label smoothing: the simplest soft label, and the baseline that PALS has to beat."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..functional import soft_label_cross_entropy
from .base import LossOutput, SegmentationLoss


class LabelSmoothingLoss(SegmentationLoss):
    """Cross-entropy with labels smoothed uniformly, averaged over labelled pixels.

    `y~ = (1 - smoothing) onehot(y) + smoothing / C`, the same as `F.cross_entropy(..., label_smoothing=smoothing)`
    on upsampled logits.

    Args:
        smoothing: mass that is spread evenly over all C classes, 0 to 1.
        ignore_index, class_weights: see [`SegmentationLoss`].

    References:
        Szegedy et al. Rethinking the Inception Architecture for Computer Vision. CVPR 2016.

    Inputs:
        `loss(logits, labels, features=None, num_items=None)`: see [`SegmentationLoss.compute`]. `features` are not
        used.

    Parts:
        `one_hot` and `uniform`, the cross-entropies with the label and with the uniform distribution.

    Raises:
        ValueError: `smoothing` is outside [0, 1].
    """

    def __init__(
        self,
        smoothing: float = 0.1,
        ignore_index: int = 255,
        class_weights: Sequence[float] | Tensor | None = None,
    ):
        super().__init__(ignore_index, class_weights)
        if not 0.0 <= smoothing <= 1.0:
            raise ValueError(f"smoothing must lie in [0, 1], got {smoothing}")
        self.smoothing = smoothing

    def compute(
        self,
        logits: Tensor,
        labels: Tensor,
        features: Tensor | None = None,
        num_items: Tensor | int | None = None,
        *,
        resize: Callable[[Tensor], Tensor] | None = None,
    ) -> LossOutput:
        logits = logits if resize is None else resize(logits)
        # In float32: bfloat16 cannot represent 1 / C, and the shares of all classes would not sum to one.
        uniform = logits.new_full((), 1.0 / logits.shape[1], dtype=torch.float32).expand_as(logits)
        value, parts = soft_label_cross_entropy(
            logits,
            labels,
            uniform,
            self.smoothing,
            self.ignore_index,
            num_items,
            return_parts=True,
            class_weights=self.class_weights,
        )
        return LossOutput(value, {"one_hot": parts["one_hot"], "uniform": parts["aggregated"]})

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}, ignore_index={self.ignore_index}"
