"""From the options of a training to its data sets."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from accelerate import PartialState
from transformers.utils import IMAGE_PROCESSOR_NAME

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
from ..data.pictures import RGB
from ..data.resizing import cache_resized
from ..data.scaling import Scaling, scale_pictures
from ..errors import InputError
from ..functional import PADDING_INDEX
from ..pretrained import load_processor
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
    if args.calibrate:
        check_for_calibration(data.validation)
    return replace(data, train=args.degrade(chosen)), manifest


def scale_data(
    args: TrainArguments, config: PALSConfig, data: SegmentationData | SegmentationStream
) -> SegmentationData | SegmentationStream:
    """Make pictures of 8 bits of deep images, by the chosen training images or as an earlier model does, and say so.

    Raises:
        InputError: the model that is scored, or the run that is resumed, reads other pictures than those of the data.
    """
    earlier = args.model_name_or_path if args.eval_only else config.resume_from_checkpoint
    known = None
    if earlier is not None and (args.eval_only or Path(earlier, IMAGE_PROCESSOR_NAME).exists()):
        known = Scaling.of(load_processor(earlier, "the model"))
        refuse_other_pictures(earlier, known, data)
    if isinstance(data, SegmentationStream) or data.depth is None:
        return data
    data = scale_pictures(data, known)
    if is_main_process():
        print(f"note: {data.scaling} {how_to_predict(data.scaling)}", file=sys.stderr)
    return data


def refuse_other_pictures(earlier: str, known: Scaling | None, data: SegmentationData | SegmentationStream) -> None:
    """Refuse pictures of another depth or number of channels than a model was trained on.

    Raises:
        InputError: the message names both.
    """
    depth, channels = (None, RGB) if isinstance(data, SegmentationStream) else (data.depth, data.channels)
    of_model = (None, RGB) if known is None else (known.depth, known.channels)
    if of_model != (depth, channels):
        was, now = (
            f"{each or '8 bits per channel'}, --channels {number}" for each, number in (of_model, (depth, channels))
        )
        raise InputError(
            f"{earlier} was trained on other images ({was}) than those of the data set ({now}). Use the same kind of "
            "images and --channels."
        )


def how_to_predict(scaling: Scaling) -> str:
    """Say who else reads such pictures, because `pipeline` does not."""
    if scaling.channels != RGB:
        return "`pipeline` cannot read such files: use `pals-hf predict`."
    return "`pipeline` reads such files without this scaling: use `pals-hf predict`, or give it scaled pictures."


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


def check_for_calibration(images: Dataset) -> None:
    """Check that a temperature can be fitted to the validation images.

    Raises:
        InputError: there are too few of them, or they show one class only.
    """
    labelled = np.array(images["class_pixels"])[:, :-1] > 0
    problem = "has labels in fewer than two images" if labelled.any(axis=1).sum() < 2 else None
    if labelled.any(axis=0).sum() < 2:
        problem = "shows fewer than two classes"
    if problem:
        raise InputError(f"calibrate needs more than this validation split, which {problem}. Leave calibrate out")


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
    first, train_images = data.train[0]["labels"], data.train  # a mask has the size of its image, at any depth
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
