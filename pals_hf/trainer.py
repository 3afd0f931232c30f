"""`transformers.Trainer` with the PALS loss, exact means over pixels and streaming segmentation metrics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import broadcast, broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback
from transformers.hyperparameter_search import default_hp_search_backend
from transformers.trainer_utils import BestRun, HPSearchBackend, has_length
from transformers.utils import logging

from .backbones import layer_scales
from .calibration import boundary_counts, boundary_metrics, calibration_metrics, calibration_sums
from .checkpoints import last_complete_checkpoint
from .config import PALSConfig
from .data import ID, StreamedDataset, collate
from .data.balance import class_weights
from .errors import InputError, TrainingError, first_line, is_out_of_memory
from .functional import PADDING_INDEX, is_labelled, soft_label_cross_entropy, upsample_argmax
from .inference import image_logits, part_size
from .losses import CrossEntropyLoss, FocalLoss, LabelSmoothingLoss, MarginLoss, PALSLoss, SegmentationLoss
from .merging import add_adapters, has_parts_to_merge, merged
from .metrics import SegmentationMetrics, confusion_matrix, nan_to_none
from .model_card import CardFacts
from .models import backbone_of
from .network_loss import network_loss
from .nonfinite import has_finite_weights, images_of, keep_step, likely_cause
from .preemption import PreemptibleTrainer
from .publishing import PublishingTrainer
from .rehearsal import rehearse
from .sizes import refuse_size
from .tap import ClassifierTap, read_network
from .temperature import Scorer, fold_temperature

logger = logging.get_logger(__name__)


def build_loss(config: PALSConfig, weights: list[float] | None = None) -> SegmentationLoss:
    """Build the loss module that `config.loss` names, with the given weights of the classes."""
    shared = {"ignore_index": config.ignore_index, "class_weights": weights}
    if config.loss in ("pals", "self_distillation"):
        return PALSLoss(
            config.beta,
            config.affinity_settings,
            adaptive_beta=config.adaptive_beta,
            distill_unlabeled=config.distill_unlabeled,
            **shared,
        )
    if config.loss == "label_smoothing":
        return LabelSmoothingLoss(config.smoothing, **shared)
    if config.loss == "focal":
        return FocalLoss(config.focal_gamma, **shared)
    if config.loss == "margin":
        return MarginLoss(config.margin, config.margin_weight, **shared)
    return CrossEntropyLoss(**shared)


def weights_of_classes(config: PALSConfig, train_dataset: Any) -> list[float] | None:
    """Compute the class weights that `config.class_weighting` names, or return None for "none".

    Raises:
        InputError: the training set has no column `class_pixels`.
    """
    if config.class_weighting == "none":
        return None
    images = getattr(train_dataset, "dataset", train_dataset)
    if "class_pixels" not in (getattr(images, "column_names", None) or ()):
        raise InputError(
            "class_weighting needs a training set with a column class_pixels, as load_segmentation_dataset returns it"
        )
    pixels = images.with_format(None)["class_pixels"]  # whatever the images' transform does
    return class_weights([row[:-1] for row in pixels], config.class_weighting)


def _sets_of(eval_dataset: Any) -> list[Any]:
    return list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]


def _refuse_endless(eval_dataset: Any) -> None:
    if isinstance(eval_dataset, StreamedDataset) and eval_dataset.repeat:
        raise InputError("the evaluation stream must end: use StreamedDataset(..., repeat=False)")


class PALSTrainer(PreemptibleTrainer, PublishingTrainer):
    """A [`~transformers.Trainer`] for semantic segmentation with few labelled images.

    It differs from its parent in these points:

    - the loss that `args.loss` names is computed at the resolution of the classifier ([`ClassifierTap`]);
    - the loss is the mean over the labelled pixels of the whole global batch: gradient accumulation and data
      parallelism give the same gradient as one large batch;
    - every log line contains the parts of the loss and the mean entropy of q in nats;
    - evaluation scores every image at the size of its own mask, and gathers only one count matrix per image.
      `eval_loss` is the cross-entropy over labelled pixels, whatever the training loss;
    - the head has its own learning rate, layers of the backbone can have theirs, and backbone or batch norm can be
      frozen, or the backbone can learn by LoRA adapters ([`add_adapters`]);
    - an auxiliary head learns by cross-entropy with the weight of its config, where the model was built with one;
    - checkpoints are written atomically ([`AtomicCheckpointTrainer`]), with model cards and pushes to the Hub
      ([`PublishingTrainer`]), and SIGTERM ends the training with a checkpoint ([`PreemptibleTrainer`]);
    - training stops before the optimizer step if the loss or the gradient is not finite, and the batch is saved.

    Attributes:
        has_stepped: whether the last training got through its first step.

    Args:
        model: a model of `AutoModelForSemanticSegmentation`.
        args: a [`PALSConfig`].
        train_dataset, eval_dataset: data sets of `pixel_values (3, H, W)` and `labels (H, W)`, like
            [`TransformedDataset`]. Training images must share a size, evaluation images need not.
        data_collator: by default [`collate`] with the ids of the images, which errors can then name.
        card_facts: facts on the data and the license for the model card, see [`CardFacts`].
        kwargs: all other arguments of [`~transformers.Trainer`], except `compute_loss_func` and `compute_metrics`.

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
                raise InputError(f"PALSTrainer has its own {name}. Use PALSConfig(loss=...), or a plain Trainer")
        args = PALSConfig() if args is None else args
        if not isinstance(args, PALSConfig):
            raise InputError(f"PALSTrainer needs a PALSConfig, got {type(args).__name__}")
        if model is not None:
            self._adopt(model, args)
        if args.n_gpu > 1:
            logger.warning(
                "This process sees %d GPUs and uses only the first. Start it with `accelerate launch` to use all.",
                args.n_gpu,
            )
            args._n_gpu = 1  # the tap does not work in nn.DataParallel, which copies modules between threads
        weights = weights_of_classes(args, train_dataset)
        if any(isinstance(data, StreamedDataset) for data in (train_dataset, *_sets_of(eval_dataset))):
            # Each process reads the stream and decodes its own part. Otherwise one process would decode for all.
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
        if has_parts_to_merge(self.model) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise InputError("lora_rank and a linear head do not work with FSDP and DeepSpeed. Use DDP")
        if self.is_fsdp_enabled:
            # Accelerate calls this method, which raises an error in networks without word embeddings.
            self.model.get_input_embeddings = lambda: None
        self.loss_function = build_loss(args, weights).to(args.device)
        self.metrics = SegmentationMetrics(self.model.config.num_labels, args.ignore_index)
        self.compute_metrics = self._stream_metrics
        self._cross_entropy_sum = 0.0
        self._loss_parts: Counter[str] = Counter()
        self._labels_checked = False
        self.has_stepped = False
        self._micro_batches: list[tuple[Tensor, dict[str, Any]]] = []  # of the step at hand: loss and inputs
        self._check_padding()
        self._check_sets()
        self.add_callback(_TrainingCallback(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does. A training without a step, or that ruins the weights, is an error.

        Raises:
            InputError: there is no image or no step to train on.
            TrainingError: the memory is too small, or the weights are not finite at the end.
        """
        self.has_stepped = False
        try:
            output = super().train(*args, **kwargs)
        except RuntimeError as error:
            if not is_out_of_memory(error) and "No executable batch size found" not in str(error):
                raise
            raise TrainingError(
                f"out of memory after step {self.state.global_step}: {first_line(error)}. Use a smaller "
                "per_device_train_batch_size with more gradient_accumulation_steps, or smaller images; the last "
                f"checkpoint is {last_complete_checkpoint(self.args.output_dir) or 'none yet'}"
            ) from error
        if not self.state.global_step:
            raise TrainingError("no step was trained: the network is as it was before")
        if not has_finite_weights(self.model):
            raise TrainingError(
                f"the weights of the network are not finite after step {self.state.global_step}. Try a lower "
                "learning_rate or weight_decay"
            )
        return output

    def get_train_dataloader(self) -> DataLoader:
        """Return the parent's loader.

        Raises:
            InputError: an epoch has no batch.
        """
        if has_length(self.train_dataset) and len(self.train_dataset) == 0:
            raise InputError("the training data set is empty")
        loader = super().get_train_dataloader()
        if has_length(loader) and len(loader) == 0:
            processes = f" in each of {self.args.world_size} processes" if self.args.world_size > 1 else ""
            raise InputError(
                f"dataloader_drop_last leaves no batch to train on: there are {len(self.train_dataset)} training "
                f"images for batches of {self._train_batch_size}{processes}. Use a smaller "
                "per_device_train_batch_size, or leave dataloader_drop_last out"
            )
        return loader

    def set_initial_training_values(self, args: PALSConfig, dataloader: DataLoader) -> tuple:
        """Return the parent's numbers of epochs, images and steps.

        Raises:
            InputError: an option needs more steps than the training has.
        """
        *others, steps = super().set_initial_training_values(args, dataloader)
        warmup = args.get_warmup_steps(steps)
        if warmup >= steps:
            raise InputError(
                f"warmup_steps {args.warmup_steps:g} leaves no step after the warmup: the training has {steps} "
                f"step{'s' if steps > 1 else ''}, and {warmup} of them would be warmup"
            )
        if args.load_best_model_at_end and args.eval_strategy == "steps":
            first = max(args.eval_steps if args.eval_steps >= 1 else 1, args.eval_delay)
            if first > steps:
                raise InputError(
                    f"load_best_model_at_end needs an evaluation, but the first one would be at step {first:g} of "
                    f"{steps}. Use a smaller eval_steps or eval_delay"
                )
        return (*others, steps)

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, Any]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        backend: str | HPSearchBackend | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Search for the greatest mean IoU. The objective of the parent is the sum of all metrics.

        Args:
            hp_space, n_trials, backend, kwargs: see [`~transformers.Trainer.hyperparameter_search`].
            compute_objective: function of the metrics of an evaluation. Default: `eval_mean_iou`.
            direction: by default "maximize", or "minimize" if `compute_objective` is given.
        """
        if compute_objective is None:
            compute_objective, direction = itemgetter("eval_mean_iou"), direction or "maximize"
            backend = backend or default_hp_search_backend()
            if backend == HPSearchBackend.WANDB:  # which optimises a named metric instead of the objective
                kwargs.setdefault("metric", "eval/mean_iou")
        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, direction or "minimize", backend, **kwargs
        )

    def _hp_search_setup(self, trial: Any) -> None:
        """Apply the arguments of a trial to the new network, then rebuild everything that depends on them."""
        preset = self.args.preset
        super()._hp_search_setup(trial)
        if self.args.preset != preset:
            raise InputError(
                "a search cannot set preset, which is read when a PALSConfig is made: search beta instead"
            )
        self.args.check()
        if self.model_init is not None:
            self._adopt(self.model, self.args)
        weights = weights_of_classes(self.args, self.train_dataset)
        self.loss_function = build_loss(self.args, weights).to(self.args.device)
        self._check_padding()

    def _check_padding(self) -> None:
        transform = getattr(self.train_dataset, "transform", None)
        padding = getattr(transform, "padding_index", None)
        if self.loss_function.distill_unlabeled and padding == self.args.ignore_index:
            raise InputError(
                "distill_unlabeled would learn from padding. Use TrainTransform(..., padding_index=PADDING_INDEX)"
            )

    def _check_sets(self) -> None:
        if isinstance(self.train_dataset, StreamedDataset) and not self.train_dataset.repeat:
            raise InputError("the training stream must repeat: use StreamedDataset(..., repeat=True)")
        for data in _sets_of(self.eval_dataset):
            _refuse_endless(data)
        metric = self.args.metric_for_best_model
        if isinstance(self.eval_dataset, dict) and self.args.eval_strategy != "no" and metric is not None:
            prefixes = tuple(f"{name}_" for name in self.eval_dataset)
            if not metric.removeprefix("eval_").startswith(prefixes):
                like = prefixes[0] + metric.removeprefix("eval_")
                raise InputError(
                    f"metric_for_best_model must name an evaluation set, like {like}, or be None, got {metric}"
                )

    def _adopt(self, model: PreTrainedModel, args: PALSConfig) -> None:
        self._tap = ClassifierTap(model, before_dropout=args.affinity["source"] == "before_dropout")
        if args.freeze_backbone:
            backbone_of(model).requires_grad_(False)
        if args.lora_rank is not None:
            add_adapters(model, backbone_of(model), args.lora_rank)
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
        """Return the loss of a micro-batch: its sum over labelled pixels by their number in the global batch.

        Without `num_items_in_batch` this is the mean over the micro-batch.
        """
        if model.training:
            self._freeze_statistics()
        images = {name: value for name, value in inputs.items() if name not in ("labels", ID)}
        reading, outputs = read_network(model, self._tap, images, self.loss_function.affinity)
        loss, parts = network_loss(self.loss_function, reading, inputs["labels"], num_items_in_batch)
        # Gradients are averaged over processes, but the divisor counts the pixels of all processes.
        scale = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = loss * scale
        if model.training:
            self._record_parts(parts, scale)
            if num_items_in_batch is not None:  # in the training loop, which clears this list at the next step
                self._micro_batches.append((loss.detach(), inputs))
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """Sum [`count_pixels`] over all micro-batches of all processes. The parent counts unlabelled pixels, too."""
        self._micro_batches = []
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        for batch in batch_samples:
            self._check_size(batch)
        if not self._labels_checked:
            self._check_labels(batch_samples[0]["labels"])
            self._labels_checked = True
        counts = torch.stack([self.loss_function.count(batch["labels"].to(device)) for batch in batch_samples])
        return self.accelerator.reduce(counts.sum(dim=0), "sum")

    def check_batch(self, batch: dict[str, Any]) -> None:
        """Check the sizes and labels of a batch of training images.

        Raises:
            InputError: the images differ in size, or a label is outside the classes.
        """
        self._check_size(batch)
        self._check_labels(batch["labels"])

    def _check_size(self, batch: dict[str, Any]) -> None:
        if any(isinstance(batch[name], list) for name in batch.keys() - {ID}):
            raise InputError("the images of a training batch differ in size. Crop them to one size in the transform")
        if "pixel_values" in batch:
            refuse_size(self.model.config, batch["pixel_values"].shape[-2:], "a crop")

    def _check_labels(self, labels: Tensor) -> None:
        """Check the labels of the first batch. On a GPU, a wrong label would end in a failed assertion."""
        labelled = labels[is_labelled(labels, self.args.ignore_index)]
        wrong = labelled[(labelled < 0) | (labelled >= self.model.config.num_labels)]
        if wrong.numel():
            raise InputError(
                f"label {wrong[0].item()} is not one of the classes 0 to {self.model.config.num_labels - 1}, nor "
                f"ignore_index={self.args.ignore_index}"
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """Stop the training if the loss or the gradient is not finite.

        This runs after the backward pass and before the optimizer step. The gradients have been reduced by now, so all
        processes stop. A gradient scaler skips steps whose gradients overflow, so with one only the loss is checked.

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

    def _stop_at(self, problem: str, batches: list[dict[str, Any]]) -> NoReturn:
        step, rank, run_dir = self.state.global_step + 1, self.args.process_index, Path(self.args.output_dir)
        last = f"the last checkpoint is {last_complete_checkpoint(run_dir) or 'none yet'}"
        if not batches:
            raise TrainingError(f"{problem} at step {step}; {last}")
        folder = run_dir / (f"_non-finite-step-{step}" + (f"-rank-{rank}" if self.args.world_size > 1 else ""))
        about = {"problem": problem, "step": step, "learning_rate": self._get_learning_rate()}
        is_whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        try:
            keep_step(folder, batches, self.model if is_whole else None, about)
            kept = f"The batch{' and the network are' if is_whole else ' is'} saved in {folder}"
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk: the message is worth more
            kept = f"The batch cannot be saved in {folder}: {first_line(error)}"
        images = ", ".join(images_of(batches))
        raise TrainingError(
            f"{problem} at step {step}{f', images {images}' if images else ''}: {likely_cause(batches, self.model)}. "
            f"{kept}; {last}"
        )

    def _freeze_statistics(self) -> None:
        """Put frozen batch norm layers back into evaluation mode after `model.train()`."""
        if self.args.freeze_batch_norm or self.args.freeze_backbone or self.args.lora_rank is not None:
            root = self.model if self.args.freeze_batch_norm else backbone_of(self.model)
            for module in root.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of matrices and kernels. The parent would also decay the norms of some backbones."""
        vectors = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
        return [name for name in super().get_decay_parameter_names(model) if name not in vectors]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the parent's optimizer, with groups for the learning rates of the head and of the layers."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and (self.args.head_lr_multiplier != 1.0 or self.args.layer_lr_decay != 1.0):
            backbone = backbone_of(self.model if model is None else model)
            scales, groups = layer_scales(backbone, self.args.layer_lr_decay), []
            head = self.args.head_lr_multiplier
            for group in optimizer.param_groups:
                by_scale: dict[tuple[bool, float], list[nn.Parameter]] = {}
                for parameter in group["params"]:
                    is_head = id(parameter) not in scales
                    by_scale.setdefault((is_head, scales.get(id(parameter), head)), []).append(parameter)
                # The first group, whose rate is logged, is the last layer of the backbone.
                for (_, scale), chosen in sorted(by_scale.items(), key=lambda item: (item[0][0], -item[0][1])):
                    groups.append({**group, "params": chosen, "lr": group["lr"] * scale})
            optimizer.param_groups = groups
        return optimizer

    def dry_run(self) -> None:
        """Rehearse a training step and an evaluation, so that errors show before the training. See [`rehearse`].

        Raises:
            InputError: the network cannot be trained or evaluated on these images with these options.
        """
        rehearse(self)

    # ---- Logging ----

    def _record_parts(self, parts: dict[str, Tensor], scale: int) -> None:
        for name, value in parts.items():
            if name == "entropy":
                self._loss_parts["q_entropy"] += value
            else:
                self._loss_parts[f"loss_{name}"] += value * scale
        self._loss_parts["micro_batches"] += 1
        self._loss_parts["steps"] += int(self.accelerator.sync_gradients)  # the last micro-batch of a step

    def _mean_parts(self) -> dict[str, float]:
        """Return the means since the last log line, of losses per optimizer step: they add up over micro-batches."""
        parts, self._loss_parts = dict(self._loss_parts), Counter()
        steps, micro_batches = parts.pop("steps"), parts.pop("micro_batches")
        return {
            name: self.accelerator.reduce(value, "mean").item() / (micro_batches if name == "q_entropy" else steps)
            for name, value in parts.items()
        }

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log scalars, with the parts of the loss beside the training loss."""
        if "loss" in logs and self._loss_parts:
            logs.update(self._mean_parts())
        scalars = {name: nan_to_none(value) for name, value in logs.items() if not isinstance(value, list)}
        super().log(scalars, start_time)
        logs.update({name: scalars[name] for name in scalars.keys() - logs.keys()})

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """Write `{split}_results.json`, with null for undefined metrics, because NaN is not JSON."""
        super().save_metrics(split, nan_to_none(metrics), combined)

    # ---- Evaluation ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the parent's loader. Streams are completed so that all processes score the same number of images."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]
        _refuse_endless(chosen)
        if isinstance(chosen, StreamedDataset):
            chosen.complete_to(self.args.eval_batch_size * self.args.world_size)
        return super().get_eval_dataloader(eval_dataset)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        self.reset_metrics()
        # Since the last step the batch statistics differ between processes. Those of the main process are saved, so
        # they are scored, too.
        for buffer in self.model.buffers():
            broadcast(buffer)
        with merged(self.model):
            return super().evaluation_loop(*args, **kwargs)

    def reset_metrics(self) -> None:
        """Forget the images that were scored."""
        self.metrics.reset()
        self._cross_entropy_sum, self._more_sums = 0.0, []

    def check_for_calibration(self) -> None:
        """Refuse to calibrate a network whose weights are spread over the processes.

        Raises:
            InputError: the training is sharded.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "calibrate needs the whole network in every process, but FSDP and DeepSpeed spread its weights. Train "
                "without it, and use `pals-hf calibrate` afterwards"
            )

    def calibrate(self, eval_dataset: Any = None) -> dict[str, Any]:
        """Calibrate the network by one temperature, which is folded into its classifier.

        Call this after the training, in every process, and save the model afterwards. The predicted classes stay the
        same. See [`temperature`].

        Args:
            eval_dataset: labelled images that the network was not trained on. Default: `self.eval_dataset`.

        Returns:
            The temperature, the metrics of the network as it was, like `eval_uncalibrated_ece`, and the cross-fitted
            ones of the calibrated network, like `eval_calibrated_ece`: see [`Calibration`].

        Raises:
            InputError: the images do not determine a temperature, or the network cannot be calibrated.
        """
        self.check_for_calibration()
        images = self.eval_dataset if eval_dataset is None else eval_dataset
        if not hasattr(images, "__getitem__") or not hasattr(images, "__len__"):
            raise InputError("calibration needs images that can be read by their index, not a stream")
        for buffer in self.model.buffers():
            broadcast(buffer)  # those of the main process are saved
        scorer = Scorer(self.model, self.args.ignore_index, self.args.eval_window, self.args.eval_overlap)
        # One process decides for all: rounding must not give another one a temperature, or an error, of its own.
        result: Any = None
        if self.is_world_process_zero():
            try:
                result = scorer.calibrate(images)
            except InputError as error:
                result = error
        result = broadcast_object_list([result])[0]
        if isinstance(result, InputError):
            raise result
        if result.has_effect:
            fold_temperature(self.model, result.temperature, images[0]["pixel_values"][None].to(self.args.device))
        metrics = result.metrics(self.card_facts.split)
        self._evaluation = {**self._evaluation, **metrics}
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor | tuple[Tensor, ...]]:
        """Score each image of a batch at the size of its own mask.

        Returns:
            None, one int64 count matrix per image `(b, C, C)`, and the summed cross-entropy of each image `(b,)`. With
            `args.eval_calibration` the latter is a tuple with the sums for calibration and boundaries `(b, ...)`.
            Trainer gathers these tensors over processes.
        """
        if "labels" not in inputs:
            raise InputError("evaluation needs labels. For images without labels use pipeline('image-segmentation')")
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
        """Yield logits `(C, h, w)` image by image. Images of different sizes go through the network one at a time."""
        batches = [pixel_values] if isinstance(pixel_values, Tensor) else [image[None] for image in pixel_values]
        for batch in batches:
            refuse_size(self.model.config, part_size(batch, self.args.eval_window), "an image or window")
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
        if pixels and not math.isfinite(self._cross_entropy_sum):
            raise TrainingError(
                f"the logits of the network are not finite after step {self.state.global_step}, so it cannot be "
                "scored. Try a lower learning_rate"
            )
        results = {"loss": self._cross_entropy_sum / pixels if pixels else float("nan"), **self.metrics.compute()}
        if self.args.eval_calibration:
            calibration, boundaries = self._more_sums
            results |= {**calibration_metrics(calibration), **boundary_metrics(boundaries)}
        return results


class _TrainingCallback(TrainerCallback):
    """Tell the training set its epoch, and start a log of its own for every training."""

    def __init__(self, trainer: PALSTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._labels_checked, self.trainer._loss_parts = False, Counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.has_stepped = True

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Accelerate calls set_epoch only with some samplers.
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(int(state.epoch or 0))
