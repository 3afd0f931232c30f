import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_segformer
from torch.utils.data import Dataset

from pals_hf import PALSConfig, PALSTrainer
from pals_hf.calibration import boundary_counts, boundary_metrics, calibration_metrics, calibration_sums


def batch(size=(37, 45)):
    labels = torch.randint(0, 4, (2, *size))
    labels[:, :5] = 255
    return 3 * torch.randn(2, 4, 9, 12), labels


def probabilities(logits, labels):
    """Of the labelled pixels, `(n, C)`, and their labels."""
    up = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    labelled = labels != 255
    return up.softmax(dim=1).movedim(1, -1)[labelled].double().numpy(), labels[labelled].numpy()


def reference_ece(confidence, hits, num_bins=15):
    total = 0.0
    for b in range(num_bins):
        inside = np.minimum((confidence * num_bins).astype(int), num_bins - 1) == b
        if inside.any():
            total += inside.mean() * abs(hits[inside].mean() - confidence[inside].mean())
    return total


def test_against_a_plain_reference():
    logits, labels = batch()
    p, y = probabilities(logits, labels)
    metrics = calibration_metrics(calibration_sums(logits, labels))
    # A probability on the edge of a bin may fall to either side by rounding, hence the tolerance.
    assert metrics["ece"] == pytest.approx(reference_ece(p.max(axis=1), p.argmax(axis=1) == y), abs=1e-4)
    classwise = [reference_ece(p[:, c], y == c) for c in range(4)]
    assert metrics["classwise_ece"] == pytest.approx(np.mean(classwise), abs=1e-4)
    assert metrics["brier"] == pytest.approx(((p - np.eye(4)[y]) ** 2).sum(axis=1).mean(), rel=1e-5)
    shares = [share for share, *_ in metrics["reliability"]]
    assert sum(shares) == pytest.approx(1.0)


def test_on_a_device_without_float64(monkeypatch):
    logits, labels = batch()
    there = calibration_sums(logits, labels)
    monkeypatch.setattr("pals_hf.calibration.widest_float", lambda device: torch.float32)
    here = calibration_sums(logits, labels)
    assert here.dtype == torch.float32
    torch.testing.assert_close(here.double(), there, rtol=1e-4, atol=1.5)  # on the edge of a bin a pixel may turn


def test_a_calibrated_and_an_overconfident_network():
    """Of pixels that all get 0.8, 80 % are right; then all get 1."""
    labels = (torch.arange(1000) % 5 == 0).long().view(1, 20, 50)
    logits = torch.tensor([math.log(4.0), 0.0]).view(1, 2, 1, 1).expand(1, 2, 20, 50)
    calibrated = calibration_metrics(calibration_sums(logits, labels))
    assert calibrated["ece"] == pytest.approx(0, abs=1e-6)
    assert calibrated["brier"] == pytest.approx(2 * 0.8 * 0.2, rel=1e-6)
    sure = calibration_metrics(calibration_sums(100 * logits, labels))
    assert sure["ece"] == pytest.approx(0.2, rel=1e-6)
    assert sure["reliability"][-1] == pytest.approx([1.0, 1.0, 0.8])
    assert sure["reliability"][0] == [0.0, None, None]


def test_images_add_up_and_void_is_left_out():
    logits, labels = batch()
    parts = [calibration_sums(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(sum(parts), calibration_sums(logits, labels))
    assert calibration_sums(logits, torch.full_like(labels, 255)).abs().sum() == 0
    assert math.isnan(calibration_metrics(calibration_sums(logits, torch.full_like(labels, 255)))["ece"])


class TestBoundary:
    def square(self, top, left, side=40, size=(100, 100)):
        mask = torch.zeros(size, dtype=torch.int64)
        mask[top : top + side, left : left + side] = 1
        return mask

    def test_width(self):
        """2 % of the diagonal of 100 x 100 is 3 pixels: a frame inside the square."""
        mask = self.square(30, 30)
        counts = boundary_counts(mask, mask, 2)
        assert counts[1].tolist() == [40**2 - 34**2] * 2
        around = 46**2 - 40**2  # the background's side of the contour, and the edge of the image
        assert counts[0].tolist() == [around + 100**2 - 94**2] * 2
        assert boundary_metrics(counts)["mean_boundary_iou"] == 1

    def test_a_shift_costs_more_than_in_plain_iou(self):
        mask, moved = self.square(30, 30), self.square(30, 32)
        inside, either = boundary_counts(moved, mask, 2)[1].tolist()
        assert inside / either < 0.6 < (mask & moved).sum() / (mask | moved).sum()

    def test_classes_that_are_nowhere(self):
        mask = self.square(30, 30)
        metrics = boundary_metrics(boundary_counts(mask, mask, 3))
        assert math.isnan(metrics["per_category_boundary_iou"][2])
        assert metrics["mean_boundary_iou"] == 1

    def test_void_is_left_out(self):
        mask = self.square(30, 30)
        mask[:, :50] = 255
        prediction = self.square(30, 30)
        same, other = (boundary_counts(p, mask, 2) for p in (prediction, prediction.masked_fill(mask == 255, 1)))
        assert torch.equal(same, other)
        assert same[1, 0] == same[1, 1]


class Pictures(Dataset):
    """Three images of two sizes."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        size = (32, 48 + 16 * (index % 2))
        labels = torch.randint(0, 4, size, generator=generator)
        labels[:4] = 255
        return {"pixel_values": torch.randn(3, *size, generator=generator), "labels": labels}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_trainer_gives_them_on_request(tmp_path, batch_size):
    model, pictures = tiny_segformer(), Pictures()
    common = {"use_cpu": True, "report_to": "none", "per_device_eval_batch_size": batch_size}
    plain = PALSTrainer(model, PALSConfig(str(tmp_path), **common), eval_dataset=pictures).evaluate()
    assert "eval_ece" not in plain
    trainer = PALSTrainer(model, PALSConfig(str(tmp_path), eval_calibration=True, **common), eval_dataset=pictures)
    results = trainer.evaluate()
    assert all(results[name] == value for name, value in plain.items() if name.endswith(("iou", "accuracy", "loss")))
    sums, edges = 0, 0
    model.eval()
    for picture in (pictures[index] for index in range(len(pictures))):
        with torch.no_grad():
            logits = model(picture["pixel_values"][None]).logits
        sums = sums + calibration_sums(logits, picture["labels"][None])
        prediction = F.interpolate(logits, size=picture["labels"].shape, mode="bilinear").argmax(dim=1)[0]
        edges = edges + boundary_counts(prediction, picture["labels"], 4)
    expected = {**calibration_metrics(sums), **boundary_metrics(edges)}
    for name in ("ece", "classwise_ece", "brier", "mean_boundary_iou"):
        assert results[f"eval_{name}"] == pytest.approx(expected[name])
    assert trainer.evaluate()["eval_ece"] == results["eval_ece"]  # sums start anew
