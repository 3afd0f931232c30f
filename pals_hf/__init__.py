"""PALS for Hugging Face: train segmentation models with few labelled images.

Names are loaded when first used, so `import pals_hf` is cheap.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "PALSConfig": "config",
    "PALSLoss": "losses",
    "PALSTrainer": "trainer",
    "SegmentationMetrics": "metrics",
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
