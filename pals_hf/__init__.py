"""PALS for Hugging Face: train segmentation models with few labelled images.

Names are loaded when they are first used, so `import pals_hf` is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # type checkers do not see the lazy names
    from .config import PALSConfig as PALSConfig
    from .data import load_segmentation_dataset as load_segmentation_dataset
    from .data import train_fraction as train_fraction
    from .functional import Affinity as Affinity
    from .losses import PALSLoss as PALSLoss
    from .metrics import SegmentationMetrics as SegmentationMetrics
    from .network_loss import compute_loss_func as compute_loss_func
    from .trainer import PALSTrainer as PALSTrainer

__version__ = "0.1.0"

_HOMES = {
    "Affinity": "functional",
    "PALSConfig": "config",
    "PALSLoss": "losses",
    "PALSTrainer": "trainer",
    "SegmentationMetrics": "metrics",
    "compute_loss_func": "network_loss",
    "load_segmentation_dataset": "data",
    "train_fraction": "data",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
