"""`transformers.Trainer` with the PALS loss, exact means over pixels and streaming segmentation metrics."""

from __future__ import annotations

import inspect
import math
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import broadcast
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback
from transformers.hyperparameter_search import default_hp_search_backend
from transformers.trainer_utils import BestRun, HPSearchBackend
from transformers.utils import logging

from .calibration import boundary_counts, boundary_metrics, calibration_metrics, calibration_sums
from .checkpoints import last_complete_checkpoint
from .config import PALSConfig
from .data import ID, WEAK_VIEW, StreamedDataset, collate
from .data.balance import class_weights
from .durable_trainer import DurableTrainer
from .errors import InputError, TrainingError, first_line
from .functional import PADDING_INDEX, is_labelled, soft_label_cross_entropy, upsample_argmax
from .inference import image_logits
from .losses import CrossEntropyLoss, LabelSmoothingLoss, PALSLoss, SegmentationLoss
from .metrics import SegmentationMetrics, confusion_matrix, nan_to_none
from .model_card import CardFacts
from .models import ClassifierTap, Reading, backbone_of, patch_size_of, read_network
from .nonfinite import images_of, keep_step, likely_cause

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


class PALSTrainer(DurableTrainer):
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
    - nothing is lost: complete checkpoints, model cards, pushes to the Hub and SIGTERM are those of
      [`DurableTrainer`];
    - a loss or gradient that is not finite ends the training before the weights take part, and its batch is kept.

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
        weights = weights_of_classes(args, train_dataset)
        if any(isinstance(data, StreamedDataset) for data in (train_dataset, *_sets_of(eval_dataset))):
            # Each process reads the stream and decodes its own part; else one would decode for all of them.
            args.accelerator_config.dispatch_batches = False
        data_collator = data_collator or partial(collate, with_ids=True)
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            card_facts=card_facts,
            **kwargs,
        )
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
        self._average = self._start_average(self.model)
        self._check_padding()
        self._check_sets()
        self.add_callback(_TrainingCallback(self))

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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None and self.args.should_save:
            save_model(self._average, os.path.join(output_dir, AVERAGE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._average is not None:
            path = os.path.join(checkpoint, AVERAGE_NAME)
            try:
                load_model(self._average, path)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise InputError(f"teacher='ema' cannot resume from {path}: {first_line(error)}") from error

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

    def _stop_at(self, what: str, batches: list[dict[str, Any]]) -> NoReturn:
        step, rank, run_dir = self.state.global_step + 1, self.args.process_index, Path(self.args.output_dir)
        last = f"the last checkpoint is {last_complete_checkpoint(run_dir) or 'none yet'}"
        if not batches:
            raise TrainingError(f"{what} at step {step}; {last}")
        folder = run_dir / (f"_non-finite-step-{step}" + (f"-rank-{rank}" if self.args.world_size > 1 else ""))
        about = {"what": what, "step": step, "learning_rate": self._get_learning_rate()}
        is_whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        try:
            keep_step(folder, batches, self.model if is_whole else None, about)
            kept = f"The batch{' and the network are' if is_whole else ' is'} in {folder}"
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk: the message is worth more
            kept = f"The batch cannot be kept in {folder}: {first_line(error)}"
        images = ", ".join(images_of(batches))
        raise TrainingError(
            f"{what} at step {step}{f', images {images}' if images else ''}: {likely_cause(batches, self.model)}. "
            f"{kept}; {last}"
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

    # ---- Evaluation ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The parent's, with a stream completed so that every process scores as many images, each of them once."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]
        _refuse_endless(chosen)
        if isinstance(chosen, StreamedDataset):
            chosen.complete_to(self.args.eval_batch_size * self.args.world_size)
        return super().get_eval_dataloader(eval_dataset)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        self.metrics.reset()
        self._cross_entropy_sum, self._more_sums = 0.0, []
        # Each process has batch statistics of its own since its last step; what is saved, and so what is scored, are
        # those of the main process.
        for buffer in self.model.buffers():
            broadcast(buffer)
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
        more = [images.sum(dim=0).cpu().double() for images in more]
        self._more_sums = [old + new for old, new in zip(self._more_sums or [0, 0], more, strict=False)]
        if not compute_result:
            return {}
        pixels = int(self.metrics.counts.sum())
        results = {"loss": self._cross_entropy_sum / pixels if pixels else float("nan"), **self.metrics.compute()}
        if self.args.eval_calibration:
            calibration, boundaries = self._more_sums
            results |= {**calibration_metrics(calibration), **boundary_metrics(boundaries)}
        return results


class _TrainingCallback(TrainerCallback):
    """Tells the training set its epoch, and the averaged network that there was a step."""

    def __init__(self, trainer: PALSTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._labels_checked, self.trainer._loss_parts = False, Counter()
        if self.trainer._average is not None:
            self.trainer._average.to(args.device)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Accelerate does so only where its sampler leaves it room.
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer._average is not None:
            self.trainer._average.update_parameters(self.trainer.model)


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
