"""Losses for semantic segmentation, one a file, all called `loss(logits, labels, features=None, num_items=None)`."""

from .base import LossOutput, SegmentationLoss
from .cross_entropy import CrossEntropyLoss
from .focal import FocalLoss
from .label_smoothing import LabelSmoothingLoss
from .margin import MarginLoss
from .pals import PRESETS, PALSLoss

__all__ = [
    "PRESETS",
    "CrossEntropyLoss",
    "FocalLoss",
    "LabelSmoothingLoss",
    "LossOutput",
    "MarginLoss",
    "PALSLoss",
    "SegmentationLoss",
]
