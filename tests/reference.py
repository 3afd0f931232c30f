"""The formulas written out with materialised float64 matrices: slow, large, and easy to check by eye."""

import torch
import torch.nn.functional as F


def aggregate(features, probabilities, tau):
    f = F.normalize(features.double(), dim=1).flatten(2)  # (B, D, N)
    p = probabilities.double().flatten(2)  # (B, C, N)
    similarity = torch.softmax(f.transpose(1, 2) @ f / tau, dim=2)  # (B, N, N), rows sum to one
    return (similarity @ p.transpose(1, 2)).transpose(1, 2).reshape(probabilities.shape)


def soft_label_loss(logits, labels, aggregated, beta, ignore_index=255):
    num_classes, size = logits.shape[1], labels.shape[1:]
    log_p = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False).log_softmax(dim=1)
    q = F.interpolate(aggregated.double(), size=size, mode="bilinear", align_corners=False)
    total, count = 0.0, 0
    for image in range(labels.shape[0]):
        for row in range(size[0]):
            for column in range(size[1]):
                label = int(labels[image, row, column])
                if label == ignore_index:
                    continue
                one_hot = F.one_hot(torch.tensor(label), num_classes).double()
                soft = (1 - beta) * one_hot + beta * q[image, :, row, column]
                total = total - (soft * log_p[image, :, row, column]).sum()
                count += 1
    return total / count
