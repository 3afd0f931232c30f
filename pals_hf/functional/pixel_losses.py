"""Losses with one value for each pixel, at the labels' resolution without full-resolution logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fused import is_labelled, pixel_weights, tiles
from .soft_labels import check_inputs, divisors

# From logits `(B, C, R, S)` and classes `(B, R, S)` to named terms `(B, R, S)` of a loss.
LossTerms = Callable[[Tensor, Tensor], dict[str, Tensor]]


def mean_over_pixels(
    pixel_loss: LossTerms,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = 255,
    num_items: Tensor | int | None = None,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Average a loss of single pixels over the labelled ones, on logits upsampled to the labels.

    $$L = \frac1{|V|} \sum_{u \in V} w_{y_u} \ell(\mathrm{up}(z)_u, y_u)$$

    with V the labelled pixels, `up` bilinear interpolation (`align_corners=False`) and, with class weights, their sum
    over V instead of |V|. As in [`soft_label_cross_entropy`], loss and gradient are computed tile by tile in the
    forward pass, in float32, so that nothing larger than a tile exists at full resolution. The gradient of a tile
    comes from autograd.

    Args:
        pixel_loss: the loss of a pixel, a sum of named terms.
        logits: `(B, C, h, w)`, on the classifier's own grid, any floating dtype.
        labels: `(B, H, W)`, int64: classes, `ignore_index` or [`PADDING_INDEX`].
        ignore_index: label of unlabelled pixels, which have no term in the loss.
        num_items: divisor instead of that of this batch: the sum of [`count_pixels`] over all parts of a larger batch.
        class_weights: `(C,)`, the weight of a pixel of each class. Default: 1.

    Returns:
        The loss, a float32 scalar with a first-order gradient, and its terms by name, detached. A batch without a
        labelled pixel gives 0.

    Raises:
        ValueError: shapes do not fit.
    """
    class_weights = check_inputs(logits, labels, class_weights)
    count = divisors(labels, ignore_index, False, num_items, class_weights).to(logits.device)[0]
    with torch.autocast(logits.device.type, enabled=False):
        loss, parts = _TiledPixelLoss.apply(logits, labels, pixel_loss, ignore_index, class_weights)
    return loss / count, {name: value / count for name, value in parts.items()}


class _TiledPixelLoss(torch.autograd.Function):
    """`apply(logits, labels, pixel_loss, ignore_index, class_weights)`: the sum over pixels, and that of each term."""

    @staticmethod
    def forward(ctx, logits, labels, pixel_loss, ignore_index, class_weights):
        z = logits.detach().float()
        gradient = torch.zeros_like(z, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        total, parts = z.new_zeros(()), {}
        for tile in tiles(z, labels):
            labelled = is_labelled(tile.labels, ignore_index)
            target = tile.labels.masked_fill(~labelled, 0)
            weight = pixel_weights(target, labelled, class_weights)
            with torch.set_grad_enabled(gradient is not None):
                up = tile.up(z).requires_grad_(gradient is not None)
                terms = {name: (term * weight).sum() for name, term in pixel_loss(up, target).items()}
                loss = torch.stack(list(terms.values())).sum()
            total += loss.detach()
            parts = {name: term.detach() + parts.get(name, 0.0) for name, term in terms.items()}
            if gradient is not None:
                tile.add_down(torch.autograd.grad(loss, up)[0], gradient)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total, parts

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient, _):
        (gradient,) = ctx.saved_tensors
        # Scaled before it is rounded: a gradient scaler is there to keep half precision from vanishing.
        return (gradient * loss_gradient).to(ctx.dtype), None, None, None, None
