"""From the options of a training to its data sets."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from accelerate import PartialState

from ..config import PALSConfig
from ..data import (
    IGNORE_INDEX,
    EvalTransform,
    FractionManifest,
    SegmentationData,
    SegmentationStream,
    StreamedDataset,
    TrainTransform,
    TransformedDataset,
    stream_segmentation_dataset,
)
from ..data.balance import rare_classes
from ..data.resizing import cache_resized
from ..errors import InputError
from ..functional import PADDING_INDEX
from ..sizes import nearest_multiple
from .arguments import TrainArguments, read_data, source_of
from .ending import is_main_process

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import BaseImageProcessor


def load_data(args: TrainArguments) -> tuple[SegmentationData | SegmentationStream, FractionManifest | None]:
    """Load the data set, and reduce its training split to the fraction. Return it with the record of the fraction."""
    if not is_main_process():
        datasets.disable_progress_bars()
    if args.streaming:
        chosen = None if args.train_manifest is None else FractionManifest.load(args.train_manifest)
        stream = stream_segmentation_dataset(**source_of(args), skip_bad_samples=args.skip_bad_samples)
        print_notes(stream)
        if chosen is not None and not stream.has_ids:
            raise InputError(f"train_manifest needs a column id, by which {stream.name} would name its images")
        return stream, chosen
    data = read_data(args, args.skip_bad_samples)
    every = data.train
    data = args.hold_out(data)
    print_notes(data)
    record = {"name": data.name, "id2label": data.id2label}
    if args.train_manifest is not None:
        manifest = FractionManifest.load(args.train_manifest, data.train, **record)
        manifest.refuse_other(args.train_manifest, data.train, every)  # maybe of a run without held-out images
    else:
        share = 1.0 if args.train_fraction is None and args.train_count is None else args.train_fraction
        manifest = FractionManifest.draw(
            data.train, share, args.fraction_seed, count=args.train_count, method=args.fraction_method, **record
        )
    chosen = manifest.select(data.train)
    if not args.eval_only:
        check_chosen(chosen, data.id2label)
    return replace(data, train=args.degrade(chosen)), manifest


def print_notes(data: SegmentationData | SegmentationStream) -> None:
    """Say which images are not used, and why."""
    if not is_main_process():
        return
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    for name, problem in getattr(data, "skipped", {}).items():
        print(f"skipped {name}: {problem}", file=sys.stderr)


def check_chosen(images: Dataset, id2label: dict[int, str]) -> None:
    """Say which classes the chosen training images do not show.

    Raises:
        InputError: they show one class only, or none.
    """
    pixels = np.sum(images["class_pixels"], axis=0)
    missing = [name for index, name in id2label.items() if not pixels[index]]
    if len(missing) > len(id2label) - 2:
        shown = [f"labels of the class {name!r} only" for name in id2label.values() if name not in missing]
        raise InputError(
            f"the {len(images)} chosen training images have {shown[0] if shown else 'no labels'}, but training needs "
            "at least two classes. Choose more images, or use fraction_method balanced."
        )
    if missing and is_main_process():
        print(f"note: no training image shows {', '.join(missing)}", file=sys.stderr)


def fit_sizes(
    args: TrainArguments, config: PALSConfig, data: SegmentationData | SegmentationStream, multiple: int
) -> None:
    """Round the sizes that a network with patches sees to the nearest multiples of its patch size.

    Without an image size, images of one size are resized to the nearest multiples. The image processor that is saved
    resizes in the same way, so training, evaluation and `pipeline` see the same images.

    Raises:
        InputError: there is no image size, and the images differ in size or are streamed.
    """
    if multiple == 1:
        return
    if args.image_size is None:
        args.image_size = _size_of_all(data, multiple)
    for options, name in ((args, "image_size"), (args, "crop_size"), (config, "eval_window")):
        size = getattr(options, name)
        rounded = size and nearest_multiple(size, multiple)
        if rounded != size:
            setattr(options, name, rounded)
            if is_main_process():
                print(
                    f"note: {name} {rounded[0]} {rounded[1]}, not {size[0]} {size[1]}: the network needs multiples of "
                    f"its patch size, {multiple} pixels",
                    file=sys.stderr,
                )


def _size_of_all(data: SegmentationData | SegmentationStream, multiple: int) -> list[int] | None:
    """Return the size that all images have, or None if they differ but all of them are multiples."""
    need = f"the network needs images whose sides are multiples of its patch size, {multiple} pixels"
    if isinstance(data, SegmentationStream):
        raise InputError(f"{need}, and the sizes in a stream are not known beforehand: choose an image_size")
    masks = (row["labels"] for split in (data.train, data.validation) for row in split.select_columns("labels"))
    sizes = {(mask.height, mask.width) for mask in masks}
    if all(side % multiple == 0 for size in sizes for side in size):
        return None
    if len(sizes) > 1:
        height, width = nearest_multiple(min(sizes), multiple)
        raise InputError(f"{need}. Your images differ in size: choose one, for example --image_size {height} {width}")
    return list(sizes.pop())


def build_datasets(
    args: TrainArguments, config: PALSConfig, data: SegmentationData, _, processor: BaseImageProcessor
) -> tuple[TransformedDataset, TransformedDataset]:
    first, train_images = data.train[0]["image"], data.train
    if args.cache_images:
        with PartialState().local_main_process_first():
            train_images = cache_resized(data.train, processor, args.preprocessing_num_workers)
    augment = build_augmentation(
        args,
        config,
        processor,
        args.crop_size or args.image_size or (first.height, first.width),
        rare_classes=rare_classes([row[:-1] for row in data.train["class_pixels"]]),
        rare_crop=args.rare_crop,
        copy_paste=args.copy_paste,
    )
    return (
        TransformedDataset(train_images, augment, seed=config.seed),
        TransformedDataset(data.validation, EvalTransform(processor)),
    )


def build_streams(
    args: TrainArguments,
    config: PALSConfig,
    data: SegmentationStream,
    manifest: FractionManifest | None,
    processor: BaseImageProcessor,
) -> tuple[StreamedDataset, StreamedDataset]:
    augment = build_augmentation(args, config, processor, args.crop_size or args.image_size)
    ids = None if manifest is None else manifest.ids
    skip = {"skip_bad_samples": args.skip_bad_samples}
    return (
        StreamedDataset(data.train, data.classes, augment, config.seed, shuffle=True, repeat=True, ids=ids, **skip),
        StreamedDataset(data.validation, data.classes, EvalTransform(processor), **skip),
    )


def build_augmentation(
    args: TrainArguments,
    config: PALSConfig,
    processor: BaseImageProcessor,
    crop_size: tuple[int, int],
    **for_rare_classes: Any,
) -> TrainTransform:
    return TrainTransform(
        processor,
        crop_size,
        args.scale_range,
        args.color_jitter,
        padding_index=PADDING_INDEX if config.distill_unlabeled else IGNORE_INDEX,
        **for_rare_classes,
    )
