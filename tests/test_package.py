import doctest
import importlib
import subprocess
import sys

import pytest

import pals_hf


def test_public_names():
    assert set(pals_hf.__all__) == {
        "Affinity",
        "PALSConfig",
        "PALSLoss",
        "PALSTrainer",
        "SegmentationMetrics",
        "compute_loss_func",
        "load_segmentation_dataset",
        "train_fraction",
    }
    for name in pals_hf.__all__:
        assert callable(getattr(pals_hf, name))
        assert name in dir(pals_hf)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pals_hf.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import pals_hf", {"torch", "transformers", "datasets", "evaluate"}),
        ("from pals_hf import PALSLoss, SegmentationMetrics", {"transformers", "datasets", "evaluate"}),
        ("from pals_hf import compute_loss_func", {"evaluate", "datasets", "accelerate", "pals_hf.trainer"}),
        ("from pals_hf import PALSTrainer", {"evaluate", "matplotlib"}),
    ],
)
def test_imports_are_light(statement, unwanted):
    script = f"{statement}; import sys; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not unwanted & set(loaded)


@pytest.mark.parametrize(
    "module",
    [
        "functional.aggregation",
        "functional.soft_labels",
        "functional.interpolation",
        "losses.pals",
        "metrics",
        "data.fractions",
    ],
)
def test_docstring_examples(module):
    results = doctest.testmod(importlib.import_module(f"pals_hf.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
