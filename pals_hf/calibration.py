"""How far probabilities can be trusted, and how good contours are: streaming, like [`metrics`]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import is_labelled, tiles, widest_float

NUM_BINS = 15
BOUNDARY_SHARE = 0.02  # width of the contour, in diagonals of the image


def calibration_sums(logits: Tensor, labels: Tensor, ignore_index: int = 255, num_bins: int = NUM_BINS) -> Tensor:
    """What calibration is computed from, for the labelled pixels of some images.

    Probabilities are `softmax(up(z))`, upsampled as in [`soft_label_cross_entropy`], tile by tile. A bin holds the
    probabilities in `[b / num_bins, (b + 1) / num_bins)`, the last one also 1.

    Args:
        logits: `(B, C, h, w)`.
        labels: `(B, H, W)`, classes, `ignore_index` or [`PADDING_INDEX`].
        ignore_index: label of void pixels, which are not counted.
        num_bins: bins of equal width.

    Returns:
        `(C + 2, num_bins, 3)` of [`widest_float`]. Row c < C: for the probability of class c in each bin the number of
        pixels, the sum of probabilities, and how often c was the label. Row C: the same for the most likely class. Row
        C + 1: its very first entry is the sum over pixels of the Brier score, the rest is 0.
    """
    z, classes = logits.float(), logits.shape[1]
    dtype = widest_float(logits.device)
    sums = torch.zeros(classes + 2, num_bins, 3, dtype=dtype, device=logits.device)
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
        sums[classes] += _by_bin(best, confidence, best[prediction == y], 1, num_bins)[0]
        sums[classes + 1, 0, 0] += (p * p).sum() - 2 * p.gather(0, y[None]).sum() + len(y)
    return sums


def _by_bin(bins: Tensor, probabilities: Tensor, hits: Tensor, rows: int, num_bins: int) -> Tensor:
    """Numbers, sums of probabilities and hits `(rows, num_bins, 3)`, from places in the flattened table."""
    size = rows * num_bins
    columns = (
        torch.bincount(bins, minlength=size),
        torch.bincount(bins, probabilities, minlength=size),
        torch.bincount(hits, minlength=size),
    )
    return torch.stack([column.to(probabilities.dtype) for column in columns], dim=1).view(rows, -1, 3)


def calibration_metrics(sums: Tensor) -> dict[str, Any]:
    """Calibration of everything that [`calibration_sums`] counted.

    With n pixels, `n_b` of them in bin b, their mean probability `p_b` and share of hits `h_b`:

    - `ece`: `sum_b n_b / n |h_b - p_b|` of the most likely class (Guo et al. On Calibration of Modern Neural Networks.
      ICML 2017)
    - `classwise_ece`: the mean over classes of the same for the probability of each class (Kull et al. Beyond
      Temperature Scaling. NeurIPS 2019)
    - `brier`: the mean over pixels of `sum_c (p_c - y_c)^2`, 0 to 2
    - `reliability`: for each bin of `ece` its share of the pixels, `p_b` and `h_b`, None where it is empty

    All NaN without a labelled pixel.
    """
    sums = sums.cpu().double()
    pixels = sums[-2, :, 0].sum()
    gaps = (sums[:-1, :, 1] - sums[:-1, :, 2]).abs().sum(dim=1) / pixels
    reliability = [
        [float(n / pixels), float(p / n), float(hits / n)] if n > 0 else [0.0, None, None] for n, p, hits in sums[-2]
    ]
    return {
        "ece": gaps[-1].item(),
        "classwise_ece": gaps[:-1].mean().item(),
        "brier": (sums[-1, 0, 0] / pixels).item(),
        "reliability": reliability,
    }


def boundary_counts(predictions: Tensor, labels: Tensor, num_labels: int, ignore_index: int = 255) -> Tensor:
    """Pixels of each class near its contours: in both, and in either of prediction and label.

    The contour region of a class are its pixels that are at most d from a pixel of another class or from one outside
    the image, in the maximum norm, with d = 2 % of the diagonal, at least one pixel.

    Args:
        predictions, labels: `(H, W)`. Void pixels count as no class in both, and so their edge as a contour.

    Returns:
        int64 `(C, 2)`.
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
    """Boundary IoU (Cheng et al. CVPR 2021) over everything that [`boundary_counts`] counted.

    `per_category_boundary_iou`, NaN for classes that have no contour anywhere, and `mean_boundary_iou` without these.
    """
    counts = counts.cpu().double()
    iou = counts[:, 0] / counts[:, 1]
    return {"mean_boundary_iou": iou.nanmean().item(), "per_category_boundary_iou": iou.tolist()}
