"""Focal loss: a loss on single pixels that calibrates, with which papers on calibration compare."""

from collections.abc import Sequence

from torch import Tensor

from .base import PixelLoss


class FocalLoss(PixelLoss):
    """Cross-entropy that pixels weigh less in the more certain they are of their label, averaged over labelled pixels.

    `L = mean over labelled pixels u of -(1 - p_u)^gamma log p_u`, with `p_u = softmax(up(z)_u)[y_u]`. With `gamma=0`
    this is cross-entropy. Lin et al. proposed it for detection, and Mukhoti et al. for calibration. The default of
    gamma is that of the code of margin-based label smoothing, which compares with it ([`MarginLoss`]).

    Args:
        gamma: how much less certain pixels weigh, at least 0.
        ignore_index, class_weights: see [`SegmentationLoss`].

    References:
        Lin et al. Focal Loss for Dense Object Detection. ICCV 2017. Mukhoti et al. Calibrating Deep Neural Networks
        using Focal Loss. NeurIPS 2020.

    Inputs:
        `loss(logits, labels, features=None, num_items=None)`: see [`SegmentationLoss.compute`]. `features` are not
        used.

    Parts:
        `focal`, the loss itself.

    Raises:
        ValueError: `gamma` is negative.
    """

    def __init__(
        self,
        gamma: float = 3.0,
        ignore_index: int = 255,
        class_weights: Sequence[float] | Tensor | None = None,
    ):
        super().__init__(ignore_index, class_weights)
        if not gamma >= 0.0:
            raise ValueError(f"gamma must be at least 0, got {gamma}")
        self.gamma = gamma

    def of_pixels(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        log_p = logits.log_softmax(dim=1).gather(1, target.unsqueeze(1)).squeeze(1)
        # 1 - p in a form that keeps its gradient finite where p rounds to 1, and whose power has one at 0.
        rest = (-log_p.expm1()).clamp(min=1e-12)
        return {"focal": -(rest**self.gamma) * log_p}

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, ignore_index={self.ignore_index}"
