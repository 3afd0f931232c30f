"""What the losses of this package have in common."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional import count_pixels


class SegmentationLoss(nn.Module):
    """A mean over labelled pixels, called `loss(logits, labels, features=None, num_items=None)`.

    Args:
        ignore_index: label of void pixels: they have no term in the loss.
        class_weights: what a labelled pixel of each class counts, C numbers; without them all count the same.

    Attributes:
        parts: detached scalars of the last call: what the loss is mixed from.
    """

    distill_void = False

    def __init__(self, ignore_index: int = 255, class_weights: Sequence[float] | Tensor | None = None):
        super().__init__()
        self.ignore_index = ignore_index
        if class_weights is not None:
            class_weights = torch.as_tensor(class_weights, dtype=torch.float32)
            if class_weights.ndim != 1 or not (class_weights.isfinite() & (class_weights >= 0)).all():
                raise ValueError(f"class_weights must be one number of at least 0 a class, got {class_weights}")
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.parts: dict[str, Tensor] = {}

    def count(self, labels: Tensor) -> Tensor:
        """The `num_items` of some labels, to be summed over the parts of a larger batch: see [`count_pixels`]."""
        return count_pixels(labels, self.ignore_index, self.distill_void, self.class_weights)
