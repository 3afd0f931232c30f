"""Cross-entropy between soft labels and logits, at the resolution of the labels."""

from typing import Literal, overload

import torch
from torch import Tensor

from .fused import FusedSoftLabelCrossEntropy, is_labelled, pixel_weights, widest_float
from .interpolation import upsample


@overload
def soft_label_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    aggregated: Tensor | None = None,
    beta: float = 0.0,
    ignore_index: int = 255,
    num_items: Tensor | int | None = None,
    return_parts: Literal[False] = False,
    *,
    distill_unlabeled: bool = False,
    adaptive_beta: bool = False,
    class_weights: Tensor | None = None,
    fused: bool = True,
) -> Tensor: ...


@overload
def soft_label_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    aggregated: Tensor | None = None,
    beta: float = 0.0,
    ignore_index: int = 255,
    num_items: Tensor | int | None = None,
    *,
    return_parts: Literal[True],
    distill_unlabeled: bool = False,
    adaptive_beta: bool = False,
    class_weights: Tensor | None = None,
    fused: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]: ...


def soft_label_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    aggregated: Tensor | None = None,
    beta: float = 0.0,
    ignore_index: int = 255,
    num_items: Tensor | int | None = None,
    return_parts: bool = False,
    *,
    distill_unlabeled: bool = False,
    adaptive_beta: bool = False,
    class_weights: Tensor | None = None,
    fused: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""Cross-entropy between soft labels and logits at the labels' resolution, averaged over labelled pixels.

    $$L = \frac1{|V|} \sum_{u \in V} -\sum_c \tilde y_{uc} \log \mathrm{softmax}(\mathrm{up}(z)_u)_c, \qquad
      \tilde y_u = (1 - \beta)\,\mathrm{onehot}(y_u) + \beta\,\mathrm{up}(q)_u$$

    with V the labelled pixels and `up` bilinear interpolation (`align_corners=False`) from the grid of the logits to
    the size of the labels. The student is at temperature 1, and there is no $T^2$ factor. With `beta=0` this is
    `F.cross_entropy(F.interpolate(logits, ...), labels, ignore_index=ignore_index)`, except that a batch without a
    labelled pixel gives 0 instead of NaN. Everything is computed in float32.

    With `distill_unlabeled` the unlabelled pixels U learn from q alone, for sparse labels:

    $$L' = L + \beta \frac1{|U|} \sum_{u \in U} -\sum_c \mathrm{up}(q)_{uc} \log \mathrm{softmax}(\mathrm{up}(z)_u)_c$$

    Each set has its own mean, or a few labelled points would drown in the rest of the image.

    With `adaptive_beta` the weight $\beta_u = \beta\,\mathrm{up}(q)_{u y_u}$ of each pixel takes the place of $\beta$
    in its soft label: pixels whose label contradicts q keep their one-hot label, and the others are softened.
    Unlabelled pixels keep beta. This is our addition, not in the paper: [`PALSLoss`] uses it by default, this function
    does not.

    With `class_weights` w the first mean is weighted, `sum_u w_{y_u} (...) / sum_u w_{y_u}`, as in
    `F.cross_entropy(weight=w)`.

    Args:
        logits: `(B, C, h, w)`, on the classifier's own grid, any floating dtype, finite.
        labels: `(B, H, W)`, integer classes 0 to C - 1, `ignore_index`, or [`PADDING_INDEX`] outside the image, where
            no pixel takes part in a sum.
        aggregated: `(B, C, h, w)`, the distribution q to mix in, without gradient. Not needed when `beta` is 0.
        beta: weight of the aggregated distribution, 0 to 1.
        ignore_index: label of unlabelled pixels, which take no part in the first sum and mean.
        num_items: divisor instead of the number of labelled pixels of this batch, for the mean over a larger batch
            that is computed in parts: the sum of [`count_pixels`] over the parts. With `distill_unlabeled` two
            numbers: |V| (with class weights the sum of the weights) and |U|.
        return_parts: also return the parts that the loss is mixed from.
        distill_unlabeled, adaptive_beta: see above.
        class_weights: `(C,)`, the weight of a labelled pixel of each class. Default: 1.
        fused: compute loss and gradient tile by tile, so that full-resolution logits never exist. The result is the
            same up to float32 rounding, with first-order gradients only. False uses torch's own operations.

    Returns:
        The loss, a float32 scalar; with `return_parts` also a dict of detached scalars, divided like the loss:
        `one_hot` (cross-entropy with the label), `aggregated` (with q) and, with `distill_unlabeled`, `unlabeled`. If
        beta is not adaptive, `loss = (1 - beta) * one_hot + beta * (aggregated + unlabeled)`.

    Raises:
        ValueError: shapes do not fit, `beta` is outside [0, 1], or `aggregated` is missing with a positive `beta`.

    Example:
        >>> logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 16, 16))
        >>> soft_label_cross_entropy(logits, labels, logits.softmax(dim=1), beta=0.3).ndim
        0
    """
    class_weights = check_inputs(logits, labels, class_weights)
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    if aggregated is None and beta > 0.0:
        raise ValueError(f"beta={beta} needs an aggregated distribution, got None")
    if aggregated is not None and aggregated.shape != logits.shape:
        raise ValueError(f"aggregated {tuple(aggregated.shape)} must have the shape of logits {tuple(logits.shape)}")

    counts = divisors(labels, ignore_index, distill_unlabeled, num_items, class_weights).to(logits.device)
    one_hot_weight = (1.0 - (0.0 if aggregated is None else beta)) / counts[0]
    soft_weight = beta / counts[0]
    unlabeled_weight = beta / counts[1] if distill_unlabeled and aggregated is not None else None
    if aggregated is not None:
        aggregated = aggregated.detach()
    sums = FusedSoftLabelCrossEntropy.apply if fused else _soft_label_sums
    with torch.autocast(logits.device.type, enabled=False):
        loss, one_hot, soft, unlabeled = sums(
            logits,
            labels,
            aggregated,
            one_hot_weight,
            soft_weight,
            unlabeled_weight,
            ignore_index,
            class_weights,
            adaptive_beta,
        )
    if not return_parts:
        return loss
    parts = {"one_hot": one_hot.detach() / counts[0]}
    if aggregated is not None:
        parts["aggregated"] = soft.detach() / counts[0]
    if unlabeled_weight is not None:
        parts["unlabeled"] = unlabeled.detach() / counts[1]
    return loss, parts


def count_pixels(
    labels: Tensor, ignore_index: int = 255, distill_unlabeled: bool = False, class_weights: Tensor | None = None
) -> Tensor:
    """Count labelled pixels and distilled unlabelled pixels: the `num_items` of the losses, int64 `(2,)`.

    With `class_weights` the first number is the sum of the weights of the pixels' classes, and both are of the type
    [`widest_float`].
    """
    labelled = is_labelled(labels, ignore_index)
    unlabeled = (labels == ignore_index).sum() if distill_unlabeled else labels.new_zeros(())
    if class_weights is None:
        return torch.stack([labelled.sum(), unlabeled])
    per_class = torch.bincount(labels[labelled], minlength=len(class_weights))
    dtype = widest_float(labels.device)
    weights = class_weights.to(labels.device, dtype)
    return torch.stack([per_class.to(dtype) @ weights, unlabeled.to(dtype)])


def check_inputs(logits: Tensor, labels: Tensor, class_weights: Tensor | None) -> Tensor | None:
    """Check the shapes that a loss is given, and return the class weights in float32 beside the logits.

    Raises:
        ValueError: shapes do not fit.
    """
    if logits.ndim != 4 or labels.ndim != 3 or logits.shape[0] != labels.shape[0]:
        raise ValueError(
            "logits and labels must be (B, C, h, w) and (B, H, W), "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if class_weights is None:
        return None
    if class_weights.shape != logits.shape[1:2]:
        raise ValueError(f"class_weights must be {logits.shape[1]} numbers, got {tuple(class_weights.shape)}")
    return class_weights.to(logits.device, torch.float32)


def divisors(
    labels: Tensor,
    ignore_index: int,
    distill_unlabeled: bool,
    num_items: Tensor | int | None,
    class_weights: Tensor | None,
) -> Tensor:
    """Return what a loss divides its sums by, float32: `num_items` or [`count_pixels`], and 1 instead of 0."""
    if num_items is None:
        num_items = count_pixels(labels, ignore_index, distill_unlabeled, class_weights)
    counts = torch.as_tensor(num_items).flatten()
    if distill_unlabeled and counts.numel() != 2:
        raise ValueError(
            f"with distill_unlabeled num_items must be two numbers, of labelled and unlabelled pixels, got {num_items}"
        )
    return torch.where(counts > 0, counts, 1).float()


def _soft_label_sums(
    logits: Tensor,
    labels: Tensor,
    aggregated: Tensor | None,
    one_hot_weight: Tensor,
    soft_weight: Tensor,
    unlabeled_weight: Tensor | None,
    ignore_index: int,
    class_weights: Tensor | None = None,
    adaptive: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the same as [`FusedSoftLabelCrossEntropy`] with torch's own operations, differentiable by autograd."""
    log_p = upsample(logits.float(), labels.shape[1:]).log_softmax(dim=1)
    labelled = is_labelled(labels, ignore_index)
    target = labels.masked_fill(~labelled, 0)
    weight = pixel_weights(target, labelled, class_weights)
    of_label = -log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    one_hot = (of_label * weight).sum()
    soft = unlabeled = torch.zeros_like(one_hot)
    if aggregated is None:
        return one_hot_weight * one_hot, one_hot, soft, unlabeled
    up_q = upsample(aggregated.float(), labels.shape[1:])
    of_q = -(up_q * log_p).sum(dim=1)
    soft = (of_q * weight).sum()
    trust = up_q.gather(1, target.unsqueeze(1)).squeeze(1) if adaptive else 1.0
    shares = one_hot_weight + soft_weight * (1.0 - trust), soft_weight * trust
    loss = (shares[0] * of_label * weight).sum() + (shares[1] * of_q * weight).sum()
    if unlabeled_weight is not None:
        unlabeled = of_q.masked_fill(labels != ignore_index, 0.0).sum()
        loss = loss + unlabeled_weight * unlabeled
    return loss, one_hot, soft, unlabeled


def entropy(probabilities: Tensor) -> Tensor:
    """Return the Shannon entropy in nats of distributions along the second axis; `0 log 0` counts as 0.

    Example:
        >>> float(entropy(torch.tensor([[0.5, 0.5]])).exp())
        2.0
    """
    return torch.special.entr(probabilities).sum(dim=1)
