"""The PALS mathematics as plain functions on tensors. Needs torch and nothing else.

Notation, used throughout the package:

| symbol | meaning                                                               | shape          |
|--------|-----------------------------------------------------------------------|----------------|
| `f_i`  | feature of cell i on the classifier's own grid, L2-normalised         | `(D,)`         |
| `z_i`  | logits of cell i on that grid, `N = h * w` cells                      | `(C,)`         |
| `p_i`  | `softmax(z_i / T)`, `T` the temperature                               | `(C,)`         |
| `S_ij` | `exp(f_i . f_j / tau) / sum_k exp(f_i . f_k / tau)`                   | `(N, N)`       |
| `q_i`  | `sum_j S_ij p_j`, the aggregated distribution, without gradient       | `(C,)`         |
| `y~_u` | `(1 - beta) onehot(y_u) + beta up(q)_u`, soft label of label pixel u  | `(C,)`         |

Reference: Park, Kim, Heo. Semantic Segmentation Using Pixel-Wise Adaptive Label Smoothing via
Self-Knowledge Distillation for Limited Labeling Data. Sensors 22(7):2623, 2022.
https://doi.org/10.3390/s22072623. The abstract leaves open which features make `S`, its temperature and the
mixing weight; what stands here is a reconstruction, and each such choice is an argument.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Fused attention kernels want a head dimension that is a multiple of this.
_HEAD_DIM_ALIGNMENT = 8


def aggregate_probabilities(features: Tensor, probabilities: Tensor, *, tau: float) -> Tensor:
    r"""Average the class distributions of all cells of an image, weighted by feature similarity.

    $$q_i = \sum_j S_{ij} p_j, \qquad
      S_{ij} = \frac{\exp(\hat f_i \cdot \hat f_j / \tau)}{\sum_k \exp(\hat f_i \cdot \hat f_k / \tau)}, \qquad
      \hat f = f / \lVert f \rVert_2$$

    over all pairs of cells, the cell itself included. This is scaled dot-product attention with the features as
    queries and keys and the probabilities as values, so it is computed by
    [`torch.nn.functional.scaled_dot_product_attention`]: exact, and in O(N) memory where torch has a fused kernel.

    Args:
        features: `(B, D, h, w)`, float32, bfloat16 or float16; normalised inside. Their dtype is the dtype of the
            attention: bfloat16 features give a relative error of about 1e-2 and are faster where the hardware
            multiplies bfloat16 natively.
        probabilities: `(B, C, h, w)`, each cell's distribution over the C classes.
        tau: temperature of the affinity, > 0. Towards 0 each cell keeps its own distribution, towards infinity all
            cells get the mean of the image.

    Returns:
        `(B, C, h, w)` in the dtype of `probabilities`; each cell sums to one.

    Raises:
        ValueError: a tensor is not 4-d, the grids or batch sizes differ, or `tau` is not positive.

    Example:
        >>> features, probabilities = torch.randn(1, 8, 4, 6), torch.randn(1, 3, 4, 6).softmax(dim=1)
        >>> aggregate_probabilities(features, probabilities, tau=0.3).shape
        torch.Size([1, 3, 4, 6])
    """
    if features.ndim != 4 or probabilities.ndim != 4:
        raise ValueError(
            f"features and probabilities must be (B, D, h, w) and (B, C, h, w), "
            f"got {tuple(features.shape)} and {tuple(probabilities.shape)}"
        )
    if features.shape[0] != probabilities.shape[0] or features.shape[2:] != probabilities.shape[2:]:
        raise ValueError(
            f"features {tuple(features.shape)} and probabilities {tuple(probabilities.shape)} "
            "must share batch size and grid"
        )
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")

    num_classes, grid = probabilities.shape[1], probabilities.shape[2:]
    # The norm is taken in float32: squares of half-precision features overflow or vanish.
    keys = F.normalize(features.float(), dim=1).to(features.dtype)
    # Kernels need one head dimension for queries, keys and values, else torch falls back to the N x N matrix.
    head_dim = max(keys.shape[1], num_classes)
    head_dim += -head_dim % _HEAD_DIM_ALIGNMENT
    keys = _to_heads(keys, head_dim)
    values = _to_heads(probabilities.to(features.dtype), head_dim)
    with torch.autocast(features.device.type, enabled=False):
        aggregated = F.scaled_dot_product_attention(keys, keys, values, scale=1.0 / tau)
    aggregated = aggregated[:, 0, :, :num_classes].transpose(1, 2).unflatten(2, grid).to(probabilities.dtype)
    # Exact already in real numbers; in half precision the rounded weights do not quite sum to one.
    return aggregated / aggregated.sum(dim=1, keepdim=True)


def _to_heads(maps: Tensor, head_dim: int) -> Tensor:
    """`(B, D, h, w)` to one attention head `(B, 1, h * w, head_dim)`, zero-padded: zeros change no dot product."""
    vectors = F.pad(maps.flatten(2), (0, 0, 0, head_dim - maps.shape[1]))
    # Contiguous in the channels, or torch falls back to the N x N matrix.
    return vectors.transpose(1, 2).contiguous().unsqueeze(1)


def soft_label_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    aggregated: Tensor | None = None,
    beta: float = 0.0,
    ignore_index: int = 255,
    num_items: Tensor | int | None = None,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""Cross-entropy between soft labels and logits at the labels' resolution, averaged over labelled pixels.

    $$L = \frac1{|V|} \sum_{u \in V} -\sum_c \tilde y_{uc} \log \mathrm{softmax}(\mathrm{up}(z)_u)_c, \qquad
      \tilde y_u = (1 - \beta)\,\mathrm{onehot}(y_u) + \beta\,\mathrm{up}(q)_u$$

    with V the pixels whose label is not `ignore_index` and `up` bilinear interpolation (`align_corners=False`) from
    the grid of the logits to the size of the labels. The student is at temperature 1 and there is no $T^2$ factor.
    With `beta=0` this is `F.cross_entropy(F.interpolate(logits, ...), labels, ignore_index=ignore_index)`, except
    that a batch without a labelled pixel gives 0 instead of NaN. Computed in float32.

    Args:
        logits: `(B, C, h, w)`, on the classifier's own grid, any floating dtype.
        labels: `(B, H, W)`, integer classes 0 to C - 1 or `ignore_index`.
        aggregated: `(B, C, h, w)`, the distribution q to mix in. No gradient flows through it. May be left out when
            `beta` is 0.
        beta: weight of the aggregated distribution, 0 to 1.
        ignore_index: label of void pixels: they have no part in sum or mean.
        num_items: divide the sum by this instead of by the number of labelled pixels of this batch, for a mean over
            a larger batch that is computed in parts.
        return_parts: also return the two sums the loss is mixed from.

    Returns:
        The loss, a float32 scalar; with `return_parts` also a dict of detached scalars, divided like the loss:
        `one_hot` (cross-entropy with the label) and `aggregated` (with q), so that
        `loss = (1 - beta) * one_hot + beta * aggregated`.

    Raises:
        ValueError: shapes do not fit, `beta` is outside [0, 1], or `aggregated` is missing with `beta` above 0.

    Example:
        >>> logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 16, 16))
        >>> soft_label_cross_entropy(logits, labels, logits.softmax(dim=1), beta=0.3).ndim
        0
    """
    if logits.ndim != 4 or labels.ndim != 3 or logits.shape[0] != labels.shape[0]:
        raise ValueError(
            "logits and labels must be (B, C, h, w) and (B, H, W), "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    if beta > 0 and aggregated is None:
        raise ValueError(f"beta is {beta}, so the aggregated distribution is needed")
    if aggregated is not None and aggregated.shape != logits.shape:
        raise ValueError(f"aggregated {tuple(aggregated.shape)} must have the shape of logits {tuple(logits.shape)}")

    valid = labels != ignore_index
    count = valid.sum() if num_items is None else torch.as_tensor(num_items, device=logits.device)
    count = count.clamp(min=1)
    with torch.autocast(logits.device.type, enabled=False):
        log_probabilities = upsample(logits.float(), labels.shape[1:]).log_softmax(dim=1)
        one_hot = F.nll_loss(log_probabilities, labels, ignore_index=ignore_index, reduction="sum") / count
        loss, parts = one_hot, {"one_hot": one_hot.detach()}
        if aggregated is not None:
            soft_labels = upsample(aggregated.detach().float(), labels.shape[1:])
            cross_entropy = -(soft_labels * log_probabilities).sum(dim=1)
            soft = cross_entropy.masked_fill(~valid, 0.0).sum() / count
            loss = (1.0 - beta) * one_hot + beta * soft
            parts["aggregated"] = soft.detach()
    return (loss, parts) if return_parts else loss


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of `(B, C, h, w)` maps to `size`, `align_corners=False`: the `up` of the formulas.

    It is what the image processors of transformers do to logits before they take the argmax.
    """
    if maps.shape[2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def entropy(probabilities: Tensor, dim: int = 1) -> Tensor:
    """Shannon entropy in nats along `dim`; `0 log 0` counts as 0.

    Example:
        >>> float(entropy(torch.tensor([[0.5, 0.5]])).exp())
        2.0
    """
    return torch.special.entr(probabilities).sum(dim=dim)
