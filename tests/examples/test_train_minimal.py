"""The minimal example trains, and its checkpoint serves a pipeline."""

import json
import sys
from pathlib import Path

from launching import call
from transformers import pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_minimal  # noqa: E402


def test_trains_and_serves_a_pipeline(folder, tmp_path):
    names = ["ground", "wall", "sky", "car", *map(str, range(5, 13))]  # the raw masks hold values up to 11
    (folder / "id2label.json").write_text(json.dumps(names))
    output, size = tmp_path / "run", ["--image_size", 32, 48]
    result = call(train_minimal.main, folder, *size, "--max_steps", 2, "--output_dir", output)
    assert result.returncode == 0
    assert "mean IoU" in result.stdout
    found = pipeline("image-segmentation", model=str(output))(str(next((folder / "val" / "images").iterdir())))
    assert {segment["label"] for segment in found} <= set(names)


def test_is_sixty_lines():
    assert len((EXAMPLES / "train_minimal.py").read_text().splitlines()) <= 60
