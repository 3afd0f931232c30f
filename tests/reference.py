"""The formulas written out with materialised float64 matrices: slow, large, and easy to check by eye."""

import math

import torch
import torch.nn.functional as F


def pool_labels(labels, grid, num_classes, ignore_index=255, stride=1):
    """Majority per block of cells."""
    shares = label_shares(labels, grid, num_classes, stride)
    return torch.where(shares.sum(dim=3) > 0, shares.argmax(dim=3), ignore_index)


def label_shares(labels, grid, num_classes, stride=1):
    """Class shares per block of cells by counting pixel by pixel, 0 where there is no label.

    The label map must not be smaller than the grid.
    """
    counts = torch.zeros(labels.shape[0], *(-(-n // stride) for n in grid), num_classes, dtype=torch.float64)
    for image in range(labels.shape[0]):
        for row in range(labels.shape[1]):
            for column in range(labels.shape[2]):
                label = int(labels[image, row, column])
                if 0 <= label < num_classes:
                    cell = (row * grid[0] // labels.shape[1], column * grid[1] // labels.shape[2])
                    counts[image, cell[0] // stride, cell[1] // stride, label] += 1
    return counts / counts.sum(dim=3, keepdim=True).clamp(min=1)


def block_means(maps, stride):
    """Means of blocks of cells, smaller at the lower and right edges."""
    height, width = maps.shape[2:]
    rows = [
        torch.stack(
            [maps[:, :, y : y + stride, x : x + stride].mean(dim=(2, 3)) for x in range(0, width, stride)], dim=2
        )
        for y in range(0, height, stride)
    ]
    return torch.stack(rows, dim=2)


def aggregate(
    features,
    probabilities,
    tau,
    labels=None,
    pairs="all",
    include_self=True,
    void_keys=True,
    propagation_steps=1,
    propagation_weight=1.0,
    anchor_weight=0.0,
    affinity_stride=1,
    affinity_pooling="both",
):
    num_classes, grid = probabilities.shape[1], probabilities.shape[2:]
    queries = F.normalize(features.double(), dim=1)
    keys, own = queries, probabilities.double()
    if affinity_stride > 1:
        keys = F.normalize(block_means(features.double(), affinity_stride), dim=1)
        if affinity_pooling == "both":
            queries, own = keys, block_means(own, affinity_stride)
    query_grid, key_grid = queries.shape[2:], keys.shape[2:]
    similarity = queries.flatten(2).transpose(1, 2) @ keys.flatten(2) / tau  # (B, N, M)
    counts = torch.ones_like(similarity, dtype=torch.bool)
    if pairs == "same_class" or not void_keys:
        of_cells, of_blocks = (
            pool_labels(labels, grid, num_classes, stride=s).flatten(1) for s in (1, affinity_stride)
        )
        of_query, of_key = of_cells if query_grid == grid else of_blocks, of_blocks
        if not void_keys:
            counts &= (of_key != 255)[:, None, :]
        if pairs == "same_class":
            counts &= (of_query[:, :, None] == of_key[:, None, :]) | (of_query == 255)[:, :, None]
    if not include_self:
        counts &= ~torch.eye(similarity.shape[1], dtype=torch.bool)
    if anchor_weight:
        shares = label_shares(labels, grid, num_classes, stride=affinity_stride).flatten(1, 2)
        is_anchor = shares.sum(dim=2) > 0
        similarity = similarity + math.log(anchor_weight) * is_anchor[:, None, :]
    weights = torch.softmax(similarity.masked_fill(~counts, -torch.inf), dim=2)
    q = own
    for _ in range(propagation_steps):
        values = q if query_grid == key_grid else block_means(q, affinity_stride)
        values = values.flatten(2).transpose(1, 2)
        if anchor_weight:
            values = torch.where(is_anchor[..., None], shares, values)
        averaged = (weights @ values).transpose(1, 2).unflatten(2, query_grid)
        averaged = torch.where(averaged.isnan(), q, averaged)  # nobody is left to average over
        q = propagation_weight * averaged + (1 - propagation_weight) * own
    if query_grid != grid:
        q = F.interpolate(q, scale_factor=affinity_stride, mode="bilinear", align_corners=False)
        q = q[:, :, : grid[0], : grid[1]]
    return q


def soft_label_loss(logits, labels, aggregated, beta, ignore_index=255, distill_void=False, adaptive=False):
    num_classes, size = logits.shape[1], labels.shape[1:]
    log_p = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False).log_softmax(dim=1)
    q = F.interpolate(aggregated.double(), size=size, mode="bilinear", align_corners=False)
    total, count, void_total, void_count = 0.0, 0, 0.0, 0
    for image in range(labels.shape[0]):
        for row in range(size[0]):
            for column in range(size[1]):
                label = int(labels[image, row, column])
                pixel_q, pixel_log_p = q[image, :, row, column], log_p[image, :, row, column]
                if label == ignore_index:
                    void_total = void_total - (pixel_q * pixel_log_p).sum()
                    void_count += 1
                elif label >= 0:
                    one_hot = F.one_hot(torch.tensor(label), num_classes).double()
                    share = beta * pixel_q[label] if adaptive else beta
                    total = total - (((1 - share) * one_hot + share * pixel_q) * pixel_log_p).sum()
                    count += 1
    loss = total / count
    return loss + beta * void_total / void_count if distill_void else loss
