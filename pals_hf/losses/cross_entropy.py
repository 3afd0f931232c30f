"""Plain cross-entropy: the baseline, on the same code path as PALS."""

from collections.abc import Callable

from torch import Tensor

from ..functional import soft_label_cross_entropy
from .base import LossOutput, SegmentationLoss


class CrossEntropyLoss(SegmentationLoss):
    """Cross-entropy with one-hot labels at the labels' resolution, averaged over labelled pixels.

    This is [`soft_label_cross_entropy`] with `beta=0`.

    Args:
        ignore_index, class_weights: see [`SegmentationLoss`].

    Inputs:
        `loss(logits, labels, features=None, num_items=None)`: see [`SegmentationLoss.compute`]. `features` are not
        used.

    Parts:
        `one_hot`, the cross-entropy with the label.
    """

    def compute(
        self,
        logits: Tensor,
        labels: Tensor,
        features: Tensor | None = None,
        num_items: Tensor | int | None = None,
        *,
        resize: Callable[[Tensor], Tensor] | None = None,
    ) -> LossOutput:
        return LossOutput(
            *soft_label_cross_entropy(
                logits if resize is None else resize(logits),
                labels,
                ignore_index=self.ignore_index,
                num_items=num_items,
                return_parts=True,
                class_weights=self.class_weights,
            )
        )

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}"
