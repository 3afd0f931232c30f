"""The PALS mathematics as plain functions on tensors. Needs torch and nothing else.

Notation, used throughout the package:

| symbol | meaning                                                               | shape          |
|--------|-----------------------------------------------------------------------|----------------|
| `f_i`  | feature of cell i on the classifier's own grid, L2-normalised         | `(D,)`         |
| `z_i`  | logits of cell i on that grid, `N = h * w` cells                      | `(C,)`         |
| `p_i`  | `softmax(z_i / T)`, `T` the temperature                               | `(C,)`         |
| `S_ij` | `exp(f_i . f_j / tau) / sum_k exp(f_i . f_k / tau)`                   | `(N, N)`       |
| `q_i`  | `sum_j S_ij p_j`, the aggregated distribution, without gradient       | `(C,)`         |
| `y~_u` | `(1 - b) onehot(y_u) + b up(q)_u`, soft label of label pixel u        | `(C,)`         |
| `b`    | `beta`; with `adaptive_beta` `beta up(q)_u` at the label `y_u`        | scalar         |

Reference: Park, Kim, Heo. Semantic Segmentation Using Pixel-Wise Adaptive Label Smoothing via
Self-Knowledge Distillation for Limited Labeling Data. Sensors 22(7):2623, 2022.
https://doi.org/10.3390/s22072623. The abstract leaves open which features make `S`, its temperature and the
mixing weight; what stands here is a reconstruction, and each such choice is an argument.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import PADDING_INDEX as PADDING_INDEX  # part of the maths, which lives here for everybody else
from .fused import FusedSoftLabelCrossEntropy, is_labelled, pixel_weights, widest_float

PAIRS = ("all", "same_class")
POOLINGS = ("keys", "both")

# Fused attention kernels want a head dimension that is a multiple of this.
_HEAD_DIM_ALIGNMENT = 8
# By how much the exponent of an excluded pair lies below that of the least similar pair that counts: a million of
# them weigh less than 1e-6.
_EXCLUSION = 30.0
# Where other cells have less than this share of a cell's affinity beside its own, there are none to average over.
_NOBODY = 1e-3
# Queries that are compared at once: on a CPU few, for the memory, on a GPU enough to fill it.
_QUERIES_AT_ONCE = {"cpu": 2**12, "cuda": 2**16}
# Classes that are upsampled at once for the argmax.
_CLASSES_AT_ONCE = 4


def aggregate_probabilities(
    features: Tensor,
    probabilities: Tensor,
    *,
    tau: float,
    labels: Tensor | None = None,
    pairs: str = "all",
    include_self: bool = True,
    void_keys: bool = True,
    ignore_index: int = 255,
    propagation_steps: int = 1,
    propagation_weight: float = 1.0,
    anchor_weight: float = 0.0,
    affinity_stride: int = 1,
    affinity_pooling: str = "both",
    max_affinity_cells: int | None = None,
) -> Tensor:
    r"""Average the class distributions of all cells of an image, weighted by feature similarity.

    $$q_i = \sum_j S_{ij} p_j, \qquad
      S_{ij} = \frac{\exp(\hat f_i \cdot \hat f_j / \tau)}{\sum_k \exp(\hat f_i \cdot \hat f_k / \tau)}, \qquad
      \hat f = f / \lVert f \rVert_2$$

    over all pairs of cells, the cell itself included, unless an option takes some out. This is scaled dot-product
    attention with the features as queries and keys and the probabilities as values, so it is computed by
    [`torch.nn.functional.scaled_dot_product_attention`]: exact, and in O(N) memory where torch has a fused kernel.
    No option changes that: which pairs count is written into extra dimensions of queries and keys, not into a mask.

    Args:
        features: `(B, D, h, w)`, float32, bfloat16 or float16; normalised inside. Their dtype is the dtype of the
            attention: bfloat16 features give a relative error of about 1e-2 and are faster where the hardware
            multiplies bfloat16 natively.
        probabilities: `(B, C, h, w)`, each cell's distribution over the C classes.
        tau: temperature of the affinity, > 0. Towards 0 each cell keeps its own distribution, towards infinity all
            cells get the mean of the image.
        labels: `(B, H, W)`, for the three options that need them. See [`pool_labels`].
        pairs: "all", or "same_class": a labelled cell is compared with cells of its own class only. A cell without a
            label is compared with all, and one whose class no key has keeps its own distribution.
        include_self: whether a cell is among those it is averaged over. Without (which blocks as keys do not allow),
            a cell that is compared with no other, or whose others have less than a thousandth of its affinity, keeps
            its own distribution. Computed in float32.
        void_keys: whether cells without a label are averaged over. They get a q of their own either way.
        ignore_index: label of void pixels. [`PADDING_INDEX`] is no label either.
        propagation_steps, propagation_weight: q starts as p and becomes `weight * S q + (1 - weight) * p` in every
            step, as in BAKE (Ge et al. 2021, arXiv 2104.13298). One step of weight 1 is the formula above;
            with weight 0 no cell is compared with another.
        anchor_weight: with a above 0 a labelled cell is an anchor: what is averaged of it is its label (the shares of
            the classes among its labelled pixels) instead of its prediction, in every step, and it counts a times as
            much as it would, so that few labels speak up among many cells without. With 0, the formula above, all
            cells say what they predict. Clamped labels are those of label propagation (Zhu and Ghahramani 2002,
            CMU-CALD-02-107); that they go into PALS is this package's own.
        affinity_stride: with s > 1, blocks of s x s cells, their features and probabilities averaged, take the place
            of cells:
        affinity_pooling: as "keys", so that every cell is compared with the blocks (the cost falls with s^2), or as
            "both" keys and queries (s^4), with q brought back to the grid by bilinear interpolation: cheaper, and
            blurred.
        max_affinity_cells: the stride is raised until there are no more blocks than this, which with pooling "both"
            bounds the cost.

    Returns:
        `(B, C, h, w)` in the dtype of `probabilities`; each cell sums to one.

    Raises:
        ValueError: shapes do not fit together, an option is out of its range, or labels are needed and not given.

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
    check_affinity(
        tau=tau,
        pairs=pairs,
        include_self=include_self,
        propagation_steps=propagation_steps,
        propagation_weight=propagation_weight,
        anchor_weight=anchor_weight,
        affinity_stride=affinity_stride,
        affinity_pooling=affinity_pooling,
        max_affinity_cells=max_affinity_cells,
    )
    by_label, anchored = pairs == "same_class" or not void_keys, anchor_weight > 0
    if (by_label or anchored) and (labels is None or labels.ndim != 3 or labels.shape[0] != features.shape[0]):
        got, options = "none" if labels is None else tuple(labels.shape), f"{pairs=}, {void_keys=}, {anchor_weight=}"
        raise ValueError(f"{options} needs labels (B, H, W), got {got}")
    num_classes, grid = probabilities.shape[1], features.shape[2:]
    stride = capped_stride(affinity_stride, grid, max_affinity_cells)
    pool_queries = stride > 1 and affinity_pooling == "both"

    # The norm is taken in float32: squares of half-precision features overflow or vanish.
    keys = F.normalize(_pool(features.float(), stride) if stride > 1 else features.float(), dim=1)
    queries = F.normalize(features.float(), dim=1) if stride > 1 and not pool_queries else keys
    own = _pool(probabilities, stride) if pool_queries else probabilities
    query_grid, key_grid = queries.shape[2:], keys.shape[2:]
    queries, keys = (maps.to(features.dtype).flatten(2).transpose(1, 2) for maps in (queries, keys))
    tags = []
    if by_label:
        key_labels = pool_labels(labels, grid, num_classes, ignore_index, stride).flatten(1)
        query_labels = key_labels
        if query_grid != key_grid:
            query_labels = pool_labels(labels, grid, num_classes, ignore_index).flatten(1)
        same_class, skip = num_classes if pairs == "same_class" else 0, None if void_keys else ignore_index
        tags.append(_pair_tags(query_labels, key_labels, same_class, skip, tau, anchor_weight))
        has_keys = _has_keys(query_labels, key_labels, same_class, skip)[..., None]
    if anchored:
        counts = _count_labels(labels, grid, num_classes, ignore_index, stride).flatten(1, 2).float()
        is_anchor, shares = counts.sum(dim=2, keepdim=True) > 0, F.normalize(counts, p=1.0, dim=2)
        tags.append((torch.ones_like(queries[..., :1]), is_anchor * (tau * math.log(anchor_weight))))
    for query_tag, key_tag in tags:
        queries, keys = (torch.cat([x, tag.to(x.dtype)], 2) for x, tag in ((queries, query_tag), (keys, key_tag)))

    own = own.float().flatten(2).transpose(1, 2)  # (B, N, C)
    q = own
    for _ in range(propagation_steps if propagation_weight else 0):  # with weight 0 there is nothing to compare
        values = q
        if key_grid != query_grid:
            values = _pool(q.transpose(1, 2).unflatten(2, query_grid), stride).flatten(2).transpose(1, 2)
        if anchored:
            values = torch.where(is_anchor, shares, values)
        averaged = (
            _attend(queries, keys, values, tau) if include_self else _attend_to_others(queries, keys, values, q, tau)
        )
        if by_label:
            averaged = torch.where(has_keys, averaged, q)
        q = averaged if propagation_weight == 1.0 else propagation_weight * averaged + (1 - propagation_weight) * own
    q = q.transpose(1, 2).unflatten(2, query_grid)
    if pool_queries:
        q = F.interpolate(q, scale_factor=stride, mode="bilinear", align_corners=False)[..., : grid[0], : grid[1]]
    return q.to(probabilities.dtype)


def check_affinity(
    *,
    tau: float,
    pairs: str = "all",
    include_self: bool = True,
    propagation_steps: int = 1,
    propagation_weight: float = 1.0,
    anchor_weight: float = 0.0,
    affinity_stride: int = 1,
    affinity_pooling: str = "both",
    max_affinity_cells: int | None = None,
) -> None:
    """Check options of [`aggregate_probabilities`].

    Raises:
        ValueError: one is out of its range; the message names it.
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    for name, value, allowed in (("pairs", pairs, PAIRS), ("affinity_pooling", affinity_pooling, POOLINGS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    has_blocks = affinity_stride > 1 or max_affinity_cells is not None
    if not include_self and has_blocks and affinity_pooling == "keys":
        raise ValueError("include_self=False needs affinity_pooling='both': a block is no cell that could be left out")
    if not 0.0 <= propagation_weight <= 1.0:
        raise ValueError(f"propagation_weight must lie in [0, 1], got {propagation_weight}")
    if not 0.0 <= anchor_weight < math.inf:
        raise ValueError(f"anchor_weight must be a number of at least 0, got {anchor_weight}")
    for name, value in (
        ("propagation_steps", propagation_steps),
        ("affinity_stride", affinity_stride),
        ("max_affinity_cells", 1 if max_affinity_cells is None else max_affinity_cells),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def pool_labels(
    labels: Tensor, grid: tuple[int, int], num_classes: int, ignore_index: int = 255, stride: int = 1
) -> Tensor:
    """The label of each cell of a grid, or block of cells: the majority among the labelled pixels it covers.

    Args:
        labels: `(B, H, W)`, int64.
        grid: (h, w). Where it is finer than the labels, cells between take the label they lie on.
        num_classes: C. Memory is B x h x w x C counts.
        ignore_index: label of void pixels, and of cells without a labelled pixel.
        stride: blocks of so many cells squared take the place of cells.

    Returns:
        `(B, h, w)`, or `(B, ceil(h / stride), ceil(w / stride))`, int64. The lowest class wins a tie.

    Example:
        >>> pool_labels(torch.tensor([[[0, 1, 255, 255], [1, 1, 255, 2]]]), (1, 2), 3)
        tensor([[[1, 2]]])
    """
    most, winner = _count_labels(labels, grid, num_classes, ignore_index, stride).max(dim=-1)
    return winner.masked_fill(most == 0, ignore_index)


def _count_labels(labels: Tensor, grid: tuple[int, int], num_classes: int, ignore_index: int, stride: int) -> Tensor:
    """How many labelled pixels of each class a cell or block of [`pool_labels`] covers: int64 `(B, h, w, C)`."""
    size = [max(have, want) for have, want in zip(labels.shape[1:], grid, strict=True)]
    if size != list(labels.shape[1:]):
        rows, columns = (torch.arange(n, device=labels.device) for n in size)
        labels = labels[:, (rows * labels.shape[1] // size[0])[:, None], columns * labels.shape[2] // size[1]]
    rows, columns = (
        torch.arange(have, device=labels.device) * want // have // stride
        for have, want in zip(size, grid, strict=True)
    )
    grid = (math.ceil(grid[0] / stride), math.ceil(grid[1] / stride))
    batch, cells = labels.shape[0], grid[0] * grid[1]
    cell = rows[:, None] * grid[1] + columns + torch.arange(batch, device=labels.device)[:, None, None] * cells
    valid = is_labelled(labels, ignore_index)
    counts = torch.bincount((cell * num_classes + labels)[valid], minlength=batch * cells * num_classes)
    return counts.view(batch, *grid, num_classes)


def capped_stride(stride: int, grid: tuple[int, int], max_cells: int | None) -> int:
    """The smallest stride, at least `stride`, with which a grid has no more than `max_cells` blocks.

    Example:
        >>> capped_stride(1, (128, 128), 2048)
        3
    """
    if max_cells is not None:
        while math.ceil(grid[0] / stride) * math.ceil(grid[1] / stride) > max_cells:
            stride += 1
    return stride


def _pool(maps: Tensor, stride: int) -> Tensor:
    """Means of `stride x stride` blocks; those at the lower and right edges may be smaller."""
    return F.avg_pool2d(maps, stride, ceil_mode=True, count_include_pad=False)


def _pair_tags(
    query_labels: Tensor, key_labels: Tensor, same_class: int, skip: int | None, tau: float, anchor_weight: float
) -> tuple[Tensor, Tensor]:
    """Extra dimensions of queries and keys that leave pairs out of the softmax.

    With `same_class`, the number of classes, keys of the query's own class score higher than all others; with `skip`,
    keys of that label score lower than all others.
    """
    # Similarities lie in [-1, 1]; what is excluded has to lie below that by far, after the division by tau, and after
    # what anchors get on top.
    penalty = 2.0 + (_EXCLUSION + abs(math.log(anchor_weight or 1.0))) * tau
    query_tags, key_tags = [], []
    if same_class:
        classes = torch.arange(same_class, device=key_labels.device)
        query_tags.append((query_labels[..., None] == classes) * penalty)
        key_tags.append((key_labels[..., None] == classes).float())
    if skip is not None:
        query_tags.append(torch.full_like(query_labels, penalty, dtype=torch.float32)[..., None])
        key_tags.append(-(key_labels == skip).float()[..., None])
    return torch.cat(query_tags, dim=2), torch.cat(key_tags, dim=2)


def _has_keys(query_labels: Tensor, key_labels: Tensor, same_class: int, skip: int | None) -> Tensor:
    """Whether a query `(B, N)` has any key left, for the same arguments: where all are excluded, all score alike."""
    found = torch.ones_like(key_labels, dtype=torch.bool) if skip is None else key_labels != skip
    has_keys = found.any(dim=1, keepdim=True).expand_as(query_labels)
    if same_class:
        classes = torch.arange(same_class, device=key_labels.device)
        present = (key_labels[..., None] == classes).any(dim=1)  # (B, C)
        is_class = (query_labels >= 0) & (query_labels < same_class)
        own = present.gather(1, query_labels.masked_fill(~is_class, 0))
        has_keys = torch.where(is_class, own, has_keys)
    return has_keys


def _attend(queries: Tensor, keys: Tensor, values: Tensor, tau: float) -> Tensor:
    """Averages of `values` `(B, M, C)` for queries `(B, N, D)` and keys `(B, M, D)`: float32 `(B, N, C)`."""
    # Kernels need one head dimension for queries, keys and values, else torch falls back to the N x M matrix.
    head_dim = max(keys.shape[2], values.shape[2])
    head_dim += -head_dim % _HEAD_DIM_ALIGNMENT
    keys, padded = _to_head(keys, head_dim), _to_head(values.to(keys.dtype), head_dim)
    at_once = _QUERIES_AT_ONCE.get(keys.device.type, _QUERIES_AT_ONCE["cuda"])
    averages = values.new_empty(*queries.shape[:2], values.shape[2], dtype=torch.float32)
    with torch.autocast(keys.device.type, enabled=False):
        for some, average in zip(queries.split(at_once, dim=1), averages.split(at_once, dim=1), strict=True):
            attended = F.scaled_dot_product_attention(_to_head(some, head_dim), keys, padded, scale=1.0 / tau)
            average.copy_(attended[:, 0, :, : values.shape[2]])
    # One already in real numbers; in half precision the rounded weights do not quite sum to it.
    return averages / averages.sum(dim=2, keepdim=True)


def _attend_to_others(queries: Tensor, keys: Tensor, values: Tensor, own: Tensor, tau: float) -> Tensor:
    """The same without the pairs (i, i), in float32: queries and keys are those of the same cells.

    A cell without others keeps what it has in `own`.

    One more key, a sink, scores with every query exactly what the query's own key does. Its weight, which comes back
    in an extra channel of the values, is therefore the cell's own, and can be taken out of the average.
    """
    queries, keys = queries.float(), keys.float()  # half precision loses what a dominant own weight leaves over
    queries = torch.cat([queries, (queries * keys).sum(dim=2, keepdim=True)], dim=2)
    sink = F.pad(keys.new_zeros(keys.shape[0], 1, keys.shape[2]), (0, 1), value=1.0)
    keys = torch.cat([F.pad(keys, (0, 1)), sink], dim=1)
    with_sink = F.pad(values, (0, 1, 0, 1))
    with_sink[:, -1, -1] = 1.0
    averages = _attend(queries, keys, with_sink, tau)
    others = (averages[..., :-1] - averages[..., -1:] * values).clamp(min=0.0)
    share = others.sum(dim=2, keepdim=True)
    return torch.where(share > _NOBODY, others / share, own)


def _to_head(vectors: Tensor, head_dim: int) -> Tensor:
    """`(B, N, D)` to one attention head `(B, 1, N, head_dim)`, zero-padded: zeros change no dot product."""
    # Contiguous in the channels, or torch falls back to the N x N matrix.
    return F.pad(vectors, (0, head_dim - vectors.shape[2])).contiguous().unsqueeze(1)


def soft_label_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    aggregated: Tensor | None = None,
    beta: float = 0.0,
    ignore_index: int = 255,
    num_items: Tensor | int | None = None,
    return_parts: bool = False,
    *,
    distill_void: bool = False,
    adaptive_beta: bool = False,
    class_weights: Tensor | None = None,
    fused: bool = True,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""Cross-entropy between soft labels and logits at the labels' resolution, averaged over labelled pixels.

    $$L = \frac1{|V|} \sum_{u \in V} -\sum_c \tilde y_{uc} \log \mathrm{softmax}(\mathrm{up}(z)_u)_c, \qquad
      \tilde y_u = (1 - \beta)\,\mathrm{onehot}(y_u) + \beta\,\mathrm{up}(q)_u$$

    with V the pixels whose label is not `ignore_index` and `up` bilinear interpolation (`align_corners=False`) from
    the grid of the logits to the size of the labels. The student is at temperature 1 and there is no $T^2$ factor.
    With `beta=0` this is `F.cross_entropy(F.interpolate(logits, ...), labels, ignore_index=ignore_index)`, except
    that a batch without a labelled pixel gives 0 instead of NaN. Computed in float32.

    With `distill_void` the pixels labelled `ignore_index` learn from q alone, for sparse labels: with U these pixels,

    $$L' = L + \beta \frac1{|U|} \sum_{u \in U} -\sum_c \mathrm{up}(q)_{uc} \log \mathrm{softmax}(\mathrm{up}(z)_u)_c$$

    Each set has its own mean, or a few labelled points would drown in the rest of the image.

    With `adaptive_beta` a pixel's own $\beta_u = \beta\,\mathrm{up}(q)_{u y_u}$ takes the place of $\beta$ in its soft
    label: a label that q contradicts stays as it is, and one that it agrees with is softened. Void pixels keep beta.
    The paper is without it, and so is this function unless told otherwise; [`PALSLoss`] has it by default.

    With `class_weights` w the first mean is a weighted one, `sum_u w_{y_u} (...) / sum_u w_{y_u}`, as in
    `F.cross_entropy(weight=w)`.

    Args:
        logits: `(B, C, h, w)`, on the classifier's own grid, any floating dtype, finite.
        labels: `(B, H, W)`, integer classes 0 to C - 1, `ignore_index`, or [`PADDING_INDEX`] for what lies outside
            the image: it is in no sum.
        aggregated: `(B, C, h, w)`, the distribution q to mix in. No gradient flows through it. May be left out when
            `beta` is 0.
        beta: weight of the aggregated distribution, 0 to 1.
        ignore_index: label of void pixels: they have no part in sum or mean.
        num_items: divide the sum by this instead of by the number of labelled pixels of this batch, for a mean over
            a larger batch that is computed in parts: what [`count_pixels`] gives, summed. With `distill_void` two
            numbers: |V| (with class weights the sum of them) and |U|.
        return_parts: also return the sums the loss is mixed from.
        distill_void, adaptive_beta: see above.
        class_weights: `(C,)`, what a labelled pixel of each class counts; all 1 without.
        fused: compute loss and gradient tile by tile, so that full-resolution logits exist nowhere. The same to
            float32 rounding; first-order gradients only. False takes torch's own operations over whole maps.

    Returns:
        The loss, a float32 scalar; with `return_parts` also a dict of detached scalars, divided like the loss:
        `one_hot` (cross-entropy with the label), `aggregated` (with q) and, with `distill_void`, `void`, so that
        `loss = (1 - beta) * one_hot + beta * (aggregated + void)` unless beta is adaptive.

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
    if aggregated is None and beta > 0.0:
        raise ValueError(f"an aggregated distribution is needed with beta={beta}")
    if aggregated is not None and aggregated.shape != logits.shape:
        raise ValueError(f"aggregated {tuple(aggregated.shape)} must have the shape of logits {tuple(logits.shape)}")

    if class_weights is not None:
        if class_weights.shape != logits.shape[1:2]:
            raise ValueError(f"class_weights must be {logits.shape[1]} numbers, got {tuple(class_weights.shape)}")
        class_weights = class_weights.to(logits.device, torch.float32)
    counts = _pixel_counts(labels, ignore_index, distill_void, num_items, class_weights).to(logits.device)
    counts = torch.where(counts > 0, counts, 1).float()
    one_hot_weight = (1.0 - (0.0 if aggregated is None else beta)) / counts[0]
    soft_weight = beta / counts[0]
    void_weight = beta / counts[1] if distill_void and aggregated is not None else None
    if aggregated is not None:
        aggregated = aggregated.detach()
    sums = FusedSoftLabelCrossEntropy.apply if fused else _soft_label_sums
    with torch.autocast(logits.device.type, enabled=False):
        loss, one_hot, soft, void = sums(
            logits,
            labels,
            aggregated,
            one_hot_weight,
            soft_weight,
            void_weight,
            ignore_index,
            class_weights,
            adaptive_beta,
        )
    if not return_parts:
        return loss
    parts = {"one_hot": one_hot.detach() / counts[0]}
    if aggregated is not None:
        parts["aggregated"] = soft.detach() / counts[0]
    if void_weight is not None:
        parts["void"] = void.detach() / counts[1]
    return loss, parts


def count_pixels(
    labels: Tensor, ignore_index: int = 255, distill_void: bool = False, class_weights: Tensor | None = None
) -> Tensor:
    """The `num_items` of some labels: how many pixels are labelled, and how many are distilled. int64 `(2,)`.

    With `class_weights` the first is the sum of the weights of their classes, and both are [`widest_float`].
    """
    labelled = is_labelled(labels, ignore_index)
    void = (labels == ignore_index).sum() if distill_void else labels.new_zeros(())
    if class_weights is None:
        return torch.stack([labelled.sum(), void])
    per_class = torch.bincount(labels[labelled], minlength=len(class_weights))
    dtype = widest_float(labels.device)
    weights = class_weights.to(labels.device, dtype)
    return torch.stack([per_class.to(dtype) @ weights, void.to(dtype)])


def _pixel_counts(
    labels: Tensor,
    ignore_index: int,
    distill_void: bool,
    num_items: Tensor | int | None,
    class_weights: Tensor | None,
) -> Tensor:
    if num_items is None:
        return count_pixels(labels, ignore_index, distill_void, class_weights)
    counts = torch.as_tensor(num_items).flatten()
    if distill_void and counts.numel() != 2:
        raise ValueError(f"num_items must be two numbers with distill_void, labelled and void, got {num_items}")
    return counts


def _soft_label_sums(
    logits: Tensor,
    labels: Tensor,
    aggregated: Tensor | None,
    one_hot_weight: Tensor,
    soft_weight: Tensor,
    void_weight: Tensor | None,
    ignore_index: int,
    class_weights: Tensor | None = None,
    adaptive: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What [`FusedSoftLabelCrossEntropy`] computes, by torch's own operations and differentiable by autograd."""
    log_p = upsample(logits.float(), labels.shape[1:]).log_softmax(dim=1)
    labelled = is_labelled(labels, ignore_index)
    target = labels.masked_fill(~labelled, 0)
    weight = pixel_weights(target, labelled, class_weights)
    of_label = -log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    one_hot = (of_label * weight).sum()
    soft = void = torch.zeros_like(one_hot)
    if aggregated is None:
        return one_hot_weight * one_hot, one_hot, soft, void
    up_q = upsample(aggregated.float(), labels.shape[1:])
    of_q = -(up_q * log_p).sum(dim=1)
    soft = (of_q * weight).sum()
    trust = up_q.gather(1, target.unsqueeze(1)).squeeze(1) if adaptive else 1.0
    shares = one_hot_weight + soft_weight * (1.0 - trust), soft_weight * trust
    loss = (shares[0] * of_label * weight).sum() + (shares[1] * of_q * weight).sum()
    if void_weight is not None:
        void = of_q.masked_fill(labels != ignore_index, 0.0).sum()
        loss = loss + void_weight * void
    return loss, one_hot, soft, void


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of `(B, C, h, w)` maps to `size`, `align_corners=False`: the `up` of the formulas.

    It is what the image processors of transformers do to logits before they take the argmax.
    """
    if maps.shape[2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The most likely class of every pixel, as `upsample(logits, size).argmax(dim=1)` gives it, bit for bit.

    A few classes at a time, so that full-resolution logits exist nowhere.

    Args:
        logits: `(B, C, h, w)`.
        size: (H, W).

    Returns:
        `(B, H, W)`, int64.

    Example:
        >>> upsample_argmax(torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]]), (1, 4))
        tensor([[[0, 0, 1, 1]]])
    """
    best = logits.new_full((logits.shape[0], *size), -torch.inf)
    winner = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, logits.shape[1], _CLASSES_AT_ONCE):
        maps = upsample(logits[:, start : start + _CLASSES_AT_ONCE], size)
        highest, index = maps.max(dim=1)
        is_better = highest > best  # of equals the first wins, as in argmax
        best = torch.where(is_better, highest, best)
        winner = torch.where(is_better, index + start, winner)
    return winner


def entropy(probabilities: Tensor) -> Tensor:
    """Shannon entropy in nats of distributions along the second axis; `0 log 0` counts as 0.

    Example:
        >>> float(entropy(torch.tensor([[0.5, 0.5]])).exp())
        2.0
    """
    return torch.special.entr(probabilities).sum(dim=1)
