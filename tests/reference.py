"""The formulas written out with materialised float64 matrices: slow, large, and easy to check by eye."""

import torch
import torch.nn.functional as F


def pool_labels(labels, grid, num_classes, ignore_index=255, stride=1):
    """Majority per block of positions by counting pixel by pixel. The label map must not be smaller than the grid."""
    counts = torch.zeros(labels.shape[0], *(-(-n // stride) for n in grid), num_classes, dtype=torch.int64)
    for image in range(labels.shape[0]):
        for row in range(labels.shape[1]):
            for column in range(labels.shape[2]):
                label = int(labels[image, row, column])
                if 0 <= label < num_classes:
                    at = (row * grid[0] // labels.shape[1], column * grid[1] // labels.shape[2])
                    counts[image, at[0] // stride, at[1] // stride, label] += 1
    return torch.where(counts.sum(dim=3) > 0, counts.argmax(dim=3), ignore_index)


def block_means(maps, stride):
    """Means of blocks of positions, smaller at the lower and right edges."""
    height, width = maps.shape[2:]
    rows = [
        torch.stack(
            [maps[:, :, y : y + stride, x : x + stride].mean(dim=(2, 3)) for x in range(0, width, stride)], dim=2
        )
        for y in range(0, height, stride)
    ]
    return torch.stack(rows, dim=2)


def aggregate(features, probabilities, affinity, labels=None, stride=1):
    """`stride` is the side of the blocks of positions that are keys, worked out by hand for `affinity.keys`."""
    num_classes, grid = probabilities.shape[1], probabilities.shape[2:]
    queries = F.normalize(features.double(), dim=1)
    keys = queries if stride == 1 else F.normalize(block_means(features.double(), stride), dim=1)
    own = probabilities.double()
    similarity = queries.flatten(2).transpose(1, 2) @ keys.flatten(2)  # (B, N, M)
    counts = torch.ones_like(similarity, dtype=torch.bool)
    itself = torch.eye(similarity.shape[1], dtype=torch.bool).expand(len(queries), -1, -1)
    if affinity.needs_labels:
        of_query, of_key = (pool_labels(labels, grid, num_classes, stride=s).flatten(1) for s in (1, stride))
        if not affinity.unlabeled_keys:
            counts &= (of_key != 255)[:, None, :]
            itself = itself & (of_query != 255)[:, None, :]
        if affinity.pairs == "same_class":
            counts &= (of_query[:, :, None] == of_key[:, None, :]) | (of_query == 255)[:, :, None]
    if stride > 1 and affinity.include_self:  # N more keys, of which each query sees its own
        similarity = torch.cat(
            [
                similarity,
                torch.einsum("bnd,bnd->bn", *[queries.flatten(2).transpose(1, 2)] * 2)[:, None].expand(
                    -1, similarity.shape[1], -1
                ),
            ],
            dim=2,
        )
        has_keys = counts.any(dim=2, keepdim=True)
        counts = torch.cat([counts, itself & has_keys], dim=2)
    elif not affinity.include_self and stride == 1:
        counts &= ~itself
    weights = torch.softmax((similarity / affinity.tau).masked_fill(~counts, -torch.inf), dim=2)
    q = own
    for _ in range(affinity.steps):
        values = q.flatten(2) if stride == 1 else block_means(q, stride).flatten(2)
        if weights.shape[2] > values.shape[2]:
            values = torch.cat([values, q.flatten(2)], dim=2)
        averaged = (weights @ values.transpose(1, 2)).transpose(1, 2).unflatten(2, grid)
        averaged = torch.where(averaged.isnan(), q, averaged)  # no key is left to average over
        q = affinity.weight * averaged + (1 - affinity.weight) * own
    return q


def soft_label_loss(logits, labels, aggregated, beta, ignore_index=255, distill_unlabeled=False, adaptive=False):
    num_classes, size = logits.shape[1], labels.shape[1:]
    log_p = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False).log_softmax(dim=1)
    q = F.interpolate(aggregated.double(), size=size, mode="bilinear", align_corners=False)
    total, count, unlabeled_total, unlabeled_count = 0.0, 0, 0.0, 0
    for image in range(labels.shape[0]):
        for row in range(size[0]):
            for column in range(size[1]):
                label = int(labels[image, row, column])
                pixel_q, pixel_log_p = q[image, :, row, column], log_p[image, :, row, column]
                if label == ignore_index:
                    unlabeled_total = unlabeled_total - (pixel_q * pixel_log_p).sum()
                    unlabeled_count += 1
                elif label >= 0:
                    one_hot = F.one_hot(torch.tensor(label), num_classes).double()
                    share = beta * pixel_q[label] if adaptive else beta
                    total = total - (((1 - share) * one_hot + share * pixel_q) * pixel_log_p).sum()
                    count += 1
    loss = total / count
    return loss + beta * unlabeled_total / unlabeled_count if distill_unlabeled else loss
