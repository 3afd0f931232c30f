import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("pycocotools")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import benchmark_first_look
from launching import call

from pals_hf import load_segmentation_dataset


@pytest.mark.parametrize("kind", benchmark_first_look.FORMATS)
def test_writes_exports_that_load(kind, tmp_path):
    benchmark_first_look.write_export(tmp_path / "export", kind, 6)
    data = load_segmentation_dataset(dataset_dir=tmp_path / "export")
    assert len(data.train) + len(data.validation) == 6
    assert data.id2label == {0: "background", 1: "a", 2: "b"}


@pytest.mark.slow
def test_prints_time_and_memory():
    printed = call(benchmark_first_look.main, "--images", 4, 8).stdout
    assert len(re.findall(r"^(coco|labelme) +[48] +[\d.]+ s +[\d.]+ s +\d+ MB$", printed, re.MULTILINE)) == 4
    assert printed.count("memory: ") == 2
