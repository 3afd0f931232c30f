"""Pixel-wise adaptive label smoothing via self-knowledge distillation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional import aggregate_probabilities, check_affinity, entropy, soft_label_cross_entropy
from .base import SegmentationLoss

PRESETS = {
    # A sharp affinity is what makes q better than the prediction (examples/studies/camvid_targets), and a temperature
    # above 1 costs calibration and gains nothing (examples/studies/camvid_drives). Beta follows
    # examples/studies/camvid_ablation. At most 2048 blocks are compared, so that the cost does not grow with the
    # image: see examples/benchmark_loss.py.
    "default": {
        "beta": 0.5,
        "beta_schedule": "constant",
        "adaptive_beta": True,
        "tau": 0.03,
        "temperature": 1.0,
        "max_affinity_cells": 2048,
    },
    # The literal reading of the abstract: the one-hot label plus the aggregated distribution, halved; all pairs of up
    # to 65536 cells.
    "paper": {
        "beta": 0.5,
        "beta_schedule": "constant",
        "adaptive_beta": False,
        "tau": 0.3,
        "temperature": 1.0,
        "max_affinity_cells": 65536,
    },
}


class PALSLoss(SegmentationLoss):
    """Cross-entropy with the network's own predictions, averaged over similar pixels, mixed into the labels.

    `p = softmax(z / temperature)`; `q = aggregate_probabilities(f, p, tau)`, without gradient;
    `b = beta up(q)_y`, or `beta` itself unless `adaptive_beta`; `y~ = (1 - b) onehot(y) + b up(q)`; the loss is the
    cross-entropy of `y~` with the upsampled logits, averaged over labelled pixels: [`soft_label_cross_entropy`]. A
    plain module: it works with any torch model.

    Args:
        beta: weight of the aggregated distribution, 0 to 1; with `adaptive_beta` the largest, that of a pixel whose
            label q is sure of. With 0 this is cross-entropy.
        tau: temperature of the affinity between pixels, > 0; smaller compares more sharply.
        temperature: softmax temperature of the predictions that are averaged, > 0; larger is softer.
        ignore_index, class_weights: see [`SegmentationLoss`]. The weights have no part in q.
        pairs, include_self, void_keys, propagation_steps, propagation_weight, anchor_weight, affinity_stride,
        affinity_pooling, max_affinity_cells: which cells are averaged, and how: see [`aggregate_probabilities`].
            Exact, over all pairs, unless told otherwise; [`PALSConfig`] has a cap of its own.
        distill_void: pixels labelled `ignore_index` learn from q alone, with weight `beta`, see
            [`soft_label_cross_entropy`]. Label what lies outside the image [`PADDING_INDEX`] then.
        adaptive_beta: beta times what q gives a pixel's label is the pixel's own beta, so that a label that q
            contradicts is not softened. Not in the paper: `PALSLoss(0.5, tau=0.3, adaptive_beta=False)` is that read
            literally. See [`soft_label_cross_entropy`].

    References:
        Park, Kim, Heo. Semantic Segmentation Using Pixel-Wise Adaptive Label Smoothing via Self-Knowledge
        Distillation for Limited Labeling Data. Sensors 22(7):2623, 2022. A reconstruction: see [`functional`].

    Inputs:
        `loss(logits, labels, features=None, num_items=None, aggregated=None)`: logits `(B, C, h, w)` on the
        classifier's own grid; labels `(B, H, W)`; features `(B, D, h, w)`, the input of the classifier layer -
        without them the logits serve; `num_items` replaces the number of labelled pixels as the divisor;
        `aggregated` `(B, C, h, w)` replaces q, for one from another network or another view of the images.

    Attributes:
        parts: detached scalars of the last call: the cross-entropies the loss is mixed from, `one_hot`, `aggregated`
            and, with `distill_void`, `void`, by `beta` where that is not adaptive; and `entropy`, the mean entropy of
            q in nats.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> loss = PALSLoss(beta=0.5)
        >>> logits, labels = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 16, 16))
        >>> loss(logits, labels, features=torch.randn(2, 8, 4, 4)).backward()
    """

    def __init__(
        self,
        beta: float = PRESETS["default"]["beta"],
        tau: float = PRESETS["default"]["tau"],
        temperature: float = PRESETS["default"]["temperature"],
        ignore_index: int = 255,
        *,
        pairs: str = "all",
        include_self: bool = True,
        void_keys: bool = True,
        propagation_steps: int = 1,
        propagation_weight: float = 1.0,
        anchor_weight: float = 0.0,
        affinity_stride: int = 1,
        affinity_pooling: str = "both",
        max_affinity_cells: int | None = None,
        distill_void: bool = False,
        adaptive_beta: bool = PRESETS["default"]["adaptive_beta"],
        class_weights: Sequence[float] | Tensor | None = None,
    ):
        super().__init__(ignore_index, class_weights)
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta must lie in [0, 1], got {beta}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.affinity = {
            "tau": tau,
            "pairs": pairs,
            "include_self": include_self,
            "propagation_steps": propagation_steps,
            "propagation_weight": propagation_weight,
            "anchor_weight": anchor_weight,
            "affinity_stride": affinity_stride,
            "affinity_pooling": affinity_pooling,
            "max_affinity_cells": max_affinity_cells,
        }
        check_affinity(**self.affinity)
        self.affinity["void_keys"] = void_keys
        self.beta = beta
        self.temperature = temperature
        self.distill_void = distill_void
        self.adaptive_beta = adaptive_beta

    @torch.no_grad()
    def aggregate(self, logits: Tensor, features: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """The aggregated distribution q, float32 `(B, C, h, w)`, for logits and features of the same grid."""
        probabilities = (logits.float() / self.temperature).softmax(dim=1)
        return aggregate_probabilities(
            logits if features is None else features,
            probabilities,
            labels=labels,
            ignore_index=self.ignore_index,
            **self.affinity,
        )

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        features: Tensor | None = None,
        num_items: Tensor | int | None = None,
        aggregated: Tensor | None = None,
    ) -> Tensor:
        if aggregated is None:
            aggregated = self.aggregate(logits, features, labels)
        loss, parts = soft_label_cross_entropy(
            logits,
            labels,
            aggregated,
            self.beta,
            self.ignore_index,
            num_items,
            return_parts=True,
            distill_void=self.distill_void,
            adaptive_beta=self.adaptive_beta,
            class_weights=self.class_weights,
        )
        self.parts = {**parts, "entropy": entropy(aggregated).mean()}
        return loss

    def extra_repr(self) -> str:
        settings = {"beta": self.beta, "temperature": self.temperature, **self.affinity}
        settings |= {"distill_void": self.distill_void, "adaptive_beta": self.adaptive_beta}
        settings |= {"ignore_index": self.ignore_index}
        return ", ".join(f"{name}={value}" for name, value in settings.items())
