"""The aggregated distribution q: predictions averaged over similar positions."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .affinity import Affinity
from .fused import is_labelled

# Fused attention kernels want a head dimension that is a multiple of this.
_HEAD_DIM_ALIGNMENT = 8
# By how much the exponent of an excluded pair lies below that of the least similar pair that counts: a million of
# excluded pairs weigh less than 1e-6.
_EXCLUSION = 30.0
# If the other keys have less than this share of a position's affinity, there is nothing to average over.
_NOTHING = 1e-3
# Number of queries that are compared with all positions at once, and of scores with blocks that are held at once: few
# on a CPU, to save memory, and enough on a GPU to fill it.
_QUERIES_AT_ONCE = {"cpu": 2**12, "cuda": 2**16}
_SCORES_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}


def aggregate_probabilities(
    features: Tensor,
    probabilities: Tensor,
    affinity: Affinity | None = None,
    *,
    labels: Tensor | None = None,
    ignore_index: int = 255,
) -> Tensor:
    r"""Average the class distributions of an image over similar positions.

    $$q_i = \sum_j S_{ij} p_j, \qquad
      S_{ij} = \frac{\exp(\hat f_i \cdot \hat f_j / \tau)}{\sum_k \exp(\hat f_i \cdot \hat f_k / \tau)}, \qquad
      \hat f = f / \lVert f \rVert_2$$

    The keys j are all positions of the image. On grids of more than `affinity.keys` positions they are means over
    square blocks of positions (of features, before normalisation, and of distributions) and the position i itself.

    All pairs are scaled dot-product attention with the features as queries and keys and the probabilities as values,
    so [`torch.nn.functional.scaled_dot_product_attention`] computes them in O(N) memory where torch has a fused
    kernel. No setting changes that: the pairs that count are written into extra dimensions, not into a mask. The
    scores of few keys are computed directly, for some positions at a time.

    Args:
        features: `(B, D, h, w)`, float32, bfloat16 or float16; they are normalised here. All pairs are compared in
            their dtype: bfloat16 features give a relative error of about 1e-2 and are faster where the hardware
            multiplies bfloat16 natively. Few keys are compared in float32.
        probabilities: `(B, C, h, w)`, the distribution of each position over the C classes.
        affinity: see [`Affinity`]. Its `temperature` and `source` describe how the two maps are made, and are not
            used here.
        labels: `(B, H, W)`, for `pairs="same_class"` and `unlabeled_keys=False`. See [`pool_labels`].
        ignore_index: label of unlabelled pixels. [`PADDING_INDEX`] is no label either.

    Returns:
        `(B, C, h, w)` in the dtype of `probabilities`; the distribution of each position sums to one.

    Raises:
        ValueError: shapes do not fit together, or labels are needed and not given.

    Example:
        >>> features, probabilities = torch.randn(1, 8, 4, 6), torch.randn(1, 3, 4, 6).softmax(dim=1)
        >>> aggregate_probabilities(features, probabilities, Affinity(tau=0.3)).shape
        torch.Size([1, 3, 4, 6])
    """
    affinity = affinity or Affinity()
    _check_maps(features, probabilities, affinity, labels)
    if affinity.weight == 0.0:
        return probabilities
    grid = features.shape[2:]
    stride = stride_of_keys(grid, affinity.keys)
    block_keys = None if stride == 1 else _unit_vectors(_block_means(features.float(), stride), torch.float32)
    tags = None
    if affinity.needs_labels and labels is not None:
        num_classes = probabilities.shape[1]
        of_positions, of_keys = (
            pool_labels(labels, grid, num_classes, ignore_index, blocks).flatten(1) for blocks in (1, stride)
        )
        tags = _PairTags(of_positions, of_keys, num_classes, affinity, ignore_index)
    q = own = _to_vectors(probabilities.float())  # (B, N, C)
    for _ in range(affinity.steps):
        if block_keys is None:
            averaged = _average_over_positions(features, q, affinity, tags)
        else:
            values = _block_means(q.transpose(1, 2).unflatten(2, grid), stride).flatten(2)
            averaged = _average_over_blocks(features, block_keys, values, q, affinity, tags)
        q = affinity.weight * averaged + (1 - affinity.weight) * own if affinity.weight < 1.0 else averaged
    return q.transpose(1, 2).unflatten(2, grid).to(probabilities.dtype)


def _check_maps(features: Tensor, probabilities: Tensor, affinity: Affinity, labels: Tensor | None) -> None:
    shapes = f"features {tuple(features.shape)} and probabilities {tuple(probabilities.shape)}"
    if features.ndim != 4 or probabilities.ndim != 4:
        raise ValueError(f"features and probabilities must be (B, D, h, w) and (B, C, h, w), got {shapes}")
    if features.shape[0] != probabilities.shape[0] or features.shape[2:] != probabilities.shape[2:]:
        raise ValueError(f"{shapes} must share batch size and grid")
    if affinity.needs_labels and (labels is None or labels.ndim != 3 or labels.shape[0] != features.shape[0]):
        got = "none" if labels is None else tuple(labels.shape)
        raise ValueError(
            f"pairs={affinity.pairs!r} with unlabeled_keys={affinity.unlabeled_keys} needs labels (B, H, W), got {got}"
        )


def stride_of_keys(grid: Sequence[int], keys: int | None) -> int:
    """Return the side of the smallest square blocks of positions of which a grid has no more than `keys`.

    Example:
        >>> stride_of_keys((128, 128), 256)
        8
    """
    stride = 1
    while keys is not None and math.ceil(grid[0] / stride) * math.ceil(grid[1] / stride) > keys:
        stride += 1
    return stride


def pool_labels(
    labels: Tensor, grid: Sequence[int], num_classes: int, ignore_index: int = 255, stride: int = 1
) -> Tensor:
    """Give each position of a grid, or block of positions, the majority label of the pixels it covers.

    Args:
        labels: `(B, H, W)`, int64.
        grid: (h, w). Where it is finer than the labels, positions in between take the label they lie on.
        num_classes: C. Memory is B x h x w x C counts.
        ignore_index: label of unlabelled pixels, and of positions without a labelled pixel.
        stride: side of the blocks of positions.

    Returns:
        `(B, ceil(h / stride), ceil(w / stride))`, int64. The lowest class wins a tie.

    Example:
        >>> pool_labels(torch.tensor([[[0, 1, 255, 255], [1, 1, 255, 2]]]), (1, 2), 3)
        tensor([[[1, 2]]])
    """
    size = [max(have, want) for have, want in zip(labels.shape[1:], grid, strict=True)]
    if size != list(labels.shape[1:]):
        rows, columns = (torch.arange(n, device=labels.device) for n in size)
        labels = labels[:, (rows * labels.shape[1] // size[0])[:, None], columns * labels.shape[2] // size[1]]
    rows, columns = (
        torch.arange(have, device=labels.device) * want // have // stride
        for have, want in zip(size, grid, strict=True)
    )
    grid = (math.ceil(grid[0] / stride), math.ceil(grid[1] / stride))
    batch, blocks = labels.shape[0], grid[0] * grid[1]
    block = rows[:, None] * grid[1] + columns + torch.arange(batch, device=labels.device)[:, None, None] * blocks
    valid = is_labelled(labels, ignore_index)
    counts = torch.bincount((block * num_classes + labels)[valid], minlength=batch * blocks * num_classes)
    most, winner = counts.view(batch, *grid, num_classes).max(dim=-1)
    return winner.masked_fill(most == 0, ignore_index)


def _block_means(maps: Tensor, stride: int) -> Tensor:
    """Means of `stride x stride` blocks; those at the lower and right edges may be smaller."""
    return F.avg_pool2d(maps, stride, ceil_mode=True, count_include_pad=False)


def _to_vectors(maps: Tensor) -> Tensor:
    """`(B, D, h, w)` to `(B, N, D)`."""
    return maps.flatten(2).transpose(1, 2)


def _unit_vectors(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """`(B, D, ...)` to L2-normalised `(B, N, D)`. In float32: squares of half-precision values overflow or vanish."""
    return F.normalize(maps.flatten(2).float(), dim=1).transpose(1, 2).to(dtype)


class _PairTags:
    """The pairs that count, as a mask for blocks, and as extra dimensions of queries and keys for all positions.

    With the extra dimensions, keys of the query's own class score higher than all others with `pairs="same_class"`,
    and keys without a label score lower than all others without `unlabeled_keys`.

    Args:
        of_positions, of_keys: labels `(B, N)` and `(B, M)`.
    """

    def __init__(self, of_positions: Tensor, of_keys: Tensor, num_classes: int, affinity: Affinity, ignore_index: int):
        self.of_positions, self.of_keys = of_positions, of_keys
        self.is_same_class, self.skips_unlabeled = affinity.pairs == "same_class", not affinity.unlabeled_keys
        self.classes, self.ignore_index = torch.arange(num_classes, device=of_keys.device), ignore_index
        # Similarities lie in [-1, 1]; excluded pairs have to lie far below that, after the division by tau.
        self.penalty = 2.0 + _EXCLUSION * affinity.tau
        self.has_keys = self._find_keys()[..., None]

    def counted(self, part: slice) -> Tensor:
        """Whether keys count for some positions, boolean `(B, M, n)`."""
        labels = self.of_positions[:, None, part]
        counted = torch.ones_like(self.of_keys[..., None] + labels, dtype=torch.bool)
        if self.skips_unlabeled:
            counted &= (self.of_keys != self.ignore_index)[..., None]
        if self.is_same_class:
            counted &= (self.of_keys[..., None] == labels) | (labels == self.ignore_index)
        return counted

    def counts_itself(self, part: slice) -> Tensor:
        """Whether some positions count for themselves, boolean `(B, 1, n)`."""
        labels = self.of_positions[:, None, part]
        return (labels != self.ignore_index) | (not self.skips_unlabeled)

    def as_queries(self, part: slice) -> Tensor:
        """The extra dimensions of some positions as queries, `(B, n, T)`."""
        labels = self.of_positions[:, part]
        tags = [self._one_hot(labels) * self.penalty] if self.is_same_class else []
        if self.skips_unlabeled:
            tags.append(torch.full_like(labels, self.penalty, dtype=torch.float32)[..., None])
        return torch.cat(tags, dim=2)

    def as_keys(self) -> Tensor:
        """The extra dimensions of the keys, `(B, M, T)`."""
        tags = [self._one_hot(self.of_keys)] if self.is_same_class else []
        if self.skips_unlabeled:
            tags.append(-(self.of_keys == self.ignore_index).float()[..., None])
        return torch.cat(tags, dim=2)

    def _one_hot(self, labels: Tensor) -> Tensor:
        return (labels[..., None] == self.classes).float()

    def _find_keys(self) -> Tensor:
        """Tell whether a position `(B, N)` has any key left: where all keys are excluded, all score alike."""
        found = torch.ones_like(self.of_keys, dtype=torch.bool)
        if self.skips_unlabeled:
            found = self.of_keys != self.ignore_index
        has_keys = found.any(dim=1, keepdim=True).expand_as(self.of_positions)
        if self.is_same_class:
            present = self._one_hot(self.of_keys).any(dim=1)  # (B, C)
            is_class = (self.of_positions >= 0) & (self.of_positions < len(self.classes))
            own = present.gather(1, self.of_positions.masked_fill(~is_class, 0))
            has_keys = torch.where(is_class, own, has_keys)
        return has_keys


def _average_over_blocks(
    features: Tensor, keys: Tensor, values: Tensor, own: Tensor, affinity: Affinity, tags: _PairTags | None
) -> Tensor:
    """Average `values` `(B, C, M)` over blocks with `keys` `(B, M, D)`: float32 `(B, N, C)`.

    With `affinity.include_self` the position itself, whose distribution is in `own` `(B, N, C)`, is one more key.
    """
    keys, flat, q = keys / affinity.tau, features.flatten(2), torch.empty_like(own)
    at_once = max(1, _SCORES_AT_ONCE.get(own.device.type, _SCORES_AT_ONCE["cuda"]) // keys.shape[1])
    for start in range(0, own.shape[1], at_once):
        part = slice(start, start + at_once)
        with torch.autocast(own.device.type, enabled=False):
            vectors = flat[:, :, part].float()  # (B, D, n)
            norm = vectors.norm(dim=1, keepdim=True)
            scores = (keys @ vectors) / norm.clamp(min=1e-12)  # (B, M, n)
            if tags is not None:
                scores = scores.masked_fill(~tags.counted(part), -torch.inf)
            if affinity.include_self:
                score = (norm > 0).float() / affinity.tau
                if tags is not None:
                    score = score.masked_fill(~tags.counts_itself(part), -torch.inf)
                scores = torch.cat([scores, score], dim=1)
            weights = scores.softmax(dim=1)
            average = (values @ weights[:, : keys.shape[1]]).transpose(1, 2)  # (B, n, C)
        if affinity.include_self:
            average = average + weights[:, -1, :, None] * own[:, part]
        q[:, part] = average if tags is None else torch.where(tags.has_keys[:, part], average, own[:, part])
    return q


def _average_over_positions(features: Tensor, own: Tensor, affinity: Affinity, tags: _PairTags | None) -> Tensor:
    """Average `own` `(B, N, C)` over all positions, for some queries at a time: float32 `(B, N, C)`.

    Without `affinity.include_self` one more key, a sink, scores with every query exactly as the query does with
    itself. The weight of the sink, which comes back in an extra channel of the values, is therefore the weight of the
    position itself, and its distribution can be taken out of the average.
    """
    # Half precision would lose the small rest that a dominant own weight leaves to the other positions.
    dtype = features.dtype if affinity.include_self else torch.float32
    positions, values = _unit_vectors(features, features.dtype).to(dtype), own
    if tags is not None:
        positions = torch.cat([positions, tags.as_keys().to(dtype)], dim=2)
    keys = positions
    if not affinity.include_self:
        sink = F.pad(keys.new_zeros(keys.shape[0], 1, keys.shape[2]), (0, 1), value=1.0)
        keys = torch.cat([F.pad(keys, (0, 1)), sink], dim=1)
        values = F.pad(values, (0, 1, 0, 1))
        values[:, -1, -1] = 1.0
    # Kernels need one head dimension for queries, keys and values, else torch falls back to the N x M matrix.
    head_dim = max(keys.shape[2], values.shape[2])
    head_dim += -head_dim % _HEAD_DIM_ALIGNMENT
    head_keys, head_values = _to_head(keys, head_dim), _to_head(values.to(dtype), head_dim)

    q, at_once = torch.empty_like(own), _QUERIES_AT_ONCE.get(own.device.type, _QUERIES_AT_ONCE["cuda"])
    for start in range(0, own.shape[1], at_once):
        part = slice(start, start + at_once)
        queries = _unit_vectors(features.flatten(2)[:, :, part], features.dtype).to(dtype)
        if tags is not None:
            queries = torch.cat([queries, tags.as_queries(part).to(dtype)], dim=2)
        if not affinity.include_self:
            score = (queries * positions[:, part]).sum(dim=2, keepdim=True)
            queries = torch.cat([queries, score], dim=2)
        with torch.autocast(own.device.type, enabled=False):
            head_queries = _to_head(queries, head_dim)
            attended = F.scaled_dot_product_attention(head_queries, head_keys, head_values, scale=1.0 / affinity.tau)
        average = attended[:, 0, :, : values.shape[2]].float()
        # One already in real numbers; in half precision the rounded weights do not quite sum to one.
        average = average / average.sum(dim=2, keepdim=True)
        if not affinity.include_self:
            average = _without_self(average[..., :-1], average[..., -1:], own[:, part])
        q[:, part] = average if tags is None else torch.where(tags.has_keys[:, part], average, own[:, part])
    return q


def _without_self(average: Tensor, weight: Tensor, own: Tensor) -> Tensor:
    """Take a position's own distribution, of the given weight, out of an average."""
    others = (average - weight * own).clamp(min=0.0)
    share = others.sum(dim=2, keepdim=True)
    return torch.where(share > _NOTHING, others / share, own)


def _to_head(vectors: Tensor, head_dim: int) -> Tensor:
    """`(B, N, D)` to one attention head `(B, 1, N, head_dim)`, zero-padded: zeros change no dot product."""
    # Contiguous in the channels, or torch falls back to the N x N matrix.
    return F.pad(vectors, (0, head_dim - vectors.shape[2])).contiguous().unsqueeze(1)
