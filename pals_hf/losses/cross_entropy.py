"""Plain cross-entropy: the baseline, on the same code path as PALS."""

from collections.abc import Sequence

from torch import Tensor

from ..functional import soft_label_cross_entropy
from .base import SegmentationLoss


class CrossEntropyLoss(SegmentationLoss):
    """Cross-entropy with one-hot labels at the labels' resolution, averaged over labelled pixels.

    [`soft_label_cross_entropy`] with `beta=0`.

    Args:
        ignore_index, class_weights: see [`SegmentationLoss`].

    Inputs:
        `loss(logits, labels, features=None, num_items=None)`: logits `(B, C, h, w)`, labels `(B, H, W)`; `features`
        are not used; `num_items` replaces the number of labelled pixels as the divisor.

    Attributes:
        parts: detached scalars of the last call: `one_hot`.
    """

    def __init__(self, ignore_index: int = 255, class_weights: Sequence[float] | Tensor | None = None):
        super().__init__(ignore_index, class_weights)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        features: Tensor | None = None,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        loss, self.parts = soft_label_cross_entropy(
            logits,
            labels,
            ignore_index=self.ignore_index,
            num_items=num_items,
            return_parts=True,
            class_weights=self.class_weights,
        )
        return loss

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}"
