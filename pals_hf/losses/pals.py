"""Pixel-wise adaptive label smoothing via self-knowledge distillation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import Affinity, aggregate_probabilities, entropy, soft_label_cross_entropy
from .base import LossOutput, SegmentationLoss

PRESETS: dict[str, dict[str, Any]] = {
    # Chosen on images held out of the training sets: see docs/evidence.md.
    "default": {"beta": 0.5, "adaptive_beta": True, "affinity": Affinity()},
    # The literal reading of the abstract: the one-hot label plus the aggregated distribution, halved, with all pairs
    # of up to 65536 positions.
    "paper": {"beta": 0.5, "adaptive_beta": False, "affinity": Affinity(tau=0.3, keys=65536)},
}


class PALSLoss(SegmentationLoss):
    """Cross-entropy with the network's own predictions, averaged over similar positions, mixed into the labels.

    `p = softmax(z / temperature)`; `q = aggregate_probabilities(f, p, affinity)`, without gradient;
    `b = beta up(q)_y`, or `beta` itself unless `adaptive_beta`; `y~ = (1 - b) onehot(y) + b up(q)`. The loss is the
    cross-entropy of `y~` with the upsampled logits, averaged over labelled pixels: [`soft_label_cross_entropy`]. This
    is a plain module that works with any torch model.

    Args:
        beta: weight of the aggregated distribution, 0 to 1. With `adaptive_beta` this is the largest weight, of a
            pixel to whose label q gives probability 1. With 0 this is cross-entropy.
        affinity: which positions are compared, and how: see [`Affinity`]. With `Affinity(weight=0)` no positions are
            compared, and the network learns from its own predictions (self-distillation).
        adaptive_beta: pixels whose label contradicts q keep their one-hot label: the weight of each pixel is beta
            times the probability that q gives to its label. This is our addition, not in the paper, whose literal
            reading is `PALSLoss(**PRESETS["paper"])`.
        distill_unlabeled: unlabelled pixels learn from q alone, with weight beta, see [`soft_label_cross_entropy`].
            Give pixels outside the image the label [`PADDING_INDEX`] then.
        ignore_index, class_weights: see [`SegmentationLoss`]. The weights do not affect q.

    References:
        Park, Kim, Heo. Semantic Segmentation Using Pixel-Wise Adaptive Label Smoothing via Self-Knowledge
        Distillation for Limited Labeling Data. Sensors 22(7):2623, 2022. This is a reconstruction: see [`functional`].

    Inputs:
        `loss(logits, labels, features=None, num_items=None, beta=None, aggregated=None)`: see
        [`SegmentationLoss.compute`]. Without `features`, and for the source `logits`, the logits are compared. `beta`
        replaces that of the module, for a schedule. `aggregated` `(B, C, h, w)` replaces q, for a q from another
        network or view of the images.

    Parts:
        the cross-entropies that the loss is mixed from, `one_hot`, `aggregated` and, with `distill_unlabeled`,
        `unlabeled`, by `beta` where that is not adaptive; and `entropy`, the mean entropy of q in nats.

    Raises:
        ValueError: `beta` is outside [0, 1].

    Example:
        >>> loss = PALSLoss(beta=0.5)
        >>> logits, labels = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 16, 16))
        >>> loss(logits, labels, features=torch.randn(2, 8, 4, 4)).backward()
    """

    def __init__(
        self,
        beta: float = PRESETS["default"]["beta"],
        affinity: Affinity = PRESETS["default"]["affinity"],
        *,
        adaptive_beta: bool = PRESETS["default"]["adaptive_beta"],
        distill_unlabeled: bool = False,
        ignore_index: int = 255,
        class_weights: Sequence[float] | Tensor | None = None,
    ):
        super().__init__(ignore_index, class_weights)
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta must lie in [0, 1], got {beta}")
        self.beta = beta
        self.affinity: Affinity = affinity
        self.adaptive_beta, self.distill_unlabeled = adaptive_beta, distill_unlabeled

    @torch.no_grad()
    def aggregate(self, logits: Tensor, features: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the aggregated distribution q, float32 `(B, C, h, w)`, of logits and features on the same grid."""
        return aggregate_probabilities(
            logits if features is None or self.affinity.source == "logits" else features,
            (logits.float() / self.affinity.temperature).softmax(dim=1),
            self.affinity,
            labels=labels,
            ignore_index=self.ignore_index,
        )

    def compute(
        self,
        logits: Tensor,
        labels: Tensor,
        features: Tensor | None = None,
        num_items: Tensor | int | None = None,
        *,
        resize: Callable[[Tensor], Tensor] | None = None,
        beta: float | None = None,
        aggregated: Tensor | None = None,
    ) -> LossOutput:
        q = self.aggregate(logits, features, labels) if aggregated is None else aggregated
        value, parts = soft_label_cross_entropy(
            logits if resize is None else resize(logits),
            labels,
            q if resize is None else resize(q),
            self.beta if beta is None else beta,
            self.ignore_index,
            num_items,
            return_parts=True,
            distill_unlabeled=self.distill_unlabeled,
            adaptive_beta=self.adaptive_beta,
            class_weights=self.class_weights,
        )
        return LossOutput(value, {**parts, "entropy": entropy(q).mean()})

    def extra_repr(self) -> str:
        names = ("beta", "adaptive_beta", "affinity", "distill_unlabeled", "ignore_index")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
