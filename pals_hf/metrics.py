"""Streaming metrics for semantic segmentation, all computed from one C x C confusion matrix.

Memory does not grow with the number of images, and the matrices of several processes can be added.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import evaluate


def confusion_matrix(predictions: Tensor, labels: Tensor, num_labels: int, ignore_index: int = 255) -> Tensor:
    """Count the pixels of each (label, prediction) pair.

    Args:
        predictions: integer classes 0 to C - 1, any shape.
        labels: integer classes 0 to C - 1 or `ignore_index`, the same shape.
        num_labels: the number of classes C.
        ignore_index: label of unlabelled pixels, which are not counted.

    Returns:
        `(C, C)`, int64, on the device of the inputs. Rows are labels, and columns are predictions.

    Raises:
        ValueError: the shapes differ, or a value is not a class.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 255]), num_labels=2).tolist()
        [[1, 1], [0, 0]]
    """
    if predictions.shape != labels.shape:
        raise ValueError(
            f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} must have the same shape"
        )
    valid = labels != ignore_index
    labels, predictions = labels[valid].long(), predictions[valid].long()
    for name, values in (("labels", labels), ("predictions", predictions)):
        if values.numel() and ((values < 0) | (values >= num_labels)).any():
            found = f"{int(values.min())} to {int(values.max())}"
            raise ValueError(f"{name} must be in 0..{num_labels - 1}, but the values are from {found}")
    return torch.bincount(labels * num_labels + predictions, minlength=num_labels**2).view(num_labels, num_labels)


class SegmentationMetrics:
    """Mean IoU and accuracies over a whole data set, updated batch by batch.

    With `n` the confusion matrix of all images (rows are labels, columns are predictions):

    - `per_category_iou[c] = n_cc / (sum_k n_ck + sum_k n_kc - n_cc)`; NaN if class c is neither labelled nor predicted
      in any image
    - `per_category_accuracy[c] = n_cc / sum_k n_ck`; NaN if class c is not labelled in any image
    - `mean_iou`, `mean_accuracy`: their means over the classes that are not NaN
    - `overall_accuracy = sum_c n_cc / sum n`

    The names are those of the `mean_iou` metric of `evaluate`. All values are between 0 and 1.

    Args:
        num_labels: the number of classes C.
        ignore_index: label of unlabelled pixels, which are not counted.

    Raises:
        ValueError: there are fewer than two classes.

    Example:
        >>> metrics = SegmentationMetrics(num_labels=3)
        >>> metrics.update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
        >>> metrics.compute()["per_category_iou"]
        [0.5, 0.0, nan]
    """

    def __init__(self, num_labels: int, ignore_index: int = 255):
        if num_labels < 2:
            raise ValueError(f"num_labels must be at least 2, got {num_labels}")
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Set all counts to 0."""
        self.counts = torch.zeros(self.num_labels, self.num_labels, dtype=torch.int64)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count the pixels of two integer tensors of the same shape, on any device."""
        self.add_counts(confusion_matrix(predictions, labels, self.num_labels, self.ignore_index))

    def add_counts(self, counts: Tensor) -> None:
        """Add confusion matrices `(C, C)` or `(..., C, C)`, for example those of other processes."""
        self.counts += counts.reshape(-1, self.num_labels, self.num_labels).sum(dim=0).cpu()

    def compute(self) -> dict[str, float | list[float]]:
        """Return the metrics of all counted pixels as Python floats and lists of floats."""
        counts = self.counts.double()
        correct, labelled, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
        iou = correct / (labelled + predicted - correct)  # 0 / 0 gives the documented NaN
        accuracy = correct / labelled
        return {
            "mean_iou": iou.nanmean().item(),
            "mean_accuracy": accuracy.nanmean().item(),
            "overall_accuracy": (correct.sum() / counts.sum()).item(),
            "per_category_iou": iou.tolist(),
            "per_category_accuracy": accuracy.tolist(),
        }


def nan_to_none(value: Any) -> Any:
    """Replace NaN by None in nested dicts and lists, because JSON has null but no NaN."""
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def evaluate_metric(num_labels: int, ignore_index: int = 255) -> evaluate.Metric:
    """Return [`SegmentationMetrics`] as an `evaluate.Metric`, with its methods `add`, `add_batch` and `compute`.

    The metric needs no download and writes no Arrow files. Images are counted at once, and may differ in size.

    Args:
        num_labels: the number of classes C.
        ignore_index: label of unlabelled pixels, which are not counted.

    Example:
        >>> metric = evaluate_metric(num_labels=2)
        >>> metric.compute(predictions=[[[0, 1]]], references=[[[0, 255]]])["mean_iou"]
        1.0
    """
    import datasets
    import evaluate

    class PixelMetrics(evaluate.Metric):
        """Streaming mean IoU, mean accuracy and overall accuracy."""

        def _info(self) -> evaluate.MetricInfo:
            image = datasets.Sequence(datasets.Sequence(datasets.Value("uint16")))
            return evaluate.MetricInfo(
                description="Mean IoU, mean accuracy and overall accuracy from one confusion matrix.",
                citation="",
                inputs_description="\n\npredictions, references: lists of (H, W) integer maps.",
                features=datasets.Features({"predictions": image, "references": image}),
            )

        def add(self, *, prediction=None, reference=None, **kwargs):
            """Count one image."""
            streamed.update(torch.as_tensor(prediction), torch.as_tensor(reference))

        def add_batch(self, *, predictions=None, references=None, **kwargs):
            """Count a batch of images."""
            for prediction, reference in zip(predictions, references, strict=True):
                self.add(prediction=prediction, reference=reference)

        def compute(self, *, predictions=None, references=None, **kwargs):
            """Count the given images, if any, return the metrics of all counted images, and reset the counts."""
            if predictions is not None:
                self.add_batch(predictions=predictions, references=references)
            results = streamed.compute()
            streamed.reset()
            return results

    streamed = SegmentationMetrics(num_labels, ignore_index)
    return PixelMetrics()
