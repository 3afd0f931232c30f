"""What the losses of this package have in common."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import Affinity, count_pixels
from ..functional.pixel_losses import mean_over_pixels


class LossOutput(NamedTuple):
    """A loss, and the parts that it is mixed from."""

    value: Tensor
    """Scalar to call `backward` on."""
    parts: dict[str, Tensor]
    """Detached scalars by name, for the log."""


class SegmentationLoss(nn.Module):
    """A mean over labelled pixels, called `loss(logits, labels, features=None, num_items=None)`.

    Calling the module returns the scalar; `loss.compute(...)` takes the same arguments and returns a [`LossOutput`].

    Args:
        ignore_index: label of unlabelled pixels, which have no term in the loss.
        class_weights: C numbers, the weight of a labelled pixel of each class. Default: all classes weigh the same.

    Raises:
        ValueError: `class_weights` is not one number of at least 0 for each class.
    """

    affinity: Affinity | None = None  # of losses that compare positions
    distill_unlabeled = False
    class_weights: Tensor | None
    __call__: Callable[..., Tensor]

    def __init__(self, ignore_index: int = 255, class_weights: Sequence[float] | Tensor | None = None):
        super().__init__()
        self.ignore_index = ignore_index
        if class_weights is not None:
            class_weights = torch.as_tensor(class_weights, dtype=torch.float32)
            if class_weights.ndim != 1 or not (class_weights.isfinite() & (class_weights >= 0)).all():
                raise ValueError(f"class_weights must be one number of at least 0 for each class, got {class_weights}")
        self.register_buffer("class_weights", class_weights, persistent=False)

    def compute(
        self,
        logits: Tensor,
        labels: Tensor,
        features: Tensor | None = None,
        num_items: Tensor | int | None = None,
        *,
        resize: Callable[[Tensor], Tensor] | None = None,
    ) -> LossOutput:
        """Compute the loss and its parts.

        Args:
            logits: `(B, C, h, w)`, on the classifier's own grid, any floating dtype.
            labels: `(B, H, W)`, int64 classes, or `ignore_index`.
            features: `(B, D, h, w)`, the input of the classifier layer, for losses that compare positions.
            num_items: divisor instead of the number of labelled pixels: the sum of [`count`] over all parts of a
                larger batch.
            resize: fixed interpolation that the network's head applies behind its classifier, see [`Reading`].
        """
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.compute(*args, **kwargs).value

    def count(self, labels: Tensor) -> Tensor:
        """Return the `num_items` of some labels, to be summed over the parts of a larger batch: [`count_pixels`]."""
        return count_pixels(labels, self.ignore_index, self.distill_unlabeled, self.class_weights)


class PixelLoss(SegmentationLoss):
    """A loss of single pixels, averaged over the labelled ones: a subclass says what a pixel costs."""

    def of_pixels(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the named terms `(B, R, S)` of the loss of each pixel, which add up to it.

        Args:
            logits: `(B, C, R, S)`, float32, at the resolution of the labels.
            target: `(B, R, S)`, int64, a class at every pixel.
        """
        raise NotImplementedError

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
        return LossOutput(
            *mean_over_pixels(self.of_pixels, logits, labels, self.ignore_index, num_items, self.class_weights)
        )
