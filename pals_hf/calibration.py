"""Streaming metrics of calibration and of contours. Like those of [`metrics`], they are sums over images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional.fused import is_labelled, tiles, widest_float

NUM_BINS = 15
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)  # of confidence, from which on users may trust a pixel
BOUNDARY_SHARE = 0.02  # width of the contour region as a share of the image diagonal


def calibration_sums(logits: Tensor, labels: Tensor, ignore_index: int = 255, num_bins: int = NUM_BINS) -> Tensor:
    """Sum probabilities and hits of the labelled pixels by bin, for [`calibration_metrics`].

    Probabilities are `softmax(up(z))`, upsampled tile by tile as in [`soft_label_cross_entropy`]. Bin b contains the
    probabilities in `[b / num_bins, (b + 1) / num_bins)`, and the last bin also 1.

    Args:
        logits: `(B, C, h, w)`.
        labels: `(B, H, W)`, int64: classes, `ignore_index` or [`PADDING_INDEX`].
        ignore_index: label of unlabelled pixels, which are not counted.
        num_bins: number of bins of equal width.

    Returns:
        `(C + 3, num_bins, 3)` of [`widest_float`]. Row c < C: for each bin of the probability of class c, the number
        of pixels, the sum of the probabilities, and the number of pixels labelled c. Row C: the same for the most
        likely class. Row C + 1: the same for the pixels whose most likely class has at least the probability
        `THRESHOLDS[k]`, at entry k. Row C + 2: the first entry is the sum of the Brier scores of all pixels. The rest
        is 0.
    """
    z, classes = logits.float(), logits.shape[1]
    dtype = widest_float(logits.device)
    sums = torch.zeros(classes + 3, num_bins, 3, dtype=dtype, device=logits.device)
    thresholds = torch.tensor(THRESHOLDS, dtype=dtype, device=logits.device)
    offsets = torch.arange(classes, device=logits.device)[:, None] * num_bins
    for tile in tiles(z, labels):
        labelled = is_labelled(tile.labels, ignore_index)
        p = tile.up(z).softmax(dim=1).movedim(1, 0)[:, labelled].to(dtype)  # (C, n)
        y = tile.labels[labelled]
        bins = (p * num_bins).long().clamp_(max=num_bins - 1)
        hits = y * num_bins + bins.gather(0, y[None])[0]
        sums[:classes] += _by_bin((bins + offsets).flatten(), p.flatten(), hits, classes, num_bins)
        confidence, prediction = p.max(dim=0)
        best = bins.gather(0, prediction[None])[0]
        is_right = prediction == y
        sums[classes] += _by_bin(best, confidence, best[is_right], 1, num_bins)[0]
        reached = torch.bucketize(confidence, thresholds, right=True)  # how many of them
        by_reached = _by_bin(reached, confidence, reached[is_right], 1, len(THRESHOLDS) + 1)[0]
        sums[classes + 1, : len(THRESHOLDS)] += by_reached.flip(0).cumsum(0).flip(0)[1:]
        sums[classes + 2, 0, 0] += (p * p).sum() - 2 * p.gather(0, y[None]).sum() + len(y)
    return sums


def _by_bin(bins: Tensor, probabilities: Tensor, hits: Tensor, rows: int, num_bins: int) -> Tensor:
    """Return counts, sums of probabilities and hits `(rows, num_bins, 3)`. Bins are indices of the flattened table."""
    size = rows * num_bins
    columns = (
        torch.bincount(bins, minlength=size),
        torch.bincount(bins, probabilities, minlength=size),
        torch.bincount(hits, minlength=size),
    )
    return torch.stack([column.to(probabilities.dtype) for column in columns], dim=1).view(rows, -1, 3)


def calibration_metrics(sums: Tensor) -> dict[str, Any]:
    """Compute calibration metrics from the total of [`calibration_sums`].

    With n pixels, of which `n_b` are in bin b, with mean probability `p_b` and accuracy `h_b`:

    - `ece`: `sum_b n_b / n |h_b - p_b|` of the most likely class (Guo et al. On Calibration of Modern Neural Networks.
      ICML 2017)
    - `classwise_ece`: the same for the probability of each class, averaged over classes (Kull et al. Beyond
      Temperature Scaling. NeurIPS 2019)
    - `brier`: the mean over pixels of `sum_c (p_c - y_c)^2`, 0 to 2
    - `reliability`: for each bin of `ece` its share of the pixels, `p_b` and `h_b`, which are None for empty bins
    - `confident_pixels`: for each of [`THRESHOLDS`] the threshold, the share of the pixels whose most likely class has
      at least this probability, and their accuracy, which is None without such a pixel

    Without a labelled pixel the first three are NaN.
    """
    sums = sums.cpu().double()
    *_, confidence, certain, (brier, *_) = sums
    pixels = confidence[:, 0].sum()
    gaps = (sums[:-2, :, 1] - sums[:-2, :, 2]).abs().sum(dim=1) / pixels
    reliability = [
        [float(n / pixels), float(p / n), float(hits / n)] if n > 0 else [0.0, None, None] for n, p, hits in confidence
    ]
    confident = [
        [threshold, float(n / pixels), float(hits / n) if n > 0 else None]
        for threshold, (n, _, hits) in zip(THRESHOLDS, certain, strict=False)
    ]
    return {
        "ece": gaps[-1].item(),
        "classwise_ece": gaps[:-1].mean().item(),
        "brier": (brier[0] / pixels).item(),
        "reliability": reliability,
        "confident_pixels": confident,
    }


def boundary_counts(predictions: Tensor, labels: Tensor, num_labels: int, ignore_index: int = 255) -> Tensor:
    """Count the pixels of each class near its contours: the intersection and the union of prediction and label.

    The contour region of a class contains its pixels whose distance to a pixel of another class, or to the outside of
    the image, is at most d in the maximum norm. d is 2 % of the image diagonal, and at least one pixel.

    Args:
        predictions, labels: `(H, W)`, int64. Unlabelled pixels have no class in either, so their edge is a contour.
        num_labels: the number of classes C.
        ignore_index: label of unlabelled pixels.

    Returns:
        `(C, 2)`, int64: intersection and union.
    """
    height, width = labels.shape
    distance = max(1, round(BOUNDARY_SHARE * (height**2 + width**2) ** 0.5))
    valid = is_labelled(labels, ignore_index)
    counts = []
    for label in range(num_labels):
        truth, predicted = (_contour((maps == label) & valid, distance) for maps in (labels, predictions))
        counts.append(torch.stack([(truth & predicted).sum(), (truth | predicted).sum()]))
    return torch.stack(counts)


def _contour(mask: Tensor, distance: int) -> Tensor:
    outside = F.pad((~mask).float()[None, None], (distance,) * 4, value=1.0)
    near_outside = F.max_pool2d(F.max_pool2d(outside, (2 * distance + 1, 1), 1), (1, 2 * distance + 1), 1)
    return mask & (near_outside[0, 0] > 0)


def boundary_metrics(counts: Tensor) -> dict[str, Any]:
    """Compute the boundary IoU (Cheng et al. CVPR 2021) from the total of [`boundary_counts`].

    `per_category_boundary_iou` is NaN for classes without a contour, and `mean_boundary_iou` skips these classes.
    """
    counts = counts.cpu().double()
    iou = counts[:, 0] / counts[:, 1]
    return {"mean_boundary_iou": iou.nanmean().item(), "per_category_boundary_iou": iou.tolist()}
