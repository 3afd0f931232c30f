"""The PALS mathematics as plain functions on tensors. Needs torch and nothing else.

Notation, used throughout the package:

| symbol | meaning                                                                       | shape    |
|--------|-------------------------------------------------------------------------------|----------|
| `f_i`  | feature of position i on the classifier's own grid, L2-normalised             | `(D,)`   |
| `z_i`  | logits of position i on that grid of `N = h * w` positions                    | `(C,)`   |
| `p_i`  | `softmax(z_i / T)`, with the temperature T                                    | `(C,)`   |
| `S_ij` | `exp(f_i . f_j / tau) / sum_k exp(f_i . f_k / tau)`                           | `(N, M)` |
| `q_i`  | `sum_j S_ij p_j`, the aggregated distribution, without gradient               | `(C,)`   |
| `y~_u` | `(1 - b) onehot(y_u) + b up(q)_u`, the soft label of label pixel u            | `(C,)`   |
| `b`    | `beta`, or with `adaptive_beta` `beta up(q)_u` at the label `y_u`             | scalar   |

Reference: Park, Kim, Heo. Semantic Segmentation Using Pixel-Wise Adaptive Label Smoothing via Self-Knowledge
Distillation for Limited Labeling Data. Sensors 22(7):2623, 2022. https://doi.org/10.3390/s22072623. The abstract
leaves open which features make `S`, its temperature and the mixing weight. This module is a reconstruction, and each
of these choices is a setting of [`Affinity`] or an argument.
"""

from .affinity import PAIRS, SOURCES, Affinity
from .aggregation import aggregate_probabilities, pool_labels, stride_of_keys
from .fused import PADDING_INDEX, is_labelled
from .interpolation import upsample, upsample_argmax
from .soft_labels import count_pixels, entropy, soft_label_cross_entropy

__all__ = [
    "PADDING_INDEX",
    "PAIRS",
    "SOURCES",
    "Affinity",
    "aggregate_probabilities",
    "count_pixels",
    "entropy",
    "is_labelled",
    "pool_labels",
    "soft_label_cross_entropy",
    "stride_of_keys",
    "upsample",
    "upsample_argmax",
]
