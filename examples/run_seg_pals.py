#!/usr/bin/env python
"""Train a segmentation model with PALS, from images and masks to a checkpoint for `from_pretrained`.

    accelerate launch examples/run_seg_pals.py --train_fraction 0.5

trains a small SegFormer on built-in street scenes, offline. With your own data and a pretrained backbone:

    accelerate launch examples/run_seg_pals.py --dataset_dir my_data --model_name_or_path nvidia/mit-b0 \
        --image_size 512 512 --train_fraction 0.1

`my_data` has train/images/NAME.jpg, train/masks/NAME.png, the same for val, and id2label.json; Cityscapes, Pascal
VOC2012, ADE20K and CamVid are recognised as they are downloaded. Every flag can come
from a recipe: `--recipe settings.yaml`; flags on the command line win.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import time
import uuid
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL.Image import Image, fromarray
from transformers import (
    BaseImageProcessor,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedModel,
    set_seed,
)
from transformers.utils import is_matplotlib_available

from pals_hf import PALSConfig, PALSTrainer, load_segmentation_dataset
from pals_hf.checkpoints import is_complete_checkpoint
from pals_hf.data import (
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
from pals_hf.data.balance import rare_classes
from pals_hf.data.checking import read_pair
from pals_hf.data.degrade import label_by_clicks, mislabel
from pals_hf.data.fractions import MANIFEST, METHODS
from pals_hf.data.resizing import cache_resized
from pals_hf.data.sources import hold_out
from pals_hf.errors import InputError, PushError, TrainingError
from pals_hf.functional import PADDING_INDEX
from pals_hf.inference import load_for_inference, predict
from pals_hf.model_card import CardFacts
from pals_hf.models import build_image_processor, build_model
from pals_hf.run_folder import (
    claimed,
    discard_other_run,
    find_checkpoint,
    refuse_other_run,
    refuse_other_training,
)
from pals_hf.visualize import prediction_sheet, reliability_diagram, training_curves

SKIPPED = "skipped_samples.json"
# The flags that decide what the network sees, for its card; others say where things are, or are said in words.
LEARNED_FROM = (
    *("from_scratch", "output_stride", "void_labels", "image_size", "crop_size", "scale_range", "color_jitter"),
    *("rare_crop", "copy_paste", "label_clicks", "label_noise", "tuning_share", "tuning_ids", "validation_share"),
    *("validation_seed", "streaming", "skip_bad_samples", "early_stopping_patience"),
)
NUM_PICTURES = 6  # rows of predictions.png


@dataclass
class DataArguments:
    """Which images, and how fractions of them are drawn."""

    dataset_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder: Cityscapes, VOC2012, ADE20K or CamVid as downloaded, or train/images, train/masks, maybe "
            "val/, and id2label.json."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set on the Hub, a folder written by save_to_disk, or a Parquet file."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub data set."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: the usual names."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Column of the masks. Default: the usual names."})
    id2label: str | None = field(default=None, metadata={"help": "JSON file of the class names."})
    palette: str | None = field(
        default=None, metadata={"help": "File of class names and colours, for masks that hold colours."}
    )
    void_labels: list[int] = field(
        default_factory=list, metadata={"help": "Mask values that mean no label; 255 does."}
    )
    validation_share: float = field(
        default=0.2, metadata={"help": "Cut off from the training images where there is no validation split."}
    )
    validation_seed: int = field(default=0, metadata={"help": "Seed of that cut, of the folds and of --tuning_share."})
    num_folds: int | None = field(
        default=None, metadata={"help": "Cross-validation: cut all images into so many folds, --fold is scored."}
    )
    fold: int = field(default=0, metadata={"help": "The fold to score, from 0."})
    skip_bad_samples: bool = field(
        default=False, metadata={"help": "Leave out images with something wrong, and list them."}
    )
    split_method: str = field(
        default="random",
        metadata={"help": "How they are drawn: `random`, or `balanced` for rare classes early.", "choices": METHODS},
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of that share: another seed, another draw."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that check (and with --cache_images resize) the images."}
    )


def source_of(args: DataArguments) -> dict[str, Any]:
    """Where the data comes from and what its masks mean."""
    names = ("dataset_name", "dataset_dir", "dataset_config", "image_column", "label_column", "id2label", "palette")
    return {name: getattr(args, name) for name in (*names, "void_labels")}


def read_data(args: DataArguments, skip_bad_samples: bool) -> SegmentationData:
    """Load and check the data set that the flags name."""
    with PartialState().local_main_process_first():  # the others find what it has checked in the cache
        return load_segmentation_dataset(
            **source_of(args),
            validation_share=args.validation_share,
            validation_seed=args.validation_seed,
            num_folds=args.num_folds,
            fold=args.fold,
            skip_bad_samples=skip_bad_samples,
            num_proc=args.preprocessing_num_workers,
        )


@dataclass
class ScriptArguments(DataArguments):
    """What to train, and on which images."""

    recipe: str | None = field(default=None, metadata={"help": "YAML or JSON file with any of these flags."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from. Default: a small SegFormer from scratch."}
    )
    from_scratch: bool = field(
        default=False,
        metadata={"help": "Take only the architecture of --model_name_or_path, a config.json, and draw new weights."},
    )
    output_stride: int | None = field(
        default=None, metadata={"help": "8 or 16 for DeepLab-style networks like MobileNetV2. Default: the model's."}
    )
    train_fraction: float | None = field(
        default=None, metadata={"help": "Share of the training images to use. Default: all of them."}
    )
    train_count: int | None = field(default=None, metadata={"help": "Number of training images to use instead."})
    train_manifest: str | None = field(
        default=None,
        metadata={"help": f"{MANIFEST} of another run, or a published list of images: train on exactly these."},
    )
    label_clicks: int | None = field(
        default=None,
        metadata={
            "help": "Study sparse labels: keep of each training mask only what so many clicks with a brush of 5 x 5 "
            "pixels would have labelled; the rest is void."
        },
    )
    label_noise: float | None = field(
        default=None,
        metadata={
            "help": "Study wrong labels: in this share of the blocks of 32 x 32 pixels of each training mask, what is "
            "most frequent is taken for another class of the image."
        },
    )
    image_size: list[int] | None = field(
        default=None, metadata={"help": "H W: images are resized to it; masks keep their size for scoring."}
    )
    crop_size: list[int] | None = field(
        default=None, metadata={"help": "H W of training crops. Default: the size of the training images."}
    )
    scale_range: list[float] = field(
        default_factory=lambda: [0.75, 1.5],
        metadata={"help": "LOW HIGH: training images are resized by a random factor."},
    )
    color_jitter: float = field(default=0.3, metadata={"help": "Random brightness, contrast, saturation; 0 for none."})
    rare_crop: float = field(
        default=0.0, metadata={"help": "Probability that a crop is laid around a pixel of a rare class."}
    )
    copy_paste: float = field(
        default=0.0, metadata={"help": "Probability that rare classes of a second image are pasted over a crop."}
    )
    cache_images: bool = field(
        default=False, metadata={"help": "Keep the training images at --image_size on disk, uncompressed."}
    )
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU threads of a process. Default: all cores, shared between processes."}
    )
    tuning_share: float | None = field(
        default=None,
        metadata={
            "help": "Hold out this share of the training images before any are chosen, and score them instead of the "
            "validation split, to choose settings without looking at it."
        },
    )
    tuning_ids: str | None = field(
        default=None,
        metadata={
            "help": "Hold out the training images whose id matches this regular expression instead, like one of "
            "several videos: frames next to those that are trained on would flatter what fits them closely."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the data as it comes, for sets that do not fit on disk. Needs --max_steps."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better result."}
    )
    eval_only: bool = field(
        default=False, metadata={"help": "Only score --model_name_or_path on the validation split."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the run that --output_dir holds."})
    license: str | None = field(
        default=None,
        metadata={"help": "License of the checkpoint for its model card, like apache-2.0. None is guessed."},
    )

    def __post_init__(self):
        for name in ("image_size", "crop_size"):
            size = getattr(self, name)
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise InputError(f"{name} must be two positive numbers, height and width, got {size}")
        if len(self.scale_range) != 2 or not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise InputError(f"scale_range must be two positive numbers, low and high, got {self.scale_range}")
        for name in ("color_jitter", "rare_crop", "copy_paste"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        chosen = [n for n in ("train_fraction", "train_count", "train_manifest") if getattr(self, n) is not None]
        if len(chosen) > 1:
            raise InputError(f"give one of {' and '.join(chosen)}, not both")
        if self.tuning_share is not None and self.tuning_ids is not None:
            raise InputError("give one of tuning_share and tuning_ids, not both")
        if self.streaming:
            for name in (
                "train_fraction",
                "train_count",
                "num_folds",
                "tuning_share",
                "tuning_ids",
                "label_clicks",
                "label_noise",
            ):
                if getattr(self, name) is not None:
                    raise InputError(
                        f"{name} needs the list of all images, which a stream has not (train_manifest brings one)"
                    )
            for name in ("rare_crop", "copy_paste", "cache_images"):
                if getattr(self, name):
                    raise InputError(f"{name} needs images that were looked at before: not with streaming")
            if self.image_size is None and self.crop_size is None:
                raise InputError("streaming needs a crop_size: the size of the images is not known beforehand")
        if self.eval_only and self.model_name_or_path is None:
            raise InputError("eval_only scores a checkpoint: give it by model_name_or_path")
        if self.from_scratch and (self.eval_only or self.model_name_or_path is None):
            raise InputError("from_scratch trains the architecture of model_name_or_path: give that, and no eval_only")


class OneLineParser(HfArgumentParser):
    """A parser whose errors are one line, not a page of usage."""

    def error(self, message: str):
        raise InputError(message)


def main(argv: list[str] | None = None) -> None:
    try:
        args, config = parse_arguments(sys.argv[1:] if argv is None else argv)
        set_threads(args.num_threads)
        choose_output_dir(args, config)
        data, manifest = load_data(args)
        trainer = build_trainer(args, config, data, manifest)
        alone = claimed(config.output_dir) if is_main_process() else nullcontext()
        if args.eval_only:
            with alone:
                report(trainer, data, trainer.evaluate(), args.model_name_or_path)
        else:
            trainer.rehearse()
            with alone:
                prepare_output_dir(args, config, data, manifest)
                train(trainer)
                report(trainer, data, trainer.evaluate(), config.output_dir)
                if config.push_to_hub:
                    push(trainer)
    except (InputError, TrainingError, PushError) as error:
        fail(error)
    trainer.end()


def fail(error: InputError | TrainingError | PushError) -> NoReturn:
    """End with one line, and exit code 2 where the input is to blame, else 1."""
    if not is_main_process():
        # The launcher ends all processes once one has failed: let it be the one that speaks.
        time.sleep(10)
    text = str(error)
    if text.startswith("Caught "):  # in a worker of a DataLoader: torch puts its traceback into the message
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.exit(2 if isinstance(error, InputError) else 1)


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def parse_arguments(argv: list[str]) -> tuple[ScriptArguments, PALSConfig]:
    parser = OneLineParser(
        (ScriptArguments, PALSConfig), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(output_dir="")  # stands for a new folder
    recipe = OneLineParser(ScriptArguments, add_help=False).parse_known_args(argv)[0].recipe
    if recipe is not None:
        argv = [*read_recipe(Path(recipe), {action.dest for action in parser._actions}), *argv]
    try:
        args, config = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        raise InputError(str(error)) from error
    if config.ignore_index != IGNORE_INDEX:
        raise InputError(f"ignore_index must be {IGNORE_INDEX}: raw void values are mapped to it by void_labels")
    return args, config


def read_recipe(path: Path, known: set[str]) -> list[str]:
    """A recipe as the command line it stands for, so that one parser checks both."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"recipe {path} must hold flags and their values, like `learning_rate: 2e-4`")
    for name in recipe:
        if name not in known:
            raise InputError(f"recipe {path}: there is no flag {name}")
    return to_argv(recipe)


def to_argv(flags: dict[str, Any]) -> list[str]:
    """Flags and their values as a command line."""
    argv = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        argv += [f"--{name}", *map(str, values)] if value is not None and values else []
    return argv


def set_threads(num_threads: int | None) -> None:
    """Use all cores: `accelerate launch` alone leaves each process one thread."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if num_threads is not None and num_threads < 1:
        raise InputError(f"num_threads must be positive, got {num_threads}")
    torch.set_num_threads(num_threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def choose_output_dir(args: ScriptArguments, config: PALSConfig) -> None:
    """Settle, for all processes, where the run goes and what it resumes: only a checkpoint from the Hub is written."""
    if config.resume_from_checkpoint is not None:
        checkpoint = broadcast_object_list([find_checkpoint(config) if is_main_process() else None])[0]
        if checkpoint is not None and not is_complete_checkpoint(checkpoint):
            raise InputError(f"{checkpoint} is not seen by every process: resume where all machines share the disk")
        config.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
        config.output_dir = config.output_dir or str(checkpoint.parent)
        if is_main_process():
            print("starting anew" if checkpoint is None else f"going on from {checkpoint}", flush=True)
    if not config.output_dir:
        share = "manifest" if args.train_manifest else args.train_count or f"{args.train_fraction or 1:g}"
        what = "eval" if args.eval_only else f"{config.loss}-{share}-seed{config.seed}"
        name = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{what}-{uuid.uuid4().hex[:4]}"
        config.output_dir = broadcast_object_list([name])[0]
    refuse_other_run(Path(config.output_dir), checkpoint_of(config), args.overwrite)


def checkpoint_of(config: PALSConfig) -> Path | None:
    return None if config.resume_from_checkpoint is None else Path(config.resume_from_checkpoint)


def load_data(args: ScriptArguments) -> tuple[SegmentationData | SegmentationStream, FractionManifest | None]:
    """The data set with its training split cut down to the fraction, and the record of that."""
    if not is_main_process():
        datasets.disable_progress_bars()
    if args.streaming:
        chosen = None if args.train_manifest is None else FractionManifest.load(args.train_manifest)
        stream = stream_segmentation_dataset(**source_of(args))
        if chosen is not None and not stream.has_ids:
            raise InputError(f"train_manifest: {stream.name} has no column id, so a stream cannot tell its images")
        return stream, chosen
    data = read_data(args, args.skip_bad_samples)
    every = data.train
    if args.tuning_share is not None or args.tuning_ids is not None:
        how = {"share": args.tuning_share, "pattern": args.tuning_ids, "seed": args.validation_seed}
        data = hold_out(data, **how, skip_bad_samples=args.skip_bad_samples)
    if is_main_process():
        for name, problem in data.skipped.items():
            print(f"skipped {name}: {problem}", file=sys.stderr)
    record = {"name": data.name, "id2label": data.id2label}
    if args.train_manifest is not None:
        manifest = FractionManifest.load(args.train_manifest, data.train, **record)
        manifest.refuse_other(
            args.train_manifest, data.train, every
        )  # of another run, maybe one without held-out images
    else:
        share = 1.0 if args.train_fraction is None and args.train_count is None else args.train_fraction
        manifest = FractionManifest.draw(
            data.train, share, args.split_seed, count=args.train_count, method=args.split_method, **record
        )
    return replace(data, train=worsen_labels(manifest.select(data.train), args)), manifest


def worsen_labels(images: datasets.Dataset, args: Any) -> datasets.Dataset:
    """The images with sparse or wrong labels, where `args` ask for them."""
    if args.label_clicks is not None:
        images = label_by_clicks(images, args.label_clicks, args.split_seed)
    if args.label_noise is not None:
        images = mislabel(images, args.label_noise, args.split_seed)
    return images


def build_trainer(
    args: ScriptArguments,
    config: PALSConfig,
    data: SegmentationData | SegmentationStream,
    manifest: FractionManifest | None,
) -> PALSTrainer:
    set_seed(config.seed)  # a new head is the same for every loss
    if args.eval_only:
        model, processor = load_finished(args.model_name_or_path, data.id2label, "cpu")
    else:
        model = build_model(args.model_name_or_path, data.id2label, args.output_stride, args.from_scratch)
        processor = build_image_processor(args.model_name_or_path, args.image_size)
    callbacks = []
    if args.early_stopping_patience is not None:
        if not config.load_best_model_at_end:
            raise InputError("early_stopping_patience needs --load_best_model_at_end True")
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    build = build_streams if args.streaming else build_datasets
    try:
        train_dataset, eval_dataset = build(args, config, data, manifest, processor)
        return PALSTrainer(
            model,
            config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=callbacks,
            card_facts=card_facts(args, data, manifest),
        )
    except ValueError as error:  # arguments that do not go together, or a service in report_to that is not installed
        raise InputError(str(error)) from error


def card_facts(
    args: ScriptArguments, data: SegmentationData | SegmentationStream, manifest: FractionManifest | None
) -> CardFacts:
    """What the model card says of the data."""
    is_stream, split = isinstance(data, SegmentationStream), "validation"
    if args.num_folds is not None:
        split = f"fold {args.fold} of {args.num_folds}"
    if args.tuning_share is not None or args.tuning_ids is not None:
        split = "held-out training"
    defaults = ScriptArguments()
    facts = CardFacts(
        license=args.license,
        dataset=data.name,
        dataset_id=data.name if data.revision else None,
        dataset_revision=data.revision,
        dataset_license=data.license,
        split=split,
        validation_images=None if is_stream else len(data.validation),
        settings={
            name: getattr(args, name) for name in LEARNED_FROM if getattr(args, name) != getattr(defaults, name)
        },
    )
    return facts if manifest is None else facts.with_manifest(manifest)


def build_datasets(
    args: ScriptArguments, config: PALSConfig, data: SegmentationData, _, processor: BaseImageProcessor
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
    args: ScriptArguments,
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
    args: ScriptArguments,
    config: PALSConfig,
    processor: BaseImageProcessor,
    crop_size: tuple[int, int],
    **for_rare_classes: Any,
) -> TrainTransform:
    is_pals = config.loss == "pals"
    return TrainTransform(
        processor,
        crop_size,
        args.scale_range,
        args.color_jitter,
        padding_index=PADDING_INDEX if is_pals and config.distill_void else IGNORE_INDEX,
        weak_view=is_pals and config.teacher_view == "weak",
        **for_rare_classes,
    )


def load_finished(
    checkpoint: str, id2label: dict[int, str], device: str | torch.device
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A trained model for these classes, exactly as `from_pretrained` gives it to its users."""
    model, processor = load_for_inference(checkpoint, device)
    if model.config.num_labels != len(id2label):
        raise InputError(f"{checkpoint} knows {model.config.num_labels} classes, the data set {len(id2label)}")
    return model, processor


def prepare_output_dir(
    args: ScriptArguments,
    config: PALSConfig,
    data: SegmentationData | SegmentationStream,
    manifest: FractionManifest | None,
) -> None:
    """Make the folder this run's own. All input has been checked by now."""
    folder, checkpoint = Path(config.output_dir), checkpoint_of(config)
    if checkpoint is not None:
        refuse_other_training(checkpoint, config, manifest)
    if not is_main_process():
        return
    refuse_other_run(folder, checkpoint, args.overwrite)  # one may have been here while the data was loaded
    discard_other_run(folder, checkpoint)
    if manifest is not None:
        manifest.save(folder / MANIFEST)
    (folder / SKIPPED).unlink(missing_ok=True)
    if not args.streaming and data.skipped:
        (folder / SKIPPED).write_text(json.dumps(data.skipped, indent=2, ensure_ascii=False), encoding="utf-8")


def train(trainer: PALSTrainer) -> None:
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if trainer.terminated:
        leave(trainer)
    trainer.save_model(_internal_call=True)  # which leaves the push until there are results to push
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)


def leave(trainer: PALSTrainer) -> NoReturn:
    """End a run that was told to, and say how it goes on."""
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    trainer.end()
    if is_main_process():
        print(f"told to end: saved {checkpoint}; go on with --resume_from_checkpoint {checkpoint}", flush=True)
    sys.exit(128 + signal.SIGTERM)


def report(
    trainer: PALSTrainer, data: SegmentationData | SegmentationStream, metrics: dict[str, Any], checkpoint: str
) -> None:
    """Write the results and show them; pictures are of the checkpoint, as others will load it."""
    trainer.save_metrics("eval", metrics)
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    model, processor = load_finished(checkpoint, data.id2label, trainer.args.device)
    window = trainer.args.eval_window, trainer.args.eval_overlap  # what is shown is what was scored
    rows = [
        (image, labels, predict(model, processor, [image], *window)[0].mask)
        for image, labels in some_pairs(data, trainer.eval_dataset)
    ]
    prediction_sheet(rows, data.id2label, folder / "predictions.png", data.colors)
    if is_matplotlib_available() and trainer.args.eval_calibration:
        reliability_diagram(metrics["eval_reliability"], folder / "reliability.png")
    if trainer.state.global_step:
        if is_matplotlib_available():
            training_curves(trainer.state.log_history, folder / "curves.png")
        trainer.create_model_card()
    print(f"\n{summary_of(data)}")
    print(f"{'class':<20}{'IoU':>8}{'accuracy':>10}")
    for index, name in data.id2label.items():
        iou, accuracy = (metrics[f"eval_per_category_{kind}"][index] for kind in ("iou", "accuracy"))
        print(f"{name:<20}{iou:>8.3f}{accuracy:>10.3f}")
    print(f"{'mean':<20}{metrics['eval_mean_iou']:>8.3f}{metrics['eval_mean_accuracy']:>10.3f}")
    print(f"{'all pixels':<28}{metrics['eval_overall_accuracy']:>10.3f}")
    print(f"\nresults, checkpoint and pictures: {folder}")


def push(trainer: PALSTrainer) -> None:
    done = trainer.push_to_hub()
    if done is not None:
        print(f"pushed: {done.repo_url}", flush=True)


def some_pairs(
    data: SegmentationData | SegmentationStream, scored: TransformedDataset | StreamedDataset
) -> list[tuple[Image, Image]]:
    """The first validation images and their masks."""
    if isinstance(scored, StreamedDataset):
        real = (pending.row for pending in scored if not pending.is_filler)
        read = (read_pair(row, data.classes) for row in itertools.islice(real, NUM_PICTURES))
        return [(image, fromarray(labels)) for image, labels, _ in read]
    examples = data.validation.select(range(min(NUM_PICTURES, len(data.validation))))
    return [(row["image"], row["labels"]) for row in examples]


def summary_of(data: SegmentationData | SegmentationStream) -> str:
    if isinstance(data, SegmentationStream):
        return f"{data.name}, streamed"
    skipped = f", {len(data.skipped)} left out, see {SKIPPED}" if data.skipped else ""
    return f"{data.name}: {len(data.train)} training images, {len(data.validation)} validation images{skipped}"


if __name__ == "__main__":
    main()
