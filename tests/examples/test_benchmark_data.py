import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark_data.py"


def test_leaves_numbers(folder, tmp_path):
    pytest.importorskip("albumentations")
    command = [SCRIPT, "--dataset_dir", folder, "--void_labels", 11, "--image_size", 32, 48, "--crop_size", 32, 32]
    command += ["--rounds", 1, "--workers", 0, 1, "--images", 4, "--output_dir", tmp_path]
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads((tmp_path / "benchmark_data.json").read_text())
    pipelines = [row for row in rows if "ratio" in row]
    assert len(pipelines) == 8
    assert all(row["images_per_second"] > 0 for row in pipelines)
    assert {row["variant"] for row in rows} > {"first look", "later look"}
