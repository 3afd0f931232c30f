"""The rehearsal of a training: a step and an evaluation before time is spent, without a trace."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import EvalPrediction, Trainer

from .data import ID
from .errors import InputError, first_line, is_out_of_memory
from .pretrained import timm_image_size


def rehearse(trainer: Trainer) -> None:
    """Build what a training needs, go through one of its steps, and evaluate one image.

    The step runs forward and backward on a whole batch. If an epoch ends in a smaller batch, that size runs forward,
    too. Weights, statistics, gradients, random numbers and the order of the data are the same afterwards, so that a
    training has the same result with and without a rehearsal.

    Args:
        trainer: a [`PALSTrainer`].

    Raises:
        InputError: the network cannot be trained or evaluated on these images with these options.
    """
    with _without_a_trace(trainer):
        loader = trainer.get_train_dataloader()
        *_, steps = trainer.set_initial_training_values(trainer.args, loader)
        if trainer.optimizer is None and not trainer.is_deepspeed_enabled:
            trainer.create_optimizer()
            trainer.create_scheduler(steps)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # the whole network may not fit on one device
            _compute_loss(trainer, _first_examples(trainer.train_dataset, 1), is_training=False)
            return
        _rehearse_step(trainer, steps)
        _rehearse_evaluation(trainer)


def _rehearse_step(trainer: Trainer, steps: int) -> None:
    size = trainer._train_batch_size
    examples = _first_examples(trainer.train_dataset, size)
    try:
        _compute_loss(trainer, examples, is_training=True)
    except InputError as error:
        if not (trainer.args.auto_find_batch_size and error.__cause__ and is_out_of_memory(error.__cause__)):
            raise
    last = _size_of_last_batch(trainer, steps)
    if 0 < last < len(examples):
        with torch.no_grad():
            _compute_loss(trainer, examples[:last], is_training=True, place=" in the last batch of an epoch")


def _size_of_last_batch(trainer: Trainer, steps: int) -> int:
    """Return the size of the last batch of an epoch if it is smaller than the others and the training gets there."""
    args, dataset = trainer.args, trainer.train_dataset
    # Accelerate fills up the last batch of several processes.
    if isinstance(dataset, IterableDataset) or args.dataloader_drop_last or args.world_size > 1:
        return 0
    is_reached = steps * args.gradient_accumulation_steps * trainer._train_batch_size > len(dataset)
    return len(dataset) % trainer._train_batch_size if is_reached else 0


def _compute_loss(trainer: Trainer, examples: list[Any], is_training: bool, place: str = "") -> None:
    model, device = trainer.model, next(trainer.model.parameters()).device
    batch = trainer.data_collator(examples)
    trainer.check_batch(batch)
    batch = {name: value.to(device) for name, value in batch.items() if name != ID}
    model.train(is_training)
    is_compiled = trainer.args.torch_compile
    network = torch.compile(model, **trainer.accelerator.state.dynamo_plugin.to_kwargs()) if is_compiled else model
    images = f"{len(examples)} training image{'s' if len(examples) > 1 else ''}"
    with _named_input(model, f"{images} of {_size_of(batch)} pixels{place}"):
        with torch.set_grad_enabled(is_training and torch.is_grad_enabled()), trainer.accelerator.autocast():
            loss = trainer.compute_loss(network, batch)
        if loss.requires_grad:
            loss.backward()


def _rehearse_evaluation(trainer: Trainer) -> None:
    if trainer.eval_dataset is None:
        return
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    model, names = trainer.model.eval(), set()
    for prefix, dataset in sets.items():
        for example in _extreme_examples(dataset):
            batch = trainer.data_collator([example])
            with (
                _named_input(model, f"a validation image of {_size_of(batch)} pixels"),
                trainer.accelerator.autocast(),
            ):
                _, counts, sums = trainer.prediction_step(model, batch, prediction_loss_only=False)
        trainer.reset_metrics()
        metrics = trainer.compute_metrics(EvalPrediction(counts, sums), compute_result=True)
        trainer.reset_metrics()
        names |= {f"{prefix}_{name}".strip("_") for name, value in metrics.items() if isinstance(value, float | int)}
    best, is_needed = trainer.args.metric_for_best_model, trainer.args.eval_strategy != "no"
    if is_needed and best is not None and best.removeprefix("eval_") not in names:
        raise InputError(f"metric_for_best_model must be one of {', '.join(sorted(names))}, got {best}")


def _first_examples(dataset: Any, count: int, kind: str = "training") -> list[Any]:
    if isinstance(dataset, IterableDataset):
        examples = list(islice(iter(dataset), count))
    else:
        examples = [dataset[index] for index in range(min(count, len(dataset)))]
    if not examples:
        raise InputError(f"the {kind} data set is empty")
    return examples


def _extreme_examples(dataset: Any) -> list[Any]:
    """Return the largest and the smallest image of a validation set, or the first if their sizes are not known."""
    images = getattr(dataset, "dataset", None)
    if "class_pixels" not in (getattr(images, "column_names", None) or ()) or not len(images) == len(dataset) > 0:
        return _first_examples(dataset, 1, "validation")
    pixels = [sum(row) for row in images.with_format(None)["class_pixels"]]
    return [dataset[index] for index in sorted({pixels.index(max(pixels)), pixels.index(min(pixels))})]


def _size_of(batch: dict[str, Any]) -> str:
    height, width = batch["pixel_values"][0].shape[-2:]
    return f"{height}x{width}"


@contextmanager
def _named_input(model: nn.Module, what: str) -> Iterator[None]:
    """Turn what a network raises into one line that names its input and the remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        problem = f"{type(model).__name__} fails on {what}: {first_line(error).rstrip('.')}"
        raise InputError(f"{problem}. {_remedy(error, model)}") from error


def _remedy(error: Exception, model: nn.Module) -> str:
    if is_out_of_memory(error):
        return (
            "Use a smaller --per_device_train_batch_size with more --gradient_accumulation_steps, a smaller "
            "--crop_size, --bf16 True, or --eval_window for large validation images"
        )
    if "more than 1 value per channel" in str(error):  # batch norm behind a global pooling
        return (
            "Batch norm needs a second image there: use another --per_device_train_batch_size, --dataloader_drop_last "
            "True to skip incomplete batches, or --freeze_batch_norm True"
        )
    backbone = getattr(model.config, "backbone_config", None)
    if getattr(backbone, "model_type", "") == "timm_backbone":
        height, width = timm_image_size(backbone.backbone)
        return (
            f"The backbone was trained on images of {height}x{width} pixels, and may take no others: try --image_size "
            f"{height} {width}, and the same --crop_size"
        )
    for name, advice in (
        ("image_size", "The network is made for images of {0}x{1} pixels: try --image_size {0} {1}"),
        ("patch_size", "The network has patches of {0}x{1} pixels: try an --image_size of multiples of them"),
    ):
        for config in (backbone, model.config):
            size = getattr(config, name, None)
            if isinstance(size, int | list | tuple):
                height, width = (size, size) if isinstance(size, int) else size
                return f"{advice.format(height, width)}, and the same --crop_size"
    return "Try another --image_size or --crop_size"


@contextmanager
def _without_a_trace(trainer: Trainer) -> Iterator[None]:
    """Restore the network, the trainer and the random numbers at the end."""
    model, accelerator = trainer.model, trainer.accelerator
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    names = ("optimizer", "lr_scheduler", "_created_lr_scheduler", "_loss_parts", "_micro_batches")
    attributes = {name: getattr(trainer, name) for name in names}
    loaders, states = len(accelerator._dataloaders), (random.getstate(), np.random.get_state())
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    for parameter, _ in gradients:
        parameter.grad = None
    trainer._loss_parts = Counter()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        del accelerator._dataloaders[loaders:]
        for name, value in attributes.items():
            setattr(trainer, name, value)
        for module, name, buffer, content in buffers:
            with torch.no_grad():
                module._buffers[name] = buffer.copy_(content)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode
