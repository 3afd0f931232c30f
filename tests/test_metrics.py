import json
import math

import numpy as np
import pytest
import torch

from pals_hf import SegmentationMetrics
from pals_hf.metrics import confusion_matrix, evaluate_metric, nan_to_none


def by_hand(predictions, labels, num_labels, ignore_index=255):
    """Sets of pixels, class by class."""
    keep = labels != ignore_index
    predictions, labels = predictions[keep], labels[keep]
    iou, accuracy = [], []
    for label in range(num_labels):
        both = int(((predictions == label) & (labels == label)).sum())
        either = int(((predictions == label) | (labels == label)).sum())
        labelled = int((labels == label).sum())
        iou.append(both / either if either else math.nan)
        accuracy.append(both / labelled if labelled else math.nan)
    return {
        "mean_iou": float(np.nanmean(iou)),
        "mean_accuracy": float(np.nanmean(accuracy)),
        "overall_accuracy": float((predictions == labels).float().mean()),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


def flat(results):
    """pytest.approx takes no nested dicts."""
    return {name: torch.tensor(value, dtype=torch.float64).reshape(-1).tolist() for name, value in results.items()}


def assert_same(results, expected):
    assert results.keys() == expected.keys()
    for name, values in flat(expected).items():
        assert flat(results)[name] == pytest.approx(values, nan_ok=True), name


@pytest.fixture
def pixels():
    predictions, labels = torch.randint(0, 4, (6, 9, 7)), torch.randint(0, 4, (6, 9, 7))
    labels[labels == 2] = 1  # class 2 is predicted, never labelled
    labels[torch.rand(labels.shape) < 0.2] = 255
    return predictions, labels


@pytest.mark.parametrize("num_labels", [4, 6])  # of six, two are nowhere
def test_equals_sets_of_pixels(pixels, num_labels):
    metrics = SegmentationMetrics(num_labels)
    for predictions, labels in zip(*pixels, strict=True):
        metrics.update(predictions, labels)
    assert_same(metrics.compute(), by_hand(*pixels, num_labels))


def test_absent_classes_are_nan_and_null_in_json():
    metrics = SegmentationMetrics(3)
    metrics.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    results = metrics.compute()
    assert math.isnan(results["per_category_iou"][2])
    assert math.isnan(results["per_category_accuracy"][1])  # predicted, not labelled: IoU 0, accuracy undefined
    assert results["per_category_iou"][1] == 0
    assert results["mean_iou"] == 0.25
    restored = json.loads(json.dumps(nan_to_none(results), allow_nan=False))
    assert restored["per_category_iou"] == [0.5, 0.0, None]


def test_state_adds_up_and_resets(pixels):
    whole, parts = SegmentationMetrics(4), SegmentationMetrics(4)
    whole.update(*pixels)
    parts.add_counts(torch.stack([confusion_matrix(p, y, 4) for p, y in zip(*pixels, strict=True)]))
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts.sum() == (pixels[1] != 255).sum()
    parts.reset()
    assert parts.counts.sum() == 0
    assert math.isnan(parts.compute()["mean_iou"])


def test_void_predictions_do_not_matter(pixels):
    predictions, labels = pixels
    changed = torch.where(labels == 255, 3 - predictions, predictions)
    assert torch.equal(confusion_matrix(predictions, labels, 4), confusion_matrix(changed, labels, 4))


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 1], [0], "same shape"),
        ([0, 1], [0, 4], "labels must be in 0..3, but the values are from 0 to 4"),
        ([0, 1], [0, -1], "labels must be in"),
        ([0, 4], [0, 1], "predictions must be in"),
    ],
)
def test_refuses(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(predictions), torch.tensor(labels), 4)


def test_refuses_one_class():
    with pytest.raises(ValueError, match="at least 2"):
        SegmentationMetrics(1)


def test_evaluate_metric(pixels, tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate")
    metric = evaluate_metric(4)
    assert isinstance(metric, evaluate.Metric)
    predictions, labels = pixels
    metric.add_batch(predictions=predictions[:3].numpy(), references=labels[:3].numpy())
    metric.add(prediction=predictions[3], reference=labels[3])
    results = metric.compute(predictions=predictions[4:].tolist(), references=labels[4:].tolist())
    assert_same(results, by_hand(*pixels, 4))
    # Computing starts anew.
    again = metric.compute(predictions=predictions[:1], references=labels[:1])
    assert_same(again, by_hand(predictions[:1], labels[:1], 4))


def test_evaluate_metric_takes_images_of_different_sizes():
    metric = evaluate_metric(2)
    results = metric.compute(predictions=[[[0, 1]], [[1], [1]]], references=[[[0, 1]], [[1], [255]]])
    assert results["mean_iou"] == 1.0
