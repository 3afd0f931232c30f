"""`transformers.Trainer` with the PALS loss, exact means over pixels and streaming segmentation metrics."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import math
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate.utils import broadcast
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback
from transformers.hyperparameter_search import default_hp_search_backend
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, BestRun, HPSearchBackend, HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from .calibration import boundary_counts, boundary_metrics, calibration_metrics, calibration_sums
from .checkpoints import (
    UNFINISHED,
    clear_unfinished,
    discard_old_checkpoints,
    is_complete_checkpoint,
    last_complete_checkpoint,
    publish,
    publish_files,
)
from .config import PALSConfig
from .data import ID, WEAK_VIEW, StreamedDataset, collate
from .data.balance import class_weights
from .data.fractions import MANIFEST
from .errors import InputError, TrainingError, first_line
from .functional import PADDING_INDEX, is_labelled, soft_label_cross_entropy, upsample_argmax
from .hub import LAST_CHECKPOINT, MODEL_FILES, create_repo, push_command, push_folder, push_in_background
from .inference import image_logits
from .losses import CrossEntropyLoss, LabelSmoothingLoss, PALSLoss, SegmentationLoss
from .metrics import SegmentationMetrics, confusion_matrix, nan_to_none
from .model_card import (
    CARD_DATA,
    CardData,
    CardFacts,
    hardware,
    loss_settings,
    pictures_in,
    public_name,
    settings,
    versions,
)
from .models import ClassifierTap, Reading, backbone_of, patch_size_of, read_network
from .nonfinite import images_of, keep_step, likely_cause

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.get_logger(__name__)

AVERAGE_NAME = "average.safetensors"  # the teacher's weights, in a checkpoint


def build_loss(config: PALSConfig, weights: list[float] | None = None) -> SegmentationLoss:
    """The loss module that `config.loss` names, with the given weights of the classes."""
    if config.loss == "pals":
        names = inspect.signature(PALSLoss).parameters.keys() - {"class_weights"}
        return PALSLoss(**{name: getattr(config, name) for name in names}, class_weights=weights)
    if config.loss == "label_smoothing":
        return LabelSmoothingLoss(config.smoothing, config.ignore_index, weights)
    return CrossEntropyLoss(config.ignore_index, weights)


def weights_of_classes(config: PALSConfig, train_dataset: Any) -> list[float] | None:
    """The class weights that `config.class_weighting` asks for."""
    if config.class_weighting == "none":
        return None
    images = getattr(train_dataset, "dataset", train_dataset)
    if "class_pixels" not in (getattr(images, "column_names", None) or ()):
        raise InputError(
            "class_weighting needs a training set with a column class_pixels, as load_segmentation_dataset gives it"
        )
    pixels = images.with_format(None)["class_pixels"]  # whatever the images' transform does
    return class_weights([row[:-1] for row in pixels], config.class_weighting)


def _sets_of(eval_dataset: Any) -> list[Any]:
    return list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]


def _refuse_endless(eval_dataset: Any) -> None:
    if isinstance(eval_dataset, StreamedDataset) and eval_dataset.repeat:
        raise InputError("a stream to evaluate on must end: use StreamedDataset(..., repeat=False)")


class PALSTrainer(Trainer):
    """A [`~transformers.Trainer`] for semantic segmentation with few labelled images.

    It differs from its parent in this:

    - the loss is taken at the classifier's own resolution ([`ClassifierTap`]) by the module that `args.loss` names;
    - the loss is the mean over the labelled pixels of the whole global batch: over gradient accumulation and
      processes, a batch gives the same gradient however it is cut up;
    - every log line has the one-hot and the aggregated part of the loss, beta and the mean entropy of q in nats;
    - evaluation scores every image at its own mask's size and gathers one count matrix per image, nothing larger.
      `eval_loss` is cross-entropy over labelled pixels, whatever the training loss;
    - the head has its own learning rate; backbone or batch norm can be frozen;
    - an auxiliary head, where the model was built with one, learns by cross-entropy with the weight of its config;
    - with `args.teacher` "ema" each checkpoint also holds the averaged weights, so that a resumed run is the same run.
      What is evaluated and saved as the model is the live network;
    - a checkpoint is complete or not there, whatever ends the process while it is written;
    - every checkpoint has a model card, and the data it is made of, see [`CardData`];
    - pushes to the Hub are tried again where that may help, and end in one line where it does not; the hyperparameters
      `push_to_hub`, `hub_model_id`, `hub_strategy`, `hub_private_repo` and `hub_revision` are the parent's;
    - SIGTERM, which announces the end of a machine or a job, ends the training after the step at hand, with a
      checkpoint; `trainer.terminated` is True then;
    - a loss or gradient that is not finite ends it before the weights take part, and its batch is kept.

    Args:
        model: a model of `AutoModelForSemanticSegmentation`.
        args: a [`PALSConfig`].
        train_dataset, eval_dataset: data sets of `pixel_values (3, H, W)` and `labels (H, W)`, like
            [`TransformedDataset`]. Training images must share a size, evaluation images need not.
        data_collator: by default [`collate`] with the ids of the images, which name them when a batch goes wrong.
        card_facts: what the model card says of the data and the license, see [`CardFacts`].
        kwargs: everything else [`~transformers.Trainer`] takes, except `compute_loss_func` and `compute_metrics`.

    Raises:
        InputError: the model is not for PALS, or `compute_loss_func` or `compute_metrics` is given.
    """

    loss_is_scaled_for_ga = True  # by the pixel count of the whole batch, see compute_loss

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: PALSConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        card_facts: CardFacts | None = None,
        **kwargs: Any,
    ):
        for name in ("compute_loss_func", "compute_metrics"):
            if kwargs.get(name) is not None:
                raise InputError(f"PALSTrainer has its own {name}: use PALSConfig.loss, or a plain Trainer")
        args = PALSConfig() if args is None else args
        if not isinstance(args, PALSConfig):
            raise InputError(f"PALSTrainer needs a PALSConfig, got {type(args).__name__}")
        if model is not None:
            self._adopt(model, args)
        if args.n_gpu > 1:
            logger.warning(
                "One process sees %d GPUs and uses the first; use all of them with `accelerate launch`.", args.n_gpu
            )
            args._n_gpu = 1  # nn.DataParallel copies modules between threads, out of reach of the tap
        self.card_facts = card_facts or CardFacts()
        self._evaluation: dict[str, Any] = {}  # of the weights as they are, if they have been evaluated
        self._best: tuple[int, float] | None = None  # step and epoch of the weights, if they are those of the best
        self._on_their_way: list[tuple[Future, Path]] = []  # what is being pushed from where
        self._seconds, self._began = 0.0, None  # of training, before this start of the loop, and when it started
        weights = weights_of_classes(args, train_dataset)
        if any(isinstance(data, StreamedDataset) for data in (train_dataset, *_sets_of(eval_dataset))):
            # Each process reads the stream and decodes its own part; else one would decode for all of them.
            args.accelerator_config.dispatch_batches = False
        data_collator = data_collator or partial(collate, with_ids=True)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        if model is None:
            self._adopt(self.model, args)
        if self.is_fsdp_enabled:
            # Accelerate asks for it, and networks without words raise instead of saying that they have none.
            self.model.get_input_embeddings = lambda: None
        self.loss_function = build_loss(args, weights).to(args.device)
        self.metrics = SegmentationMetrics(self.model.config.num_labels, args.ignore_index)
        self.compute_metrics = self._stream_metrics
        self._cross_entropy_sum = 0.0
        self._loss_parts: Counter[str] = Counter()
        self._labels_checked = False
        self._micro_batches: list[tuple[Tensor, dict[str, Any]]] = []  # of the step at hand: loss and inputs
        self._staging, self._saved_step = False, -1
        self._heard_sigterm = self.terminated = False
        self._average = self._start_average(self.model)
        self._check_padding()
        self._check_sets()
        self.add_callback(_TrainingCallback(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's, which SIGTERM ends after the step at hand."""
        self._heard_sigterm = self.terminated = False
        self._seconds, self._loss_parts, self._saved_step = 0.0, Counter(), -1
        if threading.current_thread() is not threading.main_thread():  # no other can listen
            return super().train(*args, **kwargs)
        before = signal.signal(signal.SIGTERM, self._hear_sigterm)
        try:
            return super().train(*args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _hear_sigterm(self, *_: Any) -> None:
        self._heard_sigterm = True

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, Any]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        backend: str | HPSearchBackend | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """The parent's, for the greatest mean IoU: the parent's own objective is the sum of all metrics.

        Args:
            hp_space, n_trials, backend, kwargs: see the parent.
            compute_objective: of the metrics of an evaluation. Default: their `eval_mean_iou`.
            direction: Default: "maximize", or with `compute_objective` the parent's, "minimize".
        """
        if compute_objective is None:
            compute_objective, direction = itemgetter("eval_mean_iou"), direction or "maximize"
            backend = backend or default_hp_search_backend()
            if backend == HPSearchBackend.WANDB:  # it goes by a metric that it is told, not by the objective
                kwargs.setdefault("metric", "eval/mean_iou")
        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, direction or "minimize", backend, **kwargs
        )

    def _hp_search_setup(self, trial: Any) -> None:
        """The parent's, which gives a trial's arguments to the network made just before; then what depends on them."""
        preset = self.args.preset
        super()._hp_search_setup(trial)
        if self.args.preset != preset:
            raise InputError("preset is read when a PALSConfig is made: search what it sets, like beta and tau")
        self.args.check()
        if self.model_init is not None:
            self._adopt(self.model, self.args)
            self._average = self._start_average(self.model)
        self._check_padding()
        weights = weights_of_classes(self.args, self.train_dataset)
        self.loss_function = build_loss(self.args, weights).to(self.args.device)

    def _start_average(self, model: nn.Module) -> AveragedModel | None:
        """The teacher of `teacher="ema"`: averaged weights, and the network's own batch statistics."""
        if self.args.loss != "pals" or self.args.teacher != "ema":
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError("teacher='ema' needs the whole network on every device, without FSDP or DeepSpeed")
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.args.ema_decay)).eval()

    def _check_padding(self) -> None:
        transform = getattr(self.train_dataset, "transform", None)
        distills = self.args.loss == "pals" and self.args.distill_void
        if distills and getattr(transform, "padding_index", None) == self.args.ignore_index:
            raise InputError(
                "distill_void would learn from padding: use TrainTransform(..., padding_index=PADDING_INDEX)"
            )

    def _check_sets(self) -> None:
        if isinstance(self.train_dataset, StreamedDataset) and not self.train_dataset.repeat:
            raise InputError("a stream to train on must begin again at its end: use StreamedDataset(..., repeat=True)")
        for data in _sets_of(self.eval_dataset):
            _refuse_endless(data)
        metric = self.args.metric_for_best_model
        if isinstance(self.eval_dataset, dict) and self.args.eval_strategy != "no" and metric is not None:
            prefixes = tuple(f"{name}_" for name in self.eval_dataset)
            if not metric.removeprefix("eval_").startswith(prefixes):
                like = prefixes[0] + metric.removeprefix("eval_")
                raise InputError(
                    f"metric_for_best_model must be of one evaluation set, like {like}, or None: got {metric}"
                )

    def _adopt(self, model: PreTrainedModel, args: PALSConfig) -> None:
        self._tap = ClassifierTap(model, before_dropout=args.affinity_source == "before_dropout")
        if args.freeze_backbone:
            backbone_of(model).requires_grad_(False)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)

    # ---- Loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of one micro-batch: its sum over labelled pixels, divided by their number in the global batch.

        Without `num_items_in_batch` the mean over this micro-batch.
        """
        if model.training:
            self._freeze_statistics()
        reading, outputs = self._read(model, self._tap, inputs)
        aggregated = None
        if isinstance(self.loss_function, PALSLoss):
            self.loss_function.beta = self.args.beta_at(self.state.global_step / max(1, self.state.max_steps))
            teacher = self._read_teacher(inputs) if self._has_own_teacher else reading
            aggregated = self.loss_function.aggregate(teacher.logits, teacher.features, inputs["labels"])
        loss = whole_loss(self.loss_function, reading, inputs["labels"], num_items_in_batch, aggregated)
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, but the divisor counts the pixels of all of them.
            loss = loss * self.accelerator.num_processes
        if model.training:
            self._record_parts(scaled=num_items_in_batch is not None)
            if num_items_in_batch is not None:  # in the training loop, which forgets them at the next step
                self._micro_batches.append((loss.detach(), inputs))
        return (loss, outputs) if return_outputs else loss

    def _read(self, model: nn.Module, tap: ClassifierTap, inputs: dict[str, Any]) -> tuple[Reading, Any]:
        """Run a network; what its tap read, with the features that `args.affinity_source` names."""
        source = self.args.affinity_source if isinstance(self.loss_function, PALSLoss) else None
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", WEAK_VIEW, ID)}
        return read_network(model, tap, inputs, source, self.args.encoder_stage, patch_size_of(self.model.config))

    @property
    def _has_own_teacher(self) -> bool:
        return self._average is not None or self.args.teacher_view != "same"

    @torch.no_grad()
    def _read_teacher(self, inputs: dict[str, Any]) -> Reading:
        """The teacher's own forward pass, in evaluation mode: no dropout, and no batch statistics change."""
        if self.args.teacher_view == "weak":
            if WEAK_VIEW not in inputs:
                raise InputError(f"teacher_view='weak' needs {WEAK_VIEW!r}: use TrainTransform(..., weak_view=True)")
            inputs = {**inputs, "pixel_values": inputs[WEAK_VIEW]}
        if self._average is not None:
            network = self._average.module
            before_dropout = self.args.affinity_source == "before_dropout"
            with self.accelerator.autocast():  # Accelerate gives it to the network it trains only
                return self._read(network, ClassifierTap(network, before_dropout), inputs)[0]
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            return self._read(self.model, self._tap, inputs)[0]
        finally:
            for module, training in modes.items():
                module.training = training

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """[`count_pixels`] of all micro-batches of all processes: the parent counts void pixels as labelled ones."""
        self._micro_batches = []
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        if any(isinstance(batch[name], list) for batch in batch_samples for name in batch.keys() - {ID}):
            raise InputError("images of one training batch differ in size: crop them to one size in the transform")
        if not self._labels_checked:
            self._check_labels(batch_samples[0]["labels"])
            self._labels_checked = True
        counts = torch.stack([self.loss_function.count(batch["labels"].to(device)) for batch in batch_samples])
        return self.accelerator.reduce(counts.sum(dim=0), "sum")

    def _check_labels(self, labels: Tensor) -> None:
        """Once a training, where a wrong convention shows at once; on a GPU it would end in a failed assertion."""
        labelled = labels[is_labelled(labels, self.args.ignore_index)]
        wrong = labelled[(labelled < 0) | (labelled >= self.model.config.num_labels)]
        if wrong.numel():
            raise InputError(
                f"label {wrong[0].item()} is none of the classes 0 to {self.model.config.num_labels - 1} and not "
                f"ignore_index={self.args.ignore_index}"
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """The parent's, which is what stands between backward pass and optimizer: here a step is found to be sound.

        Gradients are those of all processes by now, so all of them stop. Where a gradient scaler is at work, it skips
        steps whose gradients overflow, and only the loss counts.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        norm = 0.0 if grad_norm is None or self.accelerator.scaler is not None else float(grad_norm)
        wrong = [(loss.item(), inputs) for loss, inputs in self._micro_batches if not math.isfinite(loss)]
        is_wrong_anywhere = self._any_process(bool(wrong))
        if wrong:
            self._stop_at(f"the loss is {wrong[0][0]}", [inputs for _, inputs in wrong])
        if is_wrong_anywhere:
            self._stop_at("the loss of another process is not finite", [])
        if not math.isfinite(norm):
            self._stop_at(f"the gradient's norm is {norm}", [inputs for _, inputs in self._micro_batches])
        return grad_norm

    def _any_process(self, happened: bool) -> bool:
        """Whether it happened to any of the processes; all of them ask."""
        if self.args.world_size == 1:
            return happened
        count = torch.tensor(float(happened), device=self.args.device)
        return self.accelerator.reduce(count, "sum").item() > 0

    def _stop_at(self, what: str, batches: list[dict[str, Any]]) -> NoReturn:
        step, rank, run_dir = self.state.global_step + 1, self.args.process_index, Path(self.args.output_dir)
        last = f"the last checkpoint is {last_complete_checkpoint(run_dir) or 'none yet'}"
        if not batches:
            raise TrainingError(f"{what} at step {step}; {last}")
        folder = run_dir / (f"_non-finite-step-{step}" + (f"-rank-{rank}" if self.args.world_size > 1 else ""))
        about = {"what": what, "step": step, "learning_rate": self._get_learning_rate()}
        is_whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        keep_step(folder, batches, self.model if is_whole else None, about)
        images = ", ".join(images_of(batches))
        raise TrainingError(
            f"{what} at step {step}{f', images {images}' if images else ''}: {likely_cause(batches, self.model)}. "
            f"The batch{' and the network are' if is_whole else ' is'} in {folder}; {last}"
        )

    def _freeze_statistics(self) -> None:
        """Put frozen batch norm layers back into evaluation mode, which `model.train()` has just ended."""
        if self.args.freeze_batch_norm or self.args.freeze_backbone:
            root = self.model if self.args.freeze_batch_norm else backbone_of(self.model)
            for module in root.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and kernels. The parent goes by names, and would decay the norms of some backbones."""
        vectors = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
        return [name for name in super().get_decay_parameter_names(model) if name not in vectors]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The parent's optimizer, with the head's parameters in groups of their own learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.head_lr_multiplier != 1.0:
            backbone = {
                id(parameter) for parameter in backbone_of(self.model if model is None else model).parameters()
            }
            groups = []
            for group in optimizer.param_groups:
                for in_backbone, scale in ((True, 1.0), (False, self.args.head_lr_multiplier)):
                    chosen = [p for p in group["params"] if (id(p) in backbone) is in_backbone]
                    if chosen:
                        groups.append({**group, "params": chosen, "lr": group["lr"] * scale})
            optimizer.param_groups = groups
        return optimizer

    def rehearse(self) -> None:
        """Take the loss of one training example, so that what does not fit shows before the training.

        Raises:
            InputError: labels outside the classes, or an option the network cannot serve.
        """
        device = next(self.model.parameters()).device
        batch = self.data_collator([next(iter(self.train_dataset))])
        batch = {name: value.to(device) for name, value in batch.items() if name != ID}
        self._check_labels(batch["labels"])
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            self.compute_loss(self.model, batch)
        self.model.train(training)

    def end(self) -> None:
        """The parent's, after letting go of what holds the process group.

        `DistributedDataParallel` does, and a Gloo group that outlives the end of its process aborts it now and then,
        with "terminate called without an active exception" (pytorch issue 190489).
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()
        super().end()

    # ---- Logging ----

    def _record_parts(self, scaled: bool) -> None:
        scale = self.accelerator.num_processes if scaled else 1
        for name, value in self.loss_function.parts.items():
            if name == "entropy":
                self._loss_parts["q_entropy"] += value
            else:
                self._loss_parts[f"loss_{name}"] += value * scale
        self._loss_parts["micro_batches"] += 1
        self._loss_parts["steps"] += int(self.accelerator.sync_gradients)  # the last micro-batch of a step

    def _mean_parts(self) -> dict[str, float]:
        """Means since the last log line: per optimizer step for losses, which add up over micro-batches."""
        parts, self._loss_parts = dict(self._loss_parts), Counter()
        steps, micro_batches = parts.pop("steps"), parts.pop("micro_batches")
        means = {
            name: self.accelerator.reduce(value, "mean").item() / (micro_batches if name == "q_entropy" else steps)
            for name, value in parts.items()
        }
        if isinstance(self.loss_function, PALSLoss):
            means["beta"] = self.loss_function.beta
        return means

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log scalars, with the parts of the loss where a training loss is logged."""
        if "loss" in logs and self._loss_parts:
            logs.update(self._mean_parts())
        scalars = {name: nan_to_none(value) for name, value in logs.items() if not isinstance(value, list)}
        super().log(scalars, start_time)
        logs.update({name: scalars[name] for name in scalars.keys() - logs.keys()})

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """Write `{split}_results.json`, with null for what is undefined: NaN is not JSON."""
        super().save_metrics(split, nan_to_none(metrics), combined)

    # ---- Checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED) if self._staging else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The parent's, written aside and then renamed.

        Raises:
            TrainingError: it cannot be written, for example because the disk is full. The ones before are still there.
        """
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written, checkpoint = run_dir / UNFINISHED / name, run_dir / name
        if self.args.should_save:
            clear_unfinished(run_dir)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            self._record_best(written, checkpoint)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(written, checkpoint)
            self.accelerator.wait_for_everyone()
            if self.args.local_process_index == 0 and written.exists():  # on a disk that the main process does not see
                publish(written, checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(run_dir).free / 2**20
            clear_unfinished(run_dir)
            raise TrainingError(
                f"{checkpoint} cannot be written, with {free:.0f} MB left on its disk: {first_line(error)}; "
                f"the last checkpoint is {last_complete_checkpoint(run_dir) or 'none yet'}"
            ) from error
        finally:
            self._staging = False
        self._saved_step = self.state.global_step
        if self.args.should_save:
            self._discard_old_checkpoints(run_dir, {name})
            clear_unfinished(run_dir)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _record_best(self, written: Path, checkpoint: Path) -> None:
        """Where the best checkpoint is: the parent looks for it beside the one being written, which is aside."""
        if not self.state.best_global_step:
            return
        best = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best == checkpoint or best.exists():
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _find_best(self) -> None:
        """Where the best checkpoint of a resumed run is now. Where it is not, a worse one than it may be the best."""
        step = self.state.best_global_step
        if not (self.args.load_best_model_at_end and step) or self.state.best_model_checkpoint is not None:
            return
        best = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if is_complete_checkpoint(best):
            self.state.best_model_checkpoint = str(best)
        else:
            logger.warning("The best checkpoint, of step %d, is not here: the search for the best begins anew.", step)
            self.state.best_metric = self.state.best_global_step = None

    def _discard_old_checkpoints(self, run_dir: Path, kept: set[str]) -> None:
        kept.add(os.path.basename(self.state.best_model_checkpoint or ""))
        kept.update(folder.name for job, folder in self._on_their_way if not job.done())
        discard_old_checkpoints(run_dir, self.args.save_total_limit, kept)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args, **kwargs):
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if self.terminated and self._saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's, but that with a limit of 1 it deletes every checkpoint except the best one, in place."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
            if self.args.should_save and self.args.push_to_hub:  # some stayed because they were being pushed
                self._discard_old_checkpoints(Path(self.args.output_dir), set())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The parent's, file by file complete or not there, and with a card."""
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            clear_unfinished(folder)
        super()._save(str(folder / UNFINISHED), state_dict)
        if self.args.should_save:
            self.card_data(folder).save(folder / UNFINISHED)
            manifest = Path(self.args.output_dir) / MANIFEST
            if manifest.exists() and folder != manifest.parent:  # a checkpoint says by itself what it was trained on
                shutil.copy(manifest, folder / UNFINISHED / MANIFEST)
            publish_files(folder / UNFINISHED, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights the way `from_pretrained` does, and all of them.

        The parent takes the file's names as they are, but `save_pretrained` writes SegFormer's and others' under
        their old names: it would go on from random weights with a warning (transformers issue 48805).
        """
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        try:
            restored, info = type(self.model).from_pretrained(
                resume_from_checkpoint, config=self.model.config, dtype=self.model.dtype, output_loading_info=True
            )
        except (OSError, RuntimeError, SafetensorError) as error:  # damaged, or of a model of another shape
            raise InputError(f"cannot load checkpoint {resume_from_checkpoint}: {first_line(error)}") from error
        if info["missing_keys"]:
            raise InputError(f"checkpoint {resume_from_checkpoint} lacks the weights {sorted(info['missing_keys'])}")
        self.model.load_state_dict(restored.state_dict())

    def _load_best_model(self) -> None:
        if self.terminated:  # the run goes on, from the weights it has
            return
        best = Path(self.state.best_model_checkpoint)
        if (best / CARD_DATA).exists():
            card = CardData.load(best)
            self._evaluation, self._best = card.metrics, (card.step, card.epoch)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None and self.args.should_save:
            save_model(self._average, os.path.join(output_dir, AVERAGE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / CARD_DATA).exists():
            self._seconds = CardData.load(checkpoint).seconds or 0.0
        if checkpoint is not None and self._average is not None:
            path = os.path.join(checkpoint, AVERAGE_NAME)
            try:
                load_model(self._average, path)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise InputError(f"teacher='ema' cannot resume from {path}: {first_line(error)}") from error

    # ---- Card and Hub ----

    def card_data(self, folder: str | os.PathLike | None = None) -> CardData:
        """What the model card says of the weights as they are now.

        Args:
            folder: where the card will lie: it shows the pictures that are there. Default: `args.output_dir`.
        """
        args, config, facts = self.args, self.model.config, self.card_facts
        folder = Path(args.output_dir if folder is None else folder)
        step, epoch = self._best or (self.state.global_step, self.state.epoch)
        backbone = getattr(config, "backbone_config", None)
        history = {}
        for entry in self.state.log_history:
            if "eval_mean_iou" in entry:  # one after the training, of other weights or images, has its last step too
                figures = {name: entry.get(name) for name in ("step", "eval_loss", "eval_mean_iou")}
                history.setdefault(entry["step"], figures)
        return CardData(
            model_name=self.hub_model_id or args.hub_model_id or Path(args.output_dir).resolve().name,
            architecture=type(self.model).__name__,
            id2label=dict(config.id2label),
            loss=args.loss,
            loss_settings=loss_settings(args),
            settings={**facts.settings, **settings(args)},
            base_model=public_name(config.name_or_path),
            base_model_revision=getattr(config, "_commit_hash", None),
            step=step,
            epoch=epoch,
            best_of=self.state.global_step if self._best else None,
            metrics=nan_to_none(self._evaluation),
            history=list(history.values()),
            seconds=self._training_seconds() or None,
            hardware=hardware(args.device, args.world_size),
            needs=["transformers", *(["timm"] if getattr(backbone, "model_type", "") == "timm_backbone" else [])],
            versions=versions(),
            facts=facts,
            pictures=pictures_in(folder),
        )

    def _training_seconds(self) -> float:
        return self._seconds + (0.0 if self._began is None else time.monotonic() - self._began)

    def create_model_card(self, license: str | None = None, model_name: str | None = None, **ignored: Any) -> None:
        """Write `README.md` and `model_card.json` into `args.output_dir`, of the weights and pictures as they are.

        Args:
            license: of the model, instead of `card_facts.license`.
            model_name: instead of the repository or the folder's name.
            ignored: what else the parent takes: the card says it of itself, or takes it from `card_facts`.
        """
        if not self.is_world_process_zero():
            return
        if license is not None:
            self.card_facts = dataclasses.replace(self.card_facts, license=license)
        card = self.card_data()
        dataclasses.replace(card, model_name=model_name or card.model_name).save(self.args.output_dir)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """The parent's, persistent and with one line for an error."""
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
        private = self.args.hub_private_repo if private is None else private
        later = push_command(
            self.args.output_dir,
            name,
            private=private,
            revision=self.args.hub_revision,
            license=self.card_facts.license,
        )
        # At the start of a new run, what its folder holds is of another one, which it will replace.
        is_start = not hasattr(self, "state") and self.args.resume_from_checkpoint is None
        folder = None if is_start else self.args.output_dir
        self.hub_model_id = create_repo(name, folder, private, token or self.args.hub_token, later=later)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | Future | None:
        """Save the model and push the run's folder by [`push_folder`]: model, card, metrics, manifest, pictures.

        All processes call it, and the main one pushes.

        Args:
            commit_message: of the commit.
            blocking: wait until it is done; else a `Future` is returned.
            token: instead of `args.hub_token`, or that of `hf auth login`.
            revision: branch.
            private: whether a new repository is private.
            card: for [`create_model_card`].

        Raises:
            PushError: it was not pushed; everything is still in `args.output_dir`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        self._finish_current_push()
        where = {"revision": revision or self.args.hub_revision, "token": token or self.args.hub_token}
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        if self.args.push_to_hub and checkpoint is not None:  # left out at its time if another was on its way
            pushes = self._pushes_to_go_on_from(checkpoint)
            jobs = [push_in_background(checkpoint, self.hub_model_id, **options, **where) for options in pushes]
            self.push_in_progress = PushInProgress(jobs)
            self._finish_current_push()
        push = push_folder if blocking else push_in_background
        return push(self.args.output_dir, self.hub_model_id, message=commit_message or "End of training", **where)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint in the background as `args.hub_strategy` says, unless one is still on its way."""
        strategy = self.args.hub_strategy
        if self._staging or not self.is_world_process_zero() or strategy == HubStrategy.END:
            return  # staged: it will change its name, and is pushed then
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
        else:
            self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        message = f"Training in progress, step {self.state.global_step}"
        pushes = [{"message": message, "patterns": MODEL_FILES}, *self._pushes_to_go_on_from(checkpoint)]
        jobs = [
            push_in_background(
                checkpoint,
                self.hub_model_id,
                revision=self.args.hub_revision,
                token=self.args.hub_token,
                **options,
            )
            for options in pushes
        ]
        self._on_their_way += [(job, checkpoint) for job in jobs]
        if self.push_in_progress is None:
            self.push_in_progress = PushInProgress(jobs)
        else:
            self.push_in_progress.jobs.extend(jobs)

    def _pushes_to_go_on_from(self, checkpoint: Path) -> list[dict[str, Any]]:
        """What `args.hub_strategy` adds, for another machine to go on from."""
        folders = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        name = folders.get(self.args.hub_strategy)
        return [] if name is None else [{"message": checkpoint.name, "path_in_repo": name, "patterns": ["*"]}]

    def _finish_current_push(self) -> None:
        """Wait for what is on its way, and say what did not arrive: the training has not to end for it."""
        super()._finish_current_push()
        self._on_their_way = []
        if getattr(self, "push_in_progress", None) is None:
            return
        for job in self.push_in_progress.jobs:
            if job.exception() is not None:
                logger.warning("%s", first_line(job.exception()))
        self.push_in_progress = None

    # ---- Data ----

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with _sigterm_waits():  # the first batch of an epoch starts the workers
            return super().get_batch_samples(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The parent's, with a stream completed so that every process scores as many images, each of them once."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]
        _refuse_endless(chosen)
        if isinstance(chosen, StreamedDataset):
            chosen.complete_to(self.args.eval_batch_size * self.args.world_size)
        return super().get_eval_dataloader(eval_dataset)

    # ---- Evaluation ----

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The parent's. What it gives for the trainer's own `eval_dataset` is what the next model card shows."""
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        is_ours = eval_dataset is None or eval_dataset is self.eval_dataset
        if is_ours and "eval_mean_iou" in metrics:  # not one of several data sets
            self._evaluation = metrics
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        self.metrics.reset()
        self._cross_entropy_sum, self._more_sums = 0.0, []
        # Each process has batch statistics of its own since its last step; what is saved, and so what is scored, are
        # those of the main process.
        for buffer in self.model.buffers():
            broadcast(buffer)
        with _sigterm_waits():
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor | tuple[Tensor, ...]]:
        """Score each image of a batch at its own mask's size.

        Returns:
            None, one int64 count matrix per image `(b, C, C)`, and the summed cross-entropy of each image `(b,)`; with
            `args.eval_calibration` this one with the sums of calibration and boundaries `(b, ...)`. These are what is
            gathered over processes.
        """
        if "labels" not in inputs:
            raise InputError("evaluation needs labels; for pictures without, use pipeline('image-segmentation')")
        inputs = self._prepare_inputs(inputs)
        counts, losses, calibration, boundaries = [], [], [], []
        with torch.no_grad():
            for logits, labels in zip(self._logits_of(model, inputs["pixel_values"]), inputs["labels"], strict=True):
                logits, ignore_index = logits[None].float(), self.args.ignore_index
                labels = labels.masked_fill(labels == PADDING_INDEX, ignore_index)
                predictions = upsample_argmax(logits, labels.shape)[0]
                counts.append(confusion_matrix(predictions, labels, self.metrics.num_labels, ignore_index))
                losses.append(soft_label_cross_entropy(logits, labels[None], ignore_index=ignore_index, num_items=1))
                if self.args.eval_calibration:
                    calibration.append(calibration_sums(logits, labels[None], ignore_index))
                    boundaries.append(boundary_counts(predictions, labels, self.metrics.num_labels, ignore_index))
        sums = torch.stack(losses)
        if self.args.eval_calibration:
            sums = (sums, torch.stack(calibration), torch.stack(boundaries))
        return None, torch.stack(counts), sums

    def _logits_of(self, model: nn.Module, pixel_values: Tensor | list[Tensor]):
        """Logits `(C, h, w)` image by image; images of different sizes go through the network one at a time."""
        batches = [pixel_values] if isinstance(pixel_values, Tensor) else [image[None] for image in pixel_values]
        for batch in batches:
            yield from image_logits(model, batch, self.args.eval_window, self.args.eval_overlap)

    def _stream_metrics(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, Any]:
        self.metrics.add_counts(prediction.predictions)
        losses, *more = prediction.label_ids if self.args.eval_calibration else (prediction.label_ids,)
        self._cross_entropy_sum += losses.cpu().double().sum().item()
        more = [images.sum(dim=0).cpu() for images in more]
        self._more_sums = [old + new for old, new in zip(self._more_sums or [0, 0], more, strict=False)]
        if not compute_result:
            return {}
        pixels = int(self.metrics.counts.sum())
        results = {"loss": self._cross_entropy_sum / pixels if pixels else float("nan"), **self.metrics.compute()}
        if self.args.eval_calibration:
            calibration, boundaries = self._more_sums
            results |= {**calibration_metrics(calibration), **boundary_metrics(boundaries)}
        return results


@contextmanager
def _sigterm_waits() -> Iterator[None]:
    """Hold SIGTERM back from this thread, and for good from the processes that it starts.

    Sent to all processes of a job, it would end the workers of a DataLoader at once, and the run with them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _TrainingCallback(TrainerCallback):
    """Tells the training set its epoch, the averaged network that there was a step, and the loop of SIGTERM."""

    def __init__(self, trainer: PALSTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._began, self.trainer._best = time.monotonic(), None
        self.trainer._find_best()
        self.trainer._labels_checked = False
        if self.trainer._average is not None:
            self.trainer._average.to(args.device)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Accelerate does so only where its sampler leaves it room.
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._evaluation = {}

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._seconds, self.trainer._began = self.trainer._training_seconds(), None

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer._average is not None:
            self.trainer._average.update_parameters(self.trainer.model)
        # All stop after the same step, whoever heard it first.
        if self.trainer._any_process(self.trainer._heard_sigterm):
            self.trainer.terminated = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer.terminated:  # perhaps in the middle of it: nothing is due
            control.should_log = control.should_evaluate = control.should_save = False


def whole_loss(
    loss: nn.Module,
    reading: Reading,
    labels: Tensor,
    num_items: Tensor | int | None = None,
    aggregated: Tensor | None = None,
) -> Tensor:
    """A loss of this package on what a tap read, an auxiliary head's cross-entropy included.

    q is made on the classifier's grid (unless `aggregated` is given), the loss is taken at the output of the head.
    """
    given = {}
    if isinstance(loss, PALSLoss):
        if aggregated is None:
            aggregated = loss.aggregate(reading.logits, reading.features, labels)
        given["aggregated"] = reading.at_output(aggregated)
    value = loss(reading.at_output(reading.logits), labels, num_items=num_items, **given)
    if reading.auxiliary_logits is not None:
        auxiliary = soft_label_cross_entropy(
            reading.auxiliary_logits,
            labels,
            ignore_index=loss.ignore_index,
            num_items=num_items,
            class_weights=loss.class_weights,
        )
        loss.parts["auxiliary"] = auxiliary.detach()
        value = value + reading.auxiliary_weight * auxiliary
    return value


def compute_loss_func(loss: nn.Module, model: nn.Module) -> Callable[..., Tensor]:
    """A loss of this package for a plain `Trainer(compute_loss_func=...)`.

    Trainer counts every label that is not -100 as an item, so void pixels with another ignore index are in its count.
    The adapter takes them out: exactly, where a step is one batch of one process, or where void pixels are -100 in
    the labels. With accumulation or several processes and another ignore index, each micro-batch's own mean is
    weighted by its number of pixels; [`PALSTrainer`] is exact there too.

    Args:
        loss: for example [`PALSLoss`].
        model: the model given to Trainer. A hook stays on its classifier.

    Example:
        >>> Trainer(model, args, compute_loss_func=compute_loss_func(PALSLoss(), model), ...)
    """
    tap = ClassifierTap(model)
    tap.attach()

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        reading = tap.read()
        if reading.logits.shape[0] != labels.shape[0]:
            raise InputError("the model runs in nn.DataParallel, out of reach of the tap: use `accelerate launch`")
        counted = labels != -100
        labels = labels.masked_fill(~counted, loss.ignore_index)
        if num_items_in_batch is None:
            return whole_loss(loss, reading, labels)
        share = num_items_in_batch / counted.sum().clamp(min=1)
        return whole_loss(loss, reading, labels, loss.count(labels) * share)

    return compute
