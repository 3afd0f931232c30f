"""The options of the commands: which data, which images of it, which network, and where a run goes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from ..backbones import HEADS
from ..data import load_segmentation_dataset
from ..data.classes import UNLABELLED
from ..data.fractions import MANIFEST, METHODS
from ..data.pictures import RGB
from ..errors import InputError
from ..options import (
    DATA,
    EVALUATION,
    IMAGES,
    LARGEST,
    MODEL,
    MOST_WORKERS,
    RUN,
    TRAINING,
    check_numbers,
    check_size,
    option,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data import SegmentationData
    from ..trainer import PALSTrainer

MOST_CHANNELS = 2**14  # of a head: a larger one would only exhaust the memory


@dataclass
class DataArguments:
    """Which images, and how fractions of them are drawn."""

    dataset_dir: str | None = option(
        None,
        DATA,
        "Folder with train/images, train/masks and id2label.json, or a known data set as downloaded. "
        "Default: built-in street scenes.",
    )
    dataset_name: str | None = option(None, DATA, "Data set on the Hub, saved data set, or Parquet file.")
    dataset_config: str | None = option(None, DATA, "Configuration name of a data set on the Hub.", advanced=True)
    image_column: str | None = option(
        None, DATA, "Column of the images. Default: a column with a usual name.", advanced=True
    )
    label_column: str | None = option(
        None, DATA, "Column of the masks. Default: a column with a usual name.", advanced=True
    )
    id2label: str | None = option(None, DATA, "File with the class names, as JSON.")
    palette: str | None = option(None, DATA, "File with class names and colours, for colour masks.")
    void_labels: list[int] = option(
        [], DATA, "Mask values of unlabelled pixels. 255 always is such a value.", in_card=True
    )
    unlabelled: str | None = option(
        None,
        DATA,
        "Pixels outside of all polygons of annotations: `background`, a class, or `void`, no label. Default: "
        "`background`.",
        choices=UNLABELLED,
        advanced=True,
        in_card=True,
    )
    channels: int = option(
        3,
        DATA,
        "Number of bands of the images, and of channels of the network. With 3, grey images are read too.",
        advanced=True,
        in_card=True,
    )
    validation_share: float = option(
        0.2,
        DATA,
        "Share of the images that is held out if there is no validation split.",
        in_card=True,
    )
    validation_seed: int = option(
        0, DATA, "Seed of the held-out validation images and of the folds.", advanced=True, in_card=True
    )
    num_folds: int | None = option(
        None,
        DATA,
        "Number of folds for cross-validation. `--fold` is scored, and the others are trained on.",
        advanced=True,
    )
    fold: int = option(0, DATA, "Index of the fold that is scored, from 0.", advanced=True)
    skip_bad_samples: bool = option(False, DATA, "Skip samples that fail validation, and list them.", in_card=True)
    fraction_method: str = option(
        "random",
        IMAGES,
        "How to sample the training fraction: `random`, or `balanced` by class.",
        choices=METHODS,
    )
    fraction_seed: int = option(0, IMAGES, "Seed of the training fraction. Another seed draws other images.")
    preprocessing_num_workers: int | None = option(
        None, DATA, "Number of processes that check the images.", advanced=True
    )

    def __post_init__(self):
        limits = {"preprocessing_num_workers": (1, MOST_WORKERS), "early_stopping_patience": (1, LARGEST)}
        check_numbers(self, {**limits, "validation_share": (0, 1), "head_channels": (1, MOST_CHANNELS)})


def source_of(args: DataArguments) -> dict[str, Any]:
    """Return the arguments that say where the data is and what its masks mean."""
    names = ("dataset_name", "dataset_dir", "dataset_config", "image_column", "label_column", "id2label", "palette")
    return {name: getattr(args, name) for name in (*names, "void_labels", "unlabelled")}


def read_data(args: DataArguments, skip_bad_samples: bool) -> SegmentationData:
    """Load and check the data set that the options name."""
    with PartialState().local_main_process_first():  # the other processes read the checked data from the cache
        return load_segmentation_dataset(
            **source_of(args),
            channels=args.channels,
            validation_share=args.validation_share,
            validation_seed=args.validation_seed,
            num_folds=args.num_folds,
            fold=args.fold,
            skip_bad_samples=skip_bad_samples,
            num_proc=args.preprocessing_num_workers,
        )


@dataclass
class TrainArguments(DataArguments):
    """The options of a training beside those of [`PALSConfig`]."""

    recipe: str | None = option(None, RUN, "YAML or JSON file with any of these options.")
    model_name_or_path: str | None = option(
        None,
        MODEL,
        "Checkpoint or bare backbone to start from: a Hub name or folder. Default: a small SegFormer.",
    )
    head: str | None = option(
        None,
        MODEL,
        "Build a new head: `upernet`, `linear`, `dpt`. Only the backbone of `--model_name_or_path` is used. A bare "
        "backbone gets `upernet` by itself. A linear head is batch norm and a 1x1 convolution.",
        choices=HEADS,
        in_card=True,
    )
    head_channels: int | None = option(
        None,
        MODEL,
        "Width of the new head. Default: half of the channels of the backbone's last stage, 64 to 512.",
        advanced=True,
        in_card=True,
    )
    from_scratch: bool = option(
        False,
        MODEL,
        "Draw all weights of the network at random. Only its architecture is that of `--model_name_or_path`.",
        in_card=True,
    )
    output_stride: int | None = option(
        None,
        MODEL,
        "Output stride of DeepLab-style networks like MobileNetV2: 8, 16 or 32. Default: that of the checkpoint.",
        advanced=True,
        in_card=True,
    )
    train_fraction: float | None = option(
        None, IMAGES, "Share of the training images to train on. Default: all of them."
    )
    train_count: int | None = option(None, IMAGES, "Number of training images, instead of a share.")
    train_manifest: str | None = option(
        None, IMAGES, f"File with the images to train on: {MANIFEST} of another run, or a list."
    )
    image_size: list[int] | None = option(
        None, IMAGES, "Height and width that images are resized to. Masks keep their size for scoring.", in_card=True
    )
    crop_size: list[int] | None = option(
        None, IMAGES, "Height and width of training crops. Default: the image size.", in_card=True
    )
    scale_range: list[float] = option(
        [0.75, 1.5],
        IMAGES,
        "Range of the random factor that training images are resized by.",
        advanced=True,
        in_card=True,
    )
    color_jitter: float = option(
        0.3, IMAGES, "Strength of random brightness, contrast and saturation, 0 to 1.", advanced=True, in_card=True
    )
    rare_crop: float = option(
        0.0, IMAGES, "Probability that a crop is placed around a pixel of a rare class.", advanced=True, in_card=True
    )
    copy_paste: float = option(
        0.0,
        IMAGES,
        "Probability that rare classes of a second image are pasted into a crop.",
        advanced=True,
        in_card=True,
    )
    cache_images: bool = option(
        False, DATA, "Keep the training images at `--image_size` on disk, uncompressed.", advanced=True
    )
    num_threads: int | None = option(
        None, RUN, "CPU threads of a process. Default: all cores, shared between the processes.", advanced=True
    )
    streaming: bool = option(
        False,
        DATA,
        "Read the data while training, for data that does not fit on the disk. Needs `--max_steps`.",
        in_card=True,
    )
    early_stopping_patience: int | None = option(
        None, TRAINING, "Stop after this number of evaluations without improvement.", in_card=True
    )
    calibrate: bool = option(
        False,
        EVALUATION,
        "Calibrate the trained network on the validation images. One temperature is fitted, and folded into the "
        "classifier. The predicted classes stay the same.",
        in_card=True,
    )
    eval_only: bool = option(False, EVALUATION, "Only score `--model_name_or_path` on the validation split.")
    overwrite: bool = option(False, RUN, "Replace the run in `--output_dir`.")
    license: str | None = option(None, RUN, "License for the model card, like apache-2.0.")
    given_rates: list[str] = option(
        [], TRAINING, "Which of the learning rates the command line gives.", command_line=False
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("image_size", "crop_size"):
            check_size(name, getattr(self, name))
        if len(self.scale_range) != 2 or not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise InputError(f"scale_range must be two positive numbers, low and high, got {self.scale_range}")
        for name in ("color_jitter", "rare_crop", "copy_paste"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        chosen = [n for n in ("train_fraction", "train_count", "train_manifest") if getattr(self, n) is not None]
        if len(chosen) > 1:
            raise InputError(f"{' and '.join(chosen)} exclude each other: give only one of them")
        if self.streaming:
            self._check_streaming()
        if self.eval_only and self.model_name_or_path is None:
            raise InputError("eval_only scores a checkpoint: name it by model_name_or_path")
        if self.calibrate and self.eval_only:
            raise InputError("calibrate changes a checkpoint, which eval_only does not. Use `pals-hf calibrate`")
        if self.eval_only and (self.head is not None or self.head_channels is not None):
            raise InputError("eval_only scores a checkpoint with its own head: leave head and head_channels out")
        if self.from_scratch and (self.eval_only or self.model_name_or_path is None):
            raise InputError("from_scratch needs model_name_or_path, whose architecture it trains, and no eval_only")

    def _check_streaming(self) -> None:
        for name in self.needs_all_images():
            if getattr(self, name) is not None:
                raise InputError(
                    f"{name} needs the list of all images, which a stream does not have. "
                    "Use train_manifest to stream chosen images"
                )
        if self.calibrate:
            raise InputError(
                "calibrate reads the validation images twice, which a stream does not allow. Train without it, and "
                "use `pals-hf calibrate` with labelled images in a folder"
            )
        for name in ("rare_crop", "copy_paste", "cache_images"):
            if getattr(self, name):
                raise InputError(f"{name} needs images that were checked before, so it does not work with streaming")
        if self.channels != RGB:
            raise InputError(
                f"channels {self.channels} does not work with streaming, which reads images of 3 channels"
            )
        if self.image_size is None and self.crop_size is None:
            raise InputError("streaming needs a crop_size, because the size of the images is not known beforehand")

    def needs_all_images(self) -> tuple[str, ...]:
        """Return the options that need the list of all training images."""
        return ("train_fraction", "train_count", "num_folds")

    @property
    def split(self) -> str:
        """The name of the images that are scored, for the model card."""
        return "validation" if self.num_folds is None else f"fold {self.fold} of {self.num_folds}"

    def hold_out(self, data: SegmentationData) -> SegmentationData:
        """Return the data whose training images a fraction is drawn from. Studies hold out some of them first."""
        return data

    def degrade(self, images: Dataset) -> Dataset:
        """Return the training images with the labels to learn from. Studies make labels sparse or wrong."""
        return images

    def more_metrics(self, trainer: PALSTrainer) -> dict[str, Any]:
        """Return metrics beside those of the evaluation, before the network is calibrated. Studies have some."""
        return {}

    @property
    def has_random_weights(self) -> bool:
        """Whether the training starts from random weights, not from a checkpoint."""
        return self.from_scratch or (self.model_name_or_path is None and not self.eval_only)

    def card_settings(self) -> dict[str, Any]:
        """Return the options that decide what the network sees, as far as they differ from their defaults."""
        defaults = type(self)()
        names = [field.name for field in fields(self) if field.metadata.get("in_card")]
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(defaults, name)}
