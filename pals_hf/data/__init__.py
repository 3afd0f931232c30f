"""Data: sources, fractions of the training set, transforms."""

from .classes import IGNORE_INDEX, Classes
from .fractions import FractionManifest, draw_balanced_ids, draw_ids, train_fraction
from .sources import SegmentationData, SegmentationStream, load_segmentation_dataset, stream_segmentation_dataset
from .streaming import StreamedDataset
from .transforms import ID, WEAK_VIEW, EvalTransform, TrainTransform, TransformedDataset, collate

__all__ = [
    "ID",
    "IGNORE_INDEX",
    "WEAK_VIEW",
    "Classes",
    "EvalTransform",
    "FractionManifest",
    "SegmentationData",
    "SegmentationStream",
    "StreamedDataset",
    "TrainTransform",
    "TransformedDataset",
    "collate",
    "draw_balanced_ids",
    "draw_ids",
    "load_segmentation_dataset",
    "stream_segmentation_dataset",
    "train_fraction",
]
