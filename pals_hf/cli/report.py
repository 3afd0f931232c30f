"""The end of a run: its results as files, pictures and a table."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image, fromarray
from transformers.utils import is_matplotlib_available

from ..data import SegmentationData, SegmentationStream, StreamedDataset, TransformedDataset
from ..data.checking import read_pair
from ..inference import load_for_inference, predict
from ..models import refuse_other_classes
from ..trainer import PALSTrainer
from ..visualize import prediction_sheet, reliability_diagram, training_curves

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor, PreTrainedModel

SKIPPED = "skipped_samples.json"
NUM_PICTURES = 6  # rows of predictions.png


def report(
    trainer: PALSTrainer, data: SegmentationData | SegmentationStream, metrics: dict[str, Any], checkpoint: str
) -> None:
    """Write the results and print them. The pictures show the checkpoint as others will load it."""
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    model, processor = load_finished(checkpoint, data.id2label, trainer.args.device)
    window = trainer.args.eval_window, trainer.args.eval_overlap  # as it was scored
    rows = [
        (image, labels, predict(model, processor, [image], *window)[0].mask)
        for image, labels in some_pairs(data, trainer.eval_dataset)
    ]
    prediction_sheet(rows, data.id2label, folder / "predictions.png", data.colors)
    draw_reliability(metrics, folder)
    if trainer.state.global_step:
        if is_matplotlib_available():
            training_curves(trainer.state.log_history, folder / "curves.png")
        trainer.create_model_card()
    trainer.save_metrics("eval", metrics)  # the last file: with it, the run is finished
    print_table(metrics, data)
    print_calibration(metrics)
    print(f"\nresults, checkpoint and pictures: {folder}")


def load_finished(
    checkpoint: str, id2label: dict[int, str], device: str | torch.device | None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a trained model as `from_pretrained` gives it to its users, with its outputs in the order of the classes.

    Raises:
        InputError: the model cannot be loaded, or predicts other classes.
    """
    model, processor = load_for_inference(checkpoint, device)
    refuse_other_classes(checkpoint, model, id2label)
    return model, processor


def some_pairs(
    data: SegmentationData | SegmentationStream, scored: TransformedDataset | StreamedDataset
) -> list[tuple[Image, Image]]:
    """Return the first validation images and their masks."""
    if isinstance(scored, StreamedDataset):
        real = (pending.row for pending in scored if not pending.is_filler)
        read = (read_pair(row, data.classes) for row in itertools.islice(real, NUM_PICTURES))
        return [(pair.image, fromarray(pair.labels)) for pair in read]
    examples = data.validation.select(range(min(NUM_PICTURES, len(data.validation))))
    return [(row["image"], row["labels"]) for row in examples]


def print_table(metrics: dict[str, Any], data: SegmentationData | SegmentationStream) -> None:
    print(f"\n{summary_of(data)}")
    print(f"{'class':<20}{'IoU':>8}{'accuracy':>10}")
    for index, name in data.id2label.items():
        iou, accuracy = (metrics[f"eval_per_category_{kind}"][index] for kind in ("iou", "accuracy"))
        print(f"{name:<20}{iou:>8.3f}{accuracy:>10.3f}")
    print(f"{'mean':<20}{metrics['eval_mean_iou']:>8.3f}{metrics['eval_mean_accuracy']:>10.3f}")
    print(f"{'all pixels':<28}{metrics['eval_overall_accuracy']:>10.3f}")


def draw_reliability(metrics: dict[str, Any], folder: Path) -> None:
    """Draw the reliability of a network, if it was measured: before and after calibration, or as it is."""
    kinds = {"before": "eval_uncalibrated_reliability", "calibrated": "eval_calibrated_reliability"}
    if "eval_temperature" not in metrics:
        kinds = {"this network": "eval_reliability"}
    networks = {kind: metrics[name] for kind, name in kinds.items() if name in metrics}
    if networks and is_matplotlib_available():
        reliability_diagram(networks, folder / "reliability.png")


def print_calibration(metrics: dict[str, Any]) -> None:
    """Print what a temperature has done, and how far users may trust a confident pixel."""
    if "eval_temperature" not in metrics:
        return
    print(
        f"\ncalibrated by the temperature {metrics['eval_temperature']:.3f}, which was fitted to "
        f"{metrics['eval_calibration_images']} images ({metrics['eval_calibration_split']}), and cross-fitted here:"
    )
    print(f"{'network':<20}{'ECE':>8}{'classwise':>11}{'NLL':>8}{'Brier':>8}")
    for kind, prefix in (("before", "eval_uncalibrated_"), ("calibrated", "eval_calibrated_")):
        ece, classwise, nll, brier = (metrics[prefix + name] for name in ("ece", "classwise_ece", "loss", "brier"))
        print(f"{kind:<20}{ece:>8.4f}{classwise:>11.4f}{nll:>8.4f}{brier:>8.4f}")
    print(f"\n{'confidence':<20}{'pixels':>8}{'right':>8}")
    for threshold, share, accuracy in metrics["eval_calibrated_confident_pixels"]:
        right = "" if accuracy is None else f"{accuracy:.1%}"
        print(f"at least {threshold:<11.0%}{share:>8.1%}{right:>8}")


def summary_of(data: SegmentationData | SegmentationStream) -> str:
    if isinstance(data, SegmentationStream):
        return f"{data.name}, streamed"
    skipped = f", {len(data.skipped)} skipped (see {SKIPPED})" if data.skipped else ""
    return f"{data.name}: {len(data.train)} training images, {len(data.validation)} validation images{skipped}"
