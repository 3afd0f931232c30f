"""Training arguments: what transformers has, and what PALS adds."""

from __future__ import annotations

import inspect
import math
import os
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .data.balance import WEIGHTINGS
from .errors import InputError
from .functional import PADDING_INDEX, PAIRS, POOLINGS, check_affinity
from .losses import PRESETS
from .models import AFFINITY_SOURCES

LOSSES = ("pals", "ce", "label_smoothing")
BETA_SCHEDULES = ("constant", "linear", "cosine", "warmup")
TEACHERS = ("live", "ema")
VIEWS = ("same", "weak")
ERRORS = ("loss", "ece", "brier")  # endings of the metrics of which less is better
POLY = {"power": 0.9, "lr_end": 0.0}  # the usual schedule of segmentation


def _preset_help(text: str, name: str) -> str:
    return f"{text} Default: {PRESETS['default'][name]}, or what `preset` says."


@dataclass
class PALSConfig(TrainingArguments):
    r"""Arguments of [`PALSTrainer`]: those of [`~transformers.TrainingArguments`] and the fields below.

    These defaults differ from [`~transformers.TrainingArguments`], because segmentation with few images trains by
    steps, with a new head on an old backbone, and is judged by mean IoU:

    - `learning_rate` 2e-4 instead of 5e-5 (the backbone's; the head's is `head_lr_multiplier` times as much);
    - `lr_scheduler_type` "polynomial" instead of "linear", with power 0.9 and end 0 unless `lr_scheduler_kwargs` is
      given;
    - `weight_decay` 0.01 instead of 0;
    - `num_train_epochs` 50 instead of 3;
    - `logging_steps` 10 instead of 500;
    - `eval_strategy` and `save_strategy` "steps", `eval_steps` and `save_steps` 0.1 (a tenth of the run) instead of
      none and 500; `save_total_limit` 2 instead of none;
    - `metric_for_best_model` "mean_iou"; unless given, `greater_is_better` is False for the errors of calibration
      (`ece`, `classwise_ece`, `brier`) as it is for a loss;
    - `per_device_eval_batch_size` 1 instead of 8: evaluation images are never padded to a common size;
    - `batch_eval_metrics` True (metrics stream) and `remove_unused_columns` False; both are needed.

    `label_smoothing_factor` is refused: transformers smooths over the last axis, which is not the class axis here.
    `hub_token` is never pickled, so it is in no `training_args.bin`.

    Raises:
        InputError: a value is out of range; the message names the field.
    """

    loss: str = field(
        default="pals",
        metadata={
            "help": "What to train with: `pals` (pixel-wise adaptive label smoothing), `ce` (cross-entropy) or "
            "`label_smoothing` (uniform).",
            "choices": LOSSES,
        },
    )
    preset: str = field(
        default="default",
        metadata={
            "help": "Where `beta`, `beta_schedule`, `adaptive_beta`, `tau`, `temperature` and `max_affinity_cells` "
            "come from unless given: `default`, or `paper`, the literal reading of the abstract.",
            "choices": tuple(PRESETS),
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": _preset_help(
                "PALS: weight of the aggregated distribution in the soft label, 0 to 1; with `adaptive_beta` the "
                "largest.",
                "beta",
            )
        },
    )
    beta_schedule: str | None = field(
        default=None,
        metadata={
            "help": _preset_help(
                "PALS: `constant`; `linear` or `cosine` from 0 to `beta` over the training; `warmup`, linear from 0 "
                "over its first `beta_warmup`, then constant.",
                "beta_schedule",
            ),
            "choices": BETA_SCHEDULES,
        },
    )
    adaptive_beta: bool | None = field(
        default=None,
        metadata={
            "help": _preset_help(
                "PALS, True or False: a pixel's beta is `beta` times what the aggregated distribution gives its "
                "label, so that a label which that contradicts is not softened. Not in the paper.",
                "adaptive_beta",
            )
        },
    )
    beta_warmup: float = field(
        default=0.1, metadata={"help": "PALS: share of the training over which beta rises in schedule `warmup`."}
    )
    tau: float | None = field(
        default=None,
        metadata={
            "help": _preset_help("PALS: temperature of the affinity between pixels; smaller compares sharper.", "tau")
        },
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": _preset_help("PALS: softmax temperature of the predictions that are averaged.", "temperature")
        },
    )
    affinity_source: str = field(
        default="classifier_input",
        metadata={
            "help": "PALS: what makes pixels similar: the `classifier_input`, the same `before_dropout`, a stage of "
            "the `encoder`, or the `logits`.",
            "choices": AFFINITY_SOURCES,
        },
    )
    encoder_stage: int = field(
        default=-1, metadata={"help": "PALS: which of the encoder's hidden states `affinity_source=encoder` takes."}
    )
    pairs: str = field(
        default="all",
        metadata={
            "help": "PALS: which pixels are compared: `all`, or those of the `same_class` in the labels.",
            "choices": PAIRS,
        },
    )
    include_self: bool = field(
        default=True, metadata={"help": "PALS: whether a pixel is among those its prediction is averaged over."}
    )
    void_keys: bool = field(
        default=True, metadata={"help": "PALS: whether predictions at pixels without a label are averaged over."}
    )
    propagation_steps: int = field(default=1, metadata={"help": "PALS: how often the average is taken."})
    propagation_weight: float = field(
        default=1.0,
        metadata={"help": "PALS: weight of the average in a step, the rest is the own prediction; 0 to 1."},
    )
    anchor_weight: float = field(
        default=0.0,
        metadata={
            "help": "PALS: above 0, what is averaged of a labelled pixel is its label instead of its prediction, and "
            "it counts so many times. For sparse labels, with `distill_void`."
        },
    )
    affinity_stride: int = field(
        default=1,
        metadata={
            "help": "PALS: compare blocks of so many cells squared instead of cells. `max_affinity_cells` raises it."
        },
    )
    affinity_pooling: str = field(
        default="both",
        metadata={
            "help": "PALS: with a stride, compare every cell with the blocks (`keys`), or blocks with blocks "
            "(`both`), which is cheaper and blurs.",
            "choices": POOLINGS,
        },
    )
    max_affinity_cells: int | None = field(
        default=None,
        metadata={
            "help": _preset_help(
                "PALS: the stride is raised until there are no more blocks than this: with pooling `both` a bound on "
                "the cost.",
                "max_affinity_cells",
            )
        },
    )
    teacher: str = field(
        default="live",
        metadata={
            "help": "PALS: whose predictions are averaged: the `live` network's, or those of an exponential moving "
            "average (`ema`) of its weights, at the cost of a second forward pass.",
            "choices": TEACHERS,
        },
    )
    ema_decay: float = field(
        default=0.99, metadata={"help": "PALS: share of the average that stays at each step with `teacher=ema`."}
    )
    teacher_view: str = field(
        default="same",
        metadata={
            "help": "PALS: predictions are averaged from the `same` view of an image as the network learns on, or "
            "from a `weak` one without colour jitter, at the cost of a second forward pass.",
            "choices": VIEWS,
        },
    )
    distill_void: bool = field(
        default=False,
        metadata={
            "help": "PALS: pixels without a label learn from the aggregated distribution, with weight `beta`, for "
            "sparse labels."
        },
    )
    smoothing: float = field(
        default=0.1, metadata={"help": "`label_smoothing`: mass spread evenly over all classes, 0 to 1."}
    )
    class_weighting: str = field(
        default="none",
        metadata={
            "help": "Every loss: what a labelled pixel counts, by how frequent its class is in the training images: "
            "`none`, `inverse`, `median_frequency` or `effective_number`.",
            "choices": WEIGHTINGS,
        },
    )
    ignore_index: int = field(
        default=255,
        metadata={"help": "Label of void pixels: no loss, no metric. What the data package writes is 255."},
    )
    head_lr_multiplier: float = field(
        default=5.0, metadata={"help": "The head learns at this multiple of `learning_rate`; the backbone at 1."}
    )
    channels_last: bool = field(
        default=False,
        metadata={"help": "Keep kernels with channels last in memory, which can be faster for convolutions."},
    )
    eval_calibration: bool = field(
        default=False,
        metadata={
            "help": "Evaluation also gives calibration (ECE, classwise ECE, Brier, reliability) and boundary IoU."
        },
    )
    eval_window: list[int] | None = field(
        default=None,
        metadata={
            "help": "H W: evaluate by windows of this size that slide over the image, and average where they overlap. "
            "Default: the whole image at once, as `pipeline` does."
        },
    )
    eval_overlap: float = field(
        default=1 / 3, metadata={"help": "Share of a window that the next one covers again, 0 to below 1."}
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Train the head only; the backbone's weights and statistics stay."}
    )
    freeze_batch_norm: bool = field(
        default=False, metadata={"help": "Keep the running statistics of batch norm layers, for very small batches."}
    )

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of the backbone."})
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "The learning rate schedule."})
    lr_scheduler_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": f"Arguments of the schedule, as JSON. Default for `polynomial`: {POLY}."},
    )
    weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay of matrices and kernels; norms and biases have none."}
    )
    num_train_epochs: float = field(default=50.0, metadata={"help": "Passes over the training images."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps, or this share of the run."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: `no`, `steps` or `epoch`."})
    eval_steps: float | None = field(
        default=0.1, metadata={"help": "Evaluate every so many steps, or this share of the run."}
    )
    save_strategy: str = field(default="steps", metadata={"help": "When to save: `no`, `steps`, `epoch` or `best`."})
    save_steps: float = field(default=0.1, metadata={"help": "Save every so many steps, or this share of the run."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; the best is always kept."})
    metric_for_best_model: str | None = field(default="mean_iou", metadata={"help": "Metric of the best checkpoint."})
    greater_is_better: bool | None = field(
        default=None,
        metadata={"help": "Whether a larger metric is better. Default: unless its name ends in loss, ece or brier."},
    )
    per_device_eval_batch_size: int = field(
        default=1, metadata={"help": "Images evaluated at once on a device. Of different sizes: one after the other."}
    )
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Metrics are counted batch by batch. Needed."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: the transform needs all."})

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "polynomial":
            self.lr_scheduler_kwargs = dict(POLY)
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(ERRORS)
        self.check()
        super().__post_init__()
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > 1 and self.world_size == 1:
            raise InputError(
                f"{started} processes were started, but each would train alone: "
                "without GPUs set ACCELERATE_USE_CPU=true in the environment"
            )
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no device to copy to, and torch warns at every epoch

    def check(self) -> None:
        """Refuse values out of range, here or once they were set on the way, as a search does.

        Raises:
            InputError: the message names the field.
        """
        for name, allowed in (
            ("loss", LOSSES),
            ("beta_schedule", BETA_SCHEDULES),
            ("class_weighting", WEIGHTINGS),
            ("affinity_source", AFFINITY_SOURCES),
            ("teacher", TEACHERS),
            ("teacher_view", VIEWS),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        try:
            check_affinity(**{name: getattr(self, name) for name in inspect.signature(check_affinity).parameters})
        except ValueError as error:
            raise InputError(str(error)) from error
        for name in ("beta", "smoothing", "ema_decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("temperature", "beta_warmup", "head_lr_multiplier", "per_device_train_batch_size"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        if self.eval_window is not None and (len(self.eval_window) != 2 or min(self.eval_window) < 1):
            raise InputError(f"eval_window must be two positive numbers, height and width, got {self.eval_window}")
        if not 0.0 <= self.eval_overlap < 1.0:
            raise InputError(f"eval_overlap must lie in [0, 1), got {self.eval_overlap}")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise InputError(f"num_train_epochs must be positive without max_steps, got {self.num_train_epochs}")
        if self.distill_void and self.ignore_index == PADDING_INDEX:
            raise InputError(f"distill_void needs another ignore_index than {PADDING_INDEX}, the label of padding")
        if self.label_smoothing_factor:
            raise InputError(
                "label_smoothing_factor smooths over the last axis, which in segmentation is not the classes: "
                f"use loss='label_smoothing' with smoothing={self.label_smoothing_factor}"
            )
        for name, needed in (("batch_eval_metrics", True), ("remove_unused_columns", False)):
            if getattr(self, name) is not needed:
                raise InputError(f"{name} must be {needed} for segmentation, got {getattr(self, name)}")

    def beta_at(self, progress: float) -> float:
        """The weight of the aggregated distribution after `progress`, 0 to 1, of the training."""
        share = {
            "constant": 1.0,
            "linear": progress,
            "cosine": (1.0 - math.cos(math.pi * progress)) / 2.0,
            "warmup": min(1.0, progress / self.beta_warmup),
        }
        return self.beta * share[self.beta_schedule]

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments next to every checkpoint and pushes them: the token must not be in there.
        return {**self.__dict__, "hub_token": None}
