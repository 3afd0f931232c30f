"""Load, split, check and transform segmentation data."""

from .classes import IGNORE_INDEX, Classes
from .fractions import FractionManifest, draw_balanced_ids, draw_ids, train_fraction
from .loading import SegmentationData, SegmentationStream, load_segmentation_dataset, stream_segmentation_dataset
from .scaling import Scaling, scale_pictures
from .streaming import StreamedDataset
from .transforms import ID, EvalTransform, TrainTransform, TransformedDataset, collate

__all__ = [
    "ID",
    "IGNORE_INDEX",
    "Classes",
    "EvalTransform",
    "FractionManifest",
    "Scaling",
    "SegmentationData",
    "SegmentationStream",
    "StreamedDataset",
    "TrainTransform",
    "TransformedDataset",
    "collate",
    "draw_balanced_ids",
    "draw_ids",
    "load_segmentation_dataset",
    "scale_pictures",
    "stream_segmentation_dataset",
    "train_fraction",
]
