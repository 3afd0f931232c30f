"""Load or stream a segmentation data set: the public functions and the data they return."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset

from ..errors import InputError
from .checking import (
    Depths,
    check_labels,
    check_split,
    check_stream,
    is_black_and_white,
    raise_first_problem,
    refuse_empty,
    shows_black_and_white,
)
from .classes import Classes, Color, Palettes
from .columns import to_stream
from .pictures import MAX_CHANNELS, RGB, Depth
from .scaling import DeepImage, Scaling
from .sources import Source, find_source
from .splitting import cut_fold, cut_validation, drop_leaks


@dataclass(frozen=True)
class SegmentationData:
    """A data set that is ready for training.

    Attributes:
        train, validation: data sets with the columns `id` (unique string), `image` (PIL image), `labels` (PIL image
            of mode L and of the image's size: class indices, and 255 for unlabelled pixels), `class_pixels` (number of
            pixels of each class, then of unlabelled pixels), `image_sha256` and `labels_sha256`.
        id2label: class index, 0 to C - 1, to class name.
        name: name of the source.
        test: images without masks, with the columns `id` and `image`, or None.
        colors: the data set's own colour of each class, or None.
        license: licence of the data set, or None if it is unknown.
        revision: commit of the Hub repository `name`, or None if the data set is not from the Hub.
        skipped: `SPLIT/ID` of each sample that `skip_bad_samples` left out, to the reason.
        notes: sentences about images that are there and not used.
        channels: the number of channels of the network.
        depth: the depth of deep images - more than 8 bits, or `channels` other than 3 -, or None. Deep images are
            arrays `(H, W, bands)` of the values in the files, until [`scale_pictures`] makes pictures of 8 bits.
        scaling: how [`scale_pictures`] has done that, or None.
    """

    train: Dataset
    validation: Dataset
    id2label: dict[int, str]
    name: str
    test: Dataset | None = None
    colors: tuple[Color, ...] | None = None
    license: str | None = None
    revision: str | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    channels: int = RGB
    depth: Depth | None = None
    scaling: Scaling | None = None


def load_segmentation_dataset(
    dataset_name: str | None = None,
    *,
    dataset_dir: str | Path | None = None,
    dataset_config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    id2label: str | Path | dict[int, str] | None = None,
    palette: str | Path | None = None,
    void_labels: Iterable[int] = (),
    unlabelled: str | None = None,
    channels: int = RGB,
    validation_share: float = 0.2,
    validation_seed: int = 0,
    num_folds: int | None = None,
    fold: int = 0,
    skip_bad_samples: bool = False,
    num_proc: int | None = None,
) -> SegmentationData:
    """Load images and masks, map void values to 255 and check every pair.

    Without a name or a folder, load the built-in generated street scenes.

    Args:
        dataset_name: a data set on the Hub, a folder written by `save_to_disk`, a Parquet file, or a folder of them.
        dataset_dir: a folder with Cityscapes, Pascal VOC2012, ADE20K or CamVid as downloaded, with images, masks of
            matching names and `id2label.json`, see [`layouts.read_folder`], or with annotations of COCO, Label Studio,
            labelme, Supervisely or YOLO, see [`annotations.read_annotations`].
        dataset_config: configuration name of a Hub data set.
        image_column, label_column: column names of a Hub, saved or Parquet data set. Default: common column names.
        id2label: class names, `{0: "sky", ...}` or a JSON file. Default: `id2label.json` of the folder or the Hub
            repository, or the classes of the known data set.
        palette: file of class names and colours, for masks that hold colours, see [`Classes.from_palette`]. Default:
            `palette.json` of the folder, if it exists.
        void_labels: raw mask values that mean "no label". They are mapped to 255. The value 255 means this as well,
            unless all masks hold 0 and 255 only and `id2label` lists two names without values: then 255 is read as 1.
        unlabelled: what pixels outside of all annotations are: "background", a class, or "void", no label. Default:
            "background". Only for annotations, like polygons.
        channels: number of channels of the network. With 3, images have one or three bands, and transparency is
            dropped. With another number, images have that many bands.
        validation_share: share of the training images to hold out if the data set has no validation split.
        validation_seed: seed of the held-out share and of the folds.
        num_folds: number of cross-validation folds. All images with masks, except those of a test split, are divided
            into folds, and `fold` becomes the validation split. If the training and the validation split share an
            id, all ids are prefixed with `train/` or `validation/`.
        fold: index of the validation fold, 0 to `num_folds - 1`.
        skip_bad_samples: skip samples that fail a check, and list them in `skipped`, instead of raising.
        num_proc: number of processes for the checks.

    Raises:
        InputError: an input is missing or invalid. The message names the file, the value and the remedy. Every image
            is decoded, every mask must have the size of its image and known values, no validation image may also be a
            training image, the training images must have labels of at least two classes, and the validation images
            must have labels.
    """
    if not 1 <= channels <= MAX_CHANNELS:
        raise InputError(f"channels must be between 1 and {MAX_CHANNELS}, got {channels}")
    names = (id2label, palette, tuple(void_labels))
    columns = (image_column, label_column)
    source = find_source(dataset_name, dataset_dir, dataset_config, columns, names, unlabelled)
    checking = {"channels": channels, "num_proc": num_proc}
    splits, problems, depth = _check_splits(source, skip_bad_samples, **checking)
    other = None if names[2] else source.classes.of_black_and_white()
    if other is not None and is_black_and_white(
        np.sum([row for split in splits.values() for row in split["class_pixels"]], axis=0)
    ):
        source = replace(source, classes=other, notes=(*source.notes, _black_and_white(other)))
        splits, problems, depth = _check_splits(source, skip_bad_samples, **checking)
    test = source.splits.get("test")
    if depth is not None:
        feature = DeepImage(channels=channels)
        splits = {name: split.cast_column("image", feature) for name, split in splits.items()}
        test = None if test is None else test.cast_column("image", feature)
    train, validation = splits["train"], splits.get("validation")
    if num_folds is not None:
        train, validation = cut_fold(train, validation, num_folds, fold, validation_seed)
    elif validation is None:
        train, validation = cut_validation(train, validation_share, validation_seed)
    train, leaked = drop_leaks(train, validation)
    if not skip_bad_samples:
        raise_first_problem(leaked)
    refuse_empty(train, "train", leaked)
    check_labels(train, source.classes, "training", is_training=True)
    check_labels(validation, source.classes, "validation", is_training=False)
    return SegmentationData(
        train,
        validation,
        source.classes.id2label,
        source.name,
        test=None if test is None else test.select_columns(["id", "image"]),
        colors=source.classes.colors,
        license=source.classes.license,
        revision=source.revision,
        skipped=problems | leaked,
        notes=source.notes,
        channels=channels,
        depth=depth,
    )


def _check_splits(
    source: Source, skip_bad_samples: bool, channels: int, num_proc: int | None
) -> tuple[dict[str, Dataset], dict[str, str], Depth | None]:
    """Check the training and the validation split. Return their valid samples, the problems of the others, and the
    depth of the images."""
    splits, problems, palettes, depths = {}, {}, Palettes(), Depths()
    for split in ("train", "validation"):
        if split in source.splits:
            splits[split], found = check_split(
                source.splits[split],
                source.classes,
                palettes,
                depths,
                channels=channels,
                fingerprint=source.fingerprints.get(split),
                num_proc=num_proc,
            )
            problems |= {f"{split}/{id}": problem for id, problem in found.items()}
            if skip_bad_samples:
                refuse_empty(splits[split], split, found)
    if not skip_bad_samples:
        raise_first_problem(problems)
    return splits, problems, depths.depth


def _black_and_white(classes: Classes) -> str:
    return (
        f"the masks hold the values 0 and 255 only, so 255 is read as the class {classes.names[1]!r}. Set void_labels "
        "to 255 if it means no label."
    )


@dataclass(frozen=True)
class SegmentationStream:
    """A data set that is read on the fly by [`StreamedDataset`].

    Attributes:
        train, validation: streams of the columns `id`, `image` and `labels`. Images and masks are encoded, and have
            not been checked.
        classes: meaning of the mask values.
        name: name of the source.
        revision, notes: as in [`SegmentationData`].
        has_ids: whether the data set has ids of its own, which are the same with and without streaming.
    """

    train: IterableDataset
    validation: IterableDataset
    classes: Classes
    name: str
    revision: str | None = None
    has_ids: bool = True
    notes: tuple[str, ...] = ()

    @property
    def id2label(self) -> dict[int, str]:
        return self.classes.id2label

    @property
    def colors(self) -> tuple[Color, ...] | None:
        return self.classes.colors

    @property
    def license(self) -> str | None:
        return self.classes.license


def stream_segmentation_dataset(
    dataset_name: str | None = None,
    *,
    dataset_dir: str | Path | None = None,
    dataset_config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    id2label: str | Path | dict[int, str] | None = None,
    palette: str | Path | None = None,
    void_labels: Iterable[int] = (),
    unlabelled: str | None = None,
    skip_bad_samples: bool = False,
) -> SegmentationStream:
    """Open a data set that does not fit on the disk, or that is too large to check before training.

    Its first images are read: as many as are needed to see labels of two classes in the training split, and labels in
    the validation split. All others are checked when they are read.

    Args:
        dataset_name, ...: as in [`load_segmentation_dataset`].
        skip_bad_samples: skip samples that fail a check among the first images.

    Raises:
        InputError: an input is missing, the data set has no validation split, a sample fails a check, or the first
            1000 images of a split do not show enough labels.
    """
    names = (id2label, palette, tuple(void_labels))
    columns = (image_column, label_column)
    source = find_source(dataset_name, dataset_dir, dataset_config, columns, names, unlabelled, streaming=True)
    if "validation" not in source.splits:
        raise InputError(
            f"{source.name} has no validation split, and a stream cannot be split. Add a validation split, or load "
            "the data set without streaming."
        )
    streams = {split: to_stream(source.splits[split]) for split in ("train", "validation")}
    other = None if names[2] else source.classes.of_black_and_white()
    if other is not None and shows_black_and_white(streams.values(), source.classes):
        source = replace(source, classes=other, notes=(*source.notes, _black_and_white(other)))
    check_stream(streams["train"], source.classes, "training", True, skip_bad_samples)
    check_stream(streams["validation"], source.classes, "validation", False, skip_bad_samples)
    return SegmentationStream(
        **streams,
        classes=source.classes,
        name=source.name,
        revision=source.revision,
        has_ids=source.has_ids,
        notes=source.notes,
    )
