"""Soft-label cross-entropy at the labels' resolution without full-resolution logits.

Bilinear interpolation is a pair of small matrix products, one for the rows and one for the columns. So upsampling,
log-softmax, loss and gradient are computed tile by tile over the label map, and the gradient is taken back to the
classifier's grid at once, in the forward pass. Nothing larger than a tile exists at full resolution. Fused
linear-cross-entropy kernels for language models work in the same way, with a linear layer in the place of the
interpolation. Where TF32 is switched on for the matrix products of a GPU, its rounding applies.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Label of the pixels that a crop adds around an image. They count as unlabelled, and they are never distilled.
PADDING_INDEX = -1

# Elements of one tile of upsampled logits, and its widest: on a CPU a tile should stay in the cache and its matrices
# small, on a GPU it should fill the device.
_TILE = {"cpu": (2**18, 128), "cuda": (2**23, 1024)}


class FusedSoftLabelCrossEntropy(torch.autograd.Function):
    """`apply(logits, labels, aggregated, one_hot_weight, soft_weight, unlabeled_weight, ignore_index, ...)`.

    See `forward`.

    Only the first result has a gradient, for the logits alone and of first order: it is computed in the forward pass,
    in float32, and `backward` only scales it. [`functional.soft_label_cross_entropy`] is the way to call this.
    """

    @staticmethod
    def forward(
        ctx,
        logits,
        labels,
        aggregated,
        one_hot_weight,
        soft_weight,
        unlabeled_weight,
        ignore_index,
        class_weights=None,
        adaptive=False,
    ):
        """Return `(loss, one_hot, soft, unlabeled)`: three sums over pixels, and their sum with the given weights.

        With `p_u = softmax(up(z)_u)`: `one_hot = sum -log p_u[y_u]` and `soft = sum -sum_c up(q)_uc log p_uc` over
        labelled pixels, `unlabeled` is the same as `soft` over pixels labelled `ignore_index`; padding is in no sum.
        With `class_weights` `(C,)` a labelled pixel counts as much as the weight of its class. If `adaptive`, only the
        share `up(q)_u[y_u]` of a pixel's `soft_weight` is given to `soft`, and the rest to `one_hot`. Other weights
        are scalar tensors; `soft` is 0 without `aggregated`, and `unlabeled` is 0 without `unlabeled_weight`.
        """
        z = logits.float()
        q = None if aggregated is None else aggregated.float()
        gradient = torch.zeros_like(z, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        loss, one_hot, soft, unlabeled = (z.new_zeros(()) for _ in range(4))  # no views: callers may scale it in place
        for tile in tiles(z, labels):
            log_p = tile.up(z).log_softmax(dim=1)
            labelled = is_labelled(tile.labels, ignore_index)
            target = tile.labels.masked_fill(~labelled, 0).unsqueeze(1)
            weight = pixel_weights(target.squeeze(1), labelled, class_weights)
            of_label = -log_p.gather(1, target).squeeze(1)
            one_hot += (of_label * weight).sum()
            label_share = weight * one_hot_weight
            if q is not None:
                up_q = tile.up(q)
                of_q = -torch.linalg.vecdot(up_q, log_p, dim=1)
                soft += (of_q * weight).sum()
                q_share = weight * soft_weight
                if adaptive:
                    whole, q_share = q_share, q_share * up_q.gather(1, target).squeeze(1)
                    label_share = label_share + (whole - q_share)
                if unlabeled_weight is not None:
                    distilled = tile.labels == ignore_index
                    unlabeled += of_q.masked_fill(~distilled, 0.0).sum()
                    q_share = q_share + distilled * unlabeled_weight
                loss += (q_share * of_q).sum()
                q_share = q_share.unsqueeze(1)
            loss += (label_share * of_label).sum()
            label_share = label_share.unsqueeze(1)
            if gradient is None:
                continue
            # d/dz of -sum_c y_c log p_c is p sum_c y_c - y, with y the weighted soft label.
            slope = log_p.exp_()
            if q is None:
                slope *= label_share
            else:
                slope *= label_share + q_share * up_q.sum(dim=1, keepdim=True)
                slope.addcmul_(up_q, q_share, value=-1.0)
            slope.scatter_add_(1, target, -label_share)
            tile.add_down(slope, gradient)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(one_hot, soft, unlabeled)
        return loss, one_hot, soft, unlabeled

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient, *_):
        (gradient,) = ctx.saved_tensors
        # Scaled before it is rounded: a gradient scaler is there to keep half precision from vanishing.
        return (gradient * loss_gradient).to(ctx.dtype), None, None, None, None, None, None, None, None


def is_labelled(labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Tell which pixels have a label other than `ignore_index` and [`PADDING_INDEX`]: boolean, shaped as `labels`."""
    return (labels != ignore_index) & (labels != PADDING_INDEX)


def widest_float(device: torch.device) -> torch.dtype:
    """Return the type for sums over many pixels: float64, or float32 on Apple's MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def pixel_weights(target: Tensor, labelled: Tensor, class_weights: Tensor | None) -> Tensor:
    """Return the weight of each pixel: 0 without a label, else the weight of its class, or 1.

    `target` holds a class at every pixel, also at unlabelled ones.
    """
    return labelled if class_weights is None else class_weights[target] * labelled


class _Tile(NamedTuple):
    """A rectangle of the label map, with the matrices that interpolate a part of the grid to it."""

    labels: Tensor  # (B, R, S)
    part: tuple[slice, slice]  # the rows and columns of the grid that reach the tile
    rows: Tensor | None  # (R, r); None where nothing is interpolated
    columns: Tensor | None  # (S, s)

    def up(self, maps: Tensor) -> Tensor:
        """Interpolate maps `(B, C, h, w)` to this tile, `(B, C, R, S)`."""
        part = maps[(..., *self.part)]
        part = part if self.columns is None else part @ self.columns.T
        return part if self.rows is None else self.rows @ part

    def add_down(self, tile: Tensor, maps: Tensor) -> None:
        """Apply the transpose of `up` to a tile `(B, C, R, S)`, and add the result to `maps` `(B, C, h, w)`."""
        tile = tile if self.rows is None else self.rows.T @ tile
        maps[(..., *self.part)] += tile if self.columns is None else tile @ self.columns


def tiles(maps: Tensor, labels: Tensor) -> Iterator[_Tile]:
    """Cut the labels `(B, H, W)` into rectangles, each with the matrices that upsample maps `(B, C, h, w)` to it."""
    (batch, classes, *grid), size = maps.shape, labels.shape[1:]
    rows, columns = (_interpolation(source, target, maps) for source, target in zip(grid, size, strict=True))
    elements, widest = _TILE.get(maps.device.type, _TILE["cuda"])
    width = min(size[1], widest)
    height = max(1, elements // (batch * classes * width))
    for y in range(0, size[0], height):
        for x in range(0, size[1], width):
            tile = labels[:, y : y + height, x : x + width]
            part = (_reach(y, tile.shape[1], size[0], grid[0]), _reach(x, tile.shape[2], size[1], grid[1]))
            yield _Tile(
                tile,
                part,
                None if rows is None else rows[y : y + height, part[0]],
                None if columns is None else columns[x : x + width, part[1]],
            )


def _reach(start: int, length: int, target: int, source: int) -> slice:
    """Return the source positions from which the target pixels `start` to `start + length` are interpolated."""
    if source == target:
        return slice(start, start + length)
    # Target pixel t lies at (t + 0.5) source / target - 0.5, between that rounded down and the next.
    first = math.floor((start + 0.5) * source / target - 0.5)
    last = math.floor((start + length - 0.5) * source / target - 0.5) + 1
    return slice(max(0, first), min(source, last + 1))


def _interpolation(source: int, target: int, like: Tensor) -> Tensor | None:
    """Return the `(target, source)` matrix of linear interpolation, `align_corners=False`, computed by torch."""
    if source == target:
        return None
    identity = torch.eye(source, device=like.device, dtype=like.dtype)
    return F.interpolate(identity[None], size=target, mode="linear", align_corners=False)[0].T.contiguous()
