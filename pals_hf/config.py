"""Training arguments: those of transformers, and the settings of this package."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import TrainingArguments

from .data.balance import WEIGHTINGS
from .errors import InputError
from .functional import PADDING_INDEX, Affinity
from .losses import PRESETS
from .options import EVALUATION, LARGEST, LOSS, MOST_WORKERS, TRAINING, check_numbers, check_size, option

LOSSES = ("pals", "self_distillation", "ce", "label_smoothing", "focal", "margin")
ERRORS = ("loss", "ece", "brier")  # endings of the metrics of which less is better
POLY = {"power": 0.9, "lr_end": 0.0}  # the usual schedule of segmentation

# The numbers whose limits do not follow from their default, see `check_numbers`.
_TINY = math.ulp(0.0)  # the smallest positive number
_SEED = (0, 2**32 - 1)
_ANY = (-(2**31), LARGEST)
_LIMITS = {
    "head_lr_multiplier": (_TINY, math.inf),
    "layer_lr_decay": (_TINY, 1.0),
    "lora_rank": (1, LARGEST),
    "adam_epsilon": (_TINY, math.inf),
    "adam_beta1": (0, math.nextafter(1, 0)),
    "adam_beta2": (0, math.nextafter(1, 0)),
    "save_total_limit": (0, LARGEST),  # 0 keeps all checkpoints
    "seed": _SEED,
    "data_seed": _SEED,
    "ignore_index": _ANY,
    "dataloader_num_workers": (0, MOST_WORKERS),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "warmup_steps"), (0, LARGEST)),
    **dict.fromkeys(("dataloader_prefetch_factor", "eval_accumulation_steps", "ddp_bucket_cap_mb"), (1, LARGEST)),
}

# Options of transformers that would have no effect, spoil the result or lose the run: the only value, and the reason.
_FIXED = {
    "batch_eval_metrics": (True, "metrics are counted batch by batch"),
    "remove_unused_columns": (False, "the transforms need all columns"),
    "prediction_loss_only": (False, "every evaluation computes the metrics"),
    "include_for_metrics": ([], "the metrics are counts of pixels, without further inputs"),
    "label_names": (None, "the labels of an image are always called labels"),
    "average_tokens_across_devices": (True, "the loss is always the mean over the pixels of all processes"),
    "use_liger_kernel": (False, "its kernels are for language models"),
    "neftune_noise_alpha": (None, "it adds noise to embeddings of words, which these networks do not have"),
    "fp16_full_eval": (False, "it converts the network itself. Use fp16, which evaluates in mixed precision"),
    "bf16_full_eval": (False, "it converts the network itself. Use bf16, which evaluates in mixed precision"),
    "enable_jit_checkpoint": (
        False,
        "with its signal handler a process survives SIGTERM. PALSTrainer saves a checkpoint at SIGTERM without this "
        "option",
    ),
}

# Options of transformers that are ignored without another one.
_NEEDED = {
    "fsdp_config": ("fsdp",),
    "activation_checkpointing_kwargs": ("activation_checkpointing", "gradient_checkpointing"),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", "activation_checkpointing"),
}


@dataclass(repr=False)  # the parent's hides tokens
class PALSConfig(TrainingArguments):
    r"""Arguments of [`PALSTrainer`]: those of [`~transformers.TrainingArguments`] and the fields below.

    These defaults differ from [`~transformers.TrainingArguments`], because segmentation with few images trains by
    steps, with a new head on an old backbone, and is judged by mean IoU:

    - `learning_rate` 2e-4 instead of 5e-5 for the backbone, and `head_lr_multiplier` times as much for the head;
    - `lr_scheduler_type` "polynomial" instead of "linear", with power 0.9 and end 0 unless `lr_scheduler_kwargs` is
      given;
    - `weight_decay` 0.01 instead of 0;
    - `num_train_epochs` 50 instead of 3;
    - `logging_steps` 10 instead of 500;
    - `eval_strategy` and `save_strategy` "steps", `eval_steps` and `save_steps` 0.1 (a tenth of the run) instead of
      none and 500; `save_total_limit` 2 instead of none;
    - `metric_for_best_model` "mean_iou"; unless given, `greater_is_better` is False for the errors of calibration
      (`ece`, `classwise_ece`, `brier`) as it is for a loss;
    - `per_device_eval_batch_size` 1 instead of 8, because evaluation images are never padded to a common size;
    - `batch_eval_metrics` True, because metrics are counted batch by batch, and `remove_unused_columns` False. Other
      values of these two are refused.

    `label_smoothing_factor` is refused, because transformers smooths over the last axis, which is not the class axis
    here. `enable_jit_checkpoint` is refused, because after its signal handler a process survives SIGTERM. `hub_token`
    is never pickled, so your token never reaches a `training_args.bin`.

    Raises:
        InputError: a value is out of range; the message names the field.
    """

    loss: str = option(
        "pals",
        LOSS,
        "Training loss: `pals`, `self_distillation`, `ce`, `label_smoothing`, `focal` or `margin`. Self-distillation "
        "is PALS without comparing pixels, ce is cross-entropy, and margin is margin-based label smoothing.",
        choices=LOSSES,
    )
    preset: str = option(
        "default",
        LOSS,
        "Settings of PALS: `default` or `paper`.",
        choices=tuple(PRESETS),
    )
    beta: float | None = option(
        None,
        LOSS,
        "PALS: weight of the averaged prediction, 0 to 1. Default: 0.5.",
    )
    adaptive_beta: bool | None = option(
        None,
        LOSS,
        "PALS: pixels whose label contradicts the averaged prediction keep their one-hot label. This is our addition, "
        "not in the paper. Default: True.",
    )
    affinity: dict | str | None = option(
        None,
        LOSS,
        "PALS: settings of the comparison of pixels as JSON, like '{\"tau\": 0.1}'. See docs/method.md.",
    )
    distill_unlabeled: bool = option(
        False,
        LOSS,
        "PALS: unlabelled pixels learn from the averaged prediction alone, with weight `--beta`. For sparse labels.",
        advanced=True,
    )
    smoothing: float = option(
        0.1, LOSS, "Label smoothing: probability that is spread evenly over all classes.", advanced=True
    )
    focal_gamma: float = option(
        3.0, LOSS, "Focal loss: how much less a pixel weighs whose label is predicted with certainty.", advanced=True
    )
    margin: float = option(
        10.0, LOSS, "Margin loss: distance to the largest logit from which on logits are penalised.", advanced=True
    )
    margin_weight: float = option(0.1, LOSS, "Margin loss: weight of the penalty.", advanced=True)
    class_weighting: str = option(
        "none",
        LOSS,
        "Class weights computed from the class frequencies of the training set.",
        choices=WEIGHTINGS,
    )
    ignore_index: int = option(
        255,
        LOSS,
        "Label of unlabelled pixels, which take no part in loss and metrics.",
        command_line=False,  # raw values are mapped to 255 by --void_labels
    )
    head_lr_multiplier: float = option(5.0, TRAINING, "The head learns at this multiple of `--learning_rate`.")
    freeze_backbone: bool = option(
        False, TRAINING, "Train the head only. The weights and statistics of the backbone do not change."
    )
    layer_lr_decay: float = option(
        1.0,
        TRAINING,
        "Each layer of the backbone learns at this multiple of the rate of the next layer, as BEiT does with 0.9. "
        "Default: 1, the same rate for all layers.",
        advanced=True,
    )
    lora_rank: int | None = option(
        None,
        TRAINING,
        "Rank of LoRA adapters in all linear layers of the backbone, whose own weights are frozen. Saved models have "
        "merged weights and do not need peft. Default: no adapters.",
        advanced=True,
    )
    freeze_batch_norm: bool = option(
        False, TRAINING, "Keep the running statistics of batch norm layers, for very small batches.", advanced=True
    )
    channels_last: bool = option(
        False, TRAINING, "Store kernels with channels last, which can make convolutions faster.", advanced=True
    )
    eval_calibration: bool = option(
        False, EVALUATION, "Also report calibration (ECE, Brier score, reliability) and boundary IoU."
    )
    eval_window: list[int] | None = option(
        None,
        EVALUATION,
        "Height and width of windows that slide over large images. Default: the whole image at once.",
    )
    eval_overlap: float = option(
        1 / 3, EVALUATION, "Share of a window that overlaps with the next one, 0 to below 1.", advanced=True
    )

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of the backbone."})
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "The learning rate schedule."})
    lr_scheduler_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": f"Arguments of the learning rate schedule, as JSON. Default for `polynomial`: {POLY}."},
    )
    weight_decay: float = field(
        default=0.01, metadata={"help": "Weight decay of matrices and kernels. Norms and biases are not decayed."}
    )
    num_train_epochs: float = field(default=50.0, metadata={"help": "Passes over the training images."})
    logging_steps: float = field(
        default=10, metadata={"help": "Number of steps between two logs, or a share of the run below 1."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: `no`, `steps` or `epoch`."})
    eval_steps: float | None = field(
        default=0.1, metadata={"help": "Number of steps between two evaluations, or a share of the run below 1."}
    )
    save_strategy: str = field(default="steps", metadata={"help": "When to save: `no`, `steps`, `epoch` or `best`."})
    save_steps: float = field(
        default=0.1, metadata={"help": "Number of steps between two checkpoints, or a share of the run below 1."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Number of checkpoints that are kept. The best one is always kept."}
    )
    metric_for_best_model: str | None = field(
        default="mean_iou", metadata={"help": "Metric by which the best checkpoint is chosen."}
    )
    greater_is_better: bool | None = field(
        default=None,
        metadata={
            "help": "Whether a larger metric is better. Default: True, unless its name ends in loss, ece or brier."
        },
    )
    per_device_eval_batch_size: int = field(
        default=1,
        metadata={
            "help": "Number of images in an evaluation batch. Images of different sizes are evaluated one by one."
        },
    )
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Count metrics batch by batch. Must stay True."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False, because the transforms need all columns."}
    )

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        preset = PRESETS[self.preset]
        self.beta = preset["beta"] if self.beta is None else self.beta
        self.adaptive_beta = preset["adaptive_beta"] if self.adaptive_beta is None else self.adaptive_beta
        self.affinity = asdict(_with_settings(preset["affinity"], self.affinity))
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "polynomial":
            self.lr_scheduler_kwargs = dict(POLY)
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(ERRORS)
        self.check()
        for name, needed in _NEEDED.items():
            if getattr(self, name, None) and not any(getattr(self, other, None) for other in needed):
                raise InputError(f"{name} has no effect without {needed[0]}")
        super().__post_init__()
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > 1 and self.world_size == 1:
            raise InputError(
                f"{started} processes were started, but each of them would train alone. "
                "Without GPUs set ACCELERATE_USE_CPU=true in the environment"
            )
        for name in ("lr_scheduler_kwargs", "activation_checkpointing_kwargs"):
            if not isinstance(getattr(self, name, None), dict | None):
                raise InputError(f"{name} must be JSON like '{{\"power\": 2.0}}', got {getattr(self, name)!r}")
        if self.fp16 and self.device.type == "cpu":
            raise InputError("fp16 has no effect on a CPU. Leave it out")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no device to copy to, and torch warns at every epoch

    @property
    def affinity_settings(self) -> Affinity:
        """The settings of the comparison of pixels. With `loss` "self_distillation" no pixels are compared."""
        return Affinity(**self.affinity | ({"weight": 0.0} if self.loss == "self_distillation" else {}))

    @property
    def loss_settings(self) -> dict[str, Any]:
        """The settings that the training loss depends on, including defaults: for model cards and resumed runs."""
        names = ["class_weighting"]
        if self.loss in ("pals", "self_distillation"):
            names = ["beta", "adaptive_beta", "affinity", "distill_unlabeled", *names]
        own = {"label_smoothing": ["smoothing"], "focal": ["focal_gamma"], "margin": ["margin", "margin_weight"]}
        names = [*own.get(self.loss, []), *names]
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """Refuse values out of range, also after a hyperparameter search has changed them.

        Raises:
            InputError: a value is out of range; the message names the field.
        """
        for name, allowed in (("loss", LOSSES), ("class_weighting", WEIGHTINGS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self.affinity = asdict(_with_settings(Affinity(), self.affinity))
        if self.loss == "pals" and self.affinity["weight"] == 0:
            raise InputError("affinity: with weight 0 no pixels are compared: use loss self_distillation for that")
        for name in ("beta", "smoothing"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        check_size("eval_window", self.eval_window)
        if not 0.0 <= self.eval_overlap < 1.0:
            raise InputError(f"eval_overlap must lie in [0, 1), got {self.eval_overlap}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise InputError(f"max_steps must be positive, or -1 to train for num_train_epochs, got {self.max_steps}")
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise InputError(f"num_train_epochs must be positive without max_steps, got {self.num_train_epochs}")
        if self.distill_unlabeled and self.ignore_index == PADDING_INDEX:
            raise InputError(f"ignore_index must not be {PADDING_INDEX}, the label of padding, with distill_unlabeled")
        check_numbers(self, _LIMITS)
        self._refuse_unsuitable_options()
        self._refuse_contradictions()

    def _refuse_unsuitable_options(self) -> None:
        """Refuse options of transformers that do not work for segmentation, or that lose a run."""
        if self.label_smoothing_factor:
            raise InputError(
                "label_smoothing_factor smooths over the last axis, which is not the class axis in segmentation. "
                f"Use loss='label_smoothing' with smoothing={self.label_smoothing_factor}"
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise InputError(
                f"train_sampling_strategy must be random or sequential, got {self.train_sampling_strategy}: "
                "the images of a training batch have one size, so there are no lengths to sort by"
            )
        for name, (only, reason) in _FIXED.items():
            if getattr(self, name, only) != only:
                raise InputError(f"{name} must be {only}: {reason}")

    def _refuse_contradictions(self) -> None:
        """Refuse pairs of options of which one makes the other void."""
        if self.freeze_backbone and (self.lora_rank is not None or self.layer_lr_decay != 1.0):
            other = "layer_lr_decay" if self.lora_rank is None else "lora_rank"
            raise InputError(f"{other} has no effect with freeze_backbone, which trains the head only: leave one out")
        if self.save_strategy == "steps" and not self.save_steps > 0:
            raise InputError(f"save_steps must be positive, got {self.save_steps}")
        for name, is_set in (
            ("load_best_model_at_end", self.load_best_model_at_end),
            ("save_strategy=best", self.save_strategy == "best"),
        ):
            if is_set and self.eval_strategy == "no":
                raise InputError(f"{name} needs evaluations during the training: set eval_strategy to steps or epoch")
        if self.load_best_model_at_end and self.save_strategy == "no":
            raise InputError("load_best_model_at_end needs checkpoints: set save_strategy to steps, epoch or best")

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments next to every checkpoint and pushes them: the token must not be in there.
        return {**self.__dict__, "hub_token": None}


def _with_settings(affinity: Affinity, given: dict[str, Any] | str | None) -> Affinity:
    """The affinity with the settings that a user gave, as a dictionary or as JSON."""
    try:
        settings = json.loads(given) if isinstance(given, str) else given or {}
    except (RecursionError, ValueError) as error:
        raise InputError(f"affinity must be JSON like '{{\"tau\": 0.1}}', got {given!r:.80}: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"affinity must hold settings and their values, like '{{\"tau\": 0.1}}', got {given!r}")
    try:
        return affinity.replace(settings)
    except ValueError as error:
        raise InputError(f"affinity: {error}") from error
