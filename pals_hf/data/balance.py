"""Help for rare classes: weights for the loss, and which classes and images are rare."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..errors import InputError

WEIGHTINGS = ("none", "inverse", "median_frequency", "effective_number")


def class_weights(
    class_pixels: Iterable[Iterable[int]], method: str, *, effective_beta: float = 1.0 - 1e-6
) -> list[float]:
    """A weight of each class for the loss, with mean 1 over the labelled pixels.

    With `n_c` the pixels of class c, `n = sum n_c`, and C the classes that occur:

    - `inverse`: `n / (C n_c)`
    - `median_frequency`: `median(f) / f_c`, with `f_c` the share of c in the labelled pixels of the images that show
      it (Eigen, Fergus. ICCV 2015)
    - `effective_number`: `1 / (1 - b^n_c)`, b = `effective_beta` (Cui et al. Class-Balanced Loss Based on Effective
      Number of Samples. CVPR 2019)
    - `none`: 1

    each scaled so that `sum_c n_c w_c = n`: the learning rate means the same with and without weights. A class that
    does not occur has weight 1.

    Args:
        class_pixels: for each image its pixels of each class, void left out.
        method: see above.
        effective_beta: near 1; `1 / (1 - b)` is the number of pixels from which on more of them add little.

    Raises:
        InputError: `method` is none of these, or no pixel is labelled.

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
        raise InputError("class weights need labelled pixels, there are none")
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
    """The classes with less than half of an even share of the labelled pixels, those that occur at all.

    Example:
        >>> rare_classes([[90, 0, 10]])
        [2]
    """
    pixels = np.sum([list(row) for row in class_pixels], axis=0)
    even = pixels.sum() / len(pixels)
    return [index for index, count in enumerate(pixels) if 0 < count < even / 2]
