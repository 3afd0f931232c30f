"""Support for rare classes: class weights for the loss, and finding the rare classes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..errors import InputError

WEIGHTINGS = ("none", "inverse", "median_frequency", "effective_number")


def class_weights(
    class_pixels: Iterable[Iterable[int]], method: str, *, effective_beta: float = 1.0 - 1e-6
) -> list[float]:
    """Compute a weight for each class in the loss, with mean 1 over the labelled pixels.

    With `n_c` the number of pixels of class c, `n = sum n_c`, and C the number of classes that occur:

    - `inverse`: `n / (C n_c)`
    - `median_frequency`: `median(f) / f_c`, with `f_c` the share of class c in the labelled pixels of the images that
      contain it (Eigen, Fergus. ICCV 2015)
    - `effective_number`: `1 / (1 - b^n_c)`, b = `effective_beta` (Cui et al. Class-Balanced Loss Based on Effective
      Number of Samples. CVPR 2019)
    - `none`: 1

    The weights are scaled so that `sum_c n_c w_c = n`, which keeps the scale of the loss and its gradient. A
    class that does not occur has weight 1.

    Args:
        class_pixels: for each image, the number of pixels of each class, without unlabelled pixels.
        method: one of the methods above.
        effective_beta: the b of `effective_number`, close to 1. Beyond `1 / (1 - b)` pixels, more pixels of a class
            change its weight little.

    Raises:
        InputError: `method` is unknown, or no pixel is labelled.

    Example:
        >>> class_weights([[3, 1]], "inverse")
        [0.6666666666666666, 2.0]
    """
    if method not in WEIGHTINGS:
        raise InputError(f"class_weighting must be one of {', '.join(WEIGHTINGS)}, got {method!r}")
    images = np.asarray([list(row) for row in class_pixels], dtype=np.float64)
    pixels = images.sum(axis=0) if images.size else np.zeros(1)
    occurs = pixels > 0
    if not occurs.any():
        raise InputError("class weights need labelled pixels, but the images have none")
    weights = np.ones_like(pixels)
    if method == "inverse":
        weights[occurs] = pixels.sum() / (occurs.sum() * pixels[occurs])
    elif method == "median_frequency":
        beside = np.array([images[images[:, c] > 0].sum() if occurs[c] else 1.0 for c in range(len(pixels))])
        frequency = pixels / beside
        weights[occurs] = np.median(frequency[occurs]) / frequency[occurs]
    elif method == "effective_number":
        weights[occurs] = 1.0 / -np.expm1(pixels[occurs] * np.log(effective_beta))
    weights[occurs] *= pixels.sum() / (pixels * weights)[occurs].sum()
    return weights.tolist()


def rare_classes(class_pixels: Iterable[Iterable[int]]) -> list[int]:
    """Return the classes that occur, but in fewer than `n / (2 C)` of the n labelled pixels, with C classes.

    Example:
        >>> rare_classes([[90, 0, 10]])
        [2]
    """
    pixels = np.sum([list(row) for row in class_pixels], axis=0)
    even = pixels.sum() / len(pixels)
    return [index for index, count in enumerate(pixels) if 0 < count < even / 2]
