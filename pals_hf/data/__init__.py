"""Data: sources, fractions of the training set, transforms."""

from .fractions import FractionManifest, draw_ids, train_fraction
from .sources import IGNORE_INDEX, SegmentationData, load_segmentation_dataset
from .transforms import WEAK_VIEW, EvalTransform, TrainTransform, TransformedDataset, collate

__all__ = [
    "IGNORE_INDEX",
    "WEAK_VIEW",
    "EvalTransform",
    "FractionManifest",
    "SegmentationData",
    "TrainTransform",
    "TransformedDataset",
    "collate",
    "draw_ids",
    "load_segmentation_dataset",
    "train_fraction",
]
