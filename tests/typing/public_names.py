"""The public names as a user writes them. `mypy` checks this file; it is not run."""

from collections.abc import Callable
from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

import pals_hf
from pals_hf import (
    Affinity,
    PALSConfig,
    PALSLoss,
    PALSTrainer,
    SegmentationMetrics,
    compute_loss_func,
    load_segmentation_dataset,
    train_fraction,
)
from pals_hf.data import SegmentationData
from pals_hf.functional import aggregate_probabilities, soft_label_cross_entropy, upsample, upsample_argmax
from pals_hf.losses import (
    PRESETS,
    CrossEntropyLoss,
    FocalLoss,
    LabelSmoothingLoss,
    LossOutput,
    MarginLoss,
    SegmentationLoss,
)

version: str = pals_hf.__version__
logits, labels = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 16, 16))


def losses() -> None:
    affinity = Affinity(tau=0.1, keys=None, pairs="same_class")
    assert_type(affinity.replace({"steps": 2}), Affinity)
    loss = PALSLoss(0.5, affinity, adaptive_beta=False, class_weights=[1.0, 2.0, 0.5])
    assert_type(loss(logits, labels), Tensor)
    assert_type(loss.compute(logits, labels, beta=0.1), LossOutput)
    assert_type(loss.compute(logits, labels).parts["entropy"], Tensor)
    assert_type(loss.class_weights, Tensor | None)
    assert_type(loss.count(labels), Tensor)
    others: list[SegmentationLoss] = [
        CrossEntropyLoss(),
        LabelSmoothingLoss(0.1),
        FocalLoss(3.0),
        MarginLoss(10.0),
        PALSLoss(**PRESETS["paper"]),
    ]
    assert_type(others[0](logits, labels), Tensor)


def maths() -> None:
    q = aggregate_probabilities(logits, logits.softmax(dim=1), Affinity())
    assert_type(q, Tensor)
    assert_type(upsample(q, labels.shape[1:]), Tensor)
    assert_type(upsample_argmax(logits, (16, 16)), Tensor)
    assert_type(soft_label_cross_entropy(logits, labels, q, beta=0.5), Tensor)
    assert_type(soft_label_cross_entropy(logits, labels, return_parts=True), tuple[Tensor, dict[str, Tensor]])


def metrics() -> None:
    counts = SegmentationMetrics(num_labels=3)
    counts.update(logits.argmax(dim=1), labels)
    assert_type(counts.compute(), dict[str, float | list[float]])


def training(model: nn.Module) -> None:
    data = load_segmentation_dataset(dataset_dir=Path("camvid"), void_labels=[11], id2label={0: "sky", 1: "road"})
    assert_type(data, SegmentationData)
    id2label: dict[int, str] = data.id2label
    config = PALSConfig("runs/mine", loss="pals", beta=0.3)
    trainer: PALSTrainer = PALSTrainer(model, config, train_dataset=train_fraction(data.train, 0.1, seed=1))
    for_plain_trainer: Callable[..., Tensor] = compute_loss_func(PALSLoss(), model)
    print(id2label, trainer, for_plain_trainer)
