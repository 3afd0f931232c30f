"""A loss of this package on a whole network, and as `compute_loss_func` for a plain `Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .errors import InputError
from .functional import soft_label_cross_entropy
from .losses import LossOutput, SegmentationLoss
from .tap import ClassifierTap, Reading


def network_loss(
    loss: SegmentationLoss, reading: Reading, labels: Tensor, num_items: Tensor | int | None = None
) -> LossOutput:
    """Compute a loss from the reading of a tap, with the cross-entropy of an auxiliary head where there is one."""
    value, parts = loss.compute(reading.logits, labels, reading.features, num_items, resize=reading.resize)
    if reading.auxiliary_logits is None:
        return LossOutput(value, parts)
    auxiliary = soft_label_cross_entropy(
        reading.auxiliary_logits,
        labels,
        ignore_index=loss.ignore_index,
        num_items=num_items,
        class_weights=loss.class_weights,
    )
    return LossOutput(value + reading.auxiliary_weight * auxiliary, {**parts, "auxiliary": auxiliary.detach()})


def compute_loss_func(loss: SegmentationLoss, model: nn.Module) -> Callable[..., Tensor]:
    """Adapt a loss of this package to `Trainer(compute_loss_func=...)`.

    Trainer counts every label other than -100, so its count includes unlabelled pixels with another ignore index. The
    adapter takes these pixels out again. The result is exact if a step is one batch of one process, or if the labels
    mark unlabelled pixels by -100. With gradient accumulation or several processes and another ignore index, the mean
    of each micro-batch is weighted by its number of pixels. [`PALSTrainer`] is exact in all cases.

    Args:
        loss: for example a [`PALSLoss`].
        model: the model given to Trainer. A hook stays on its classifier.

    Raises:
        InputError: the model is not for PALS; or later, in the step, runs in `nn.DataParallel`.

    Example:
        >>> Trainer(model, args, compute_loss_func=compute_loss_func(PALSLoss(), model), ...)
    """
    source = "classifier_input" if loss.affinity is None else loss.affinity.source
    if source == "encoder":
        raise InputError("compute_loss_func cannot read hidden states: use PALSTrainer for affinity source 'encoder'")
    tap = ClassifierTap(model, before_dropout=source == "before_dropout")
    tap.attach()

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        reading = tap.read()
        if reading.logits.shape[0] != labels.shape[0]:
            raise InputError("the model runs in nn.DataParallel, where PALS cannot read it: use `accelerate launch`")
        counted = labels != -100
        labels = labels.masked_fill(~counted, loss.ignore_index)
        if num_items_in_batch is None:
            return network_loss(loss, reading, labels).value
        share = num_items_in_batch / counted.sum().clamp(min=1)
        return network_loss(loss, reading, labels, loss.count(labels) * share).value

    return compute
