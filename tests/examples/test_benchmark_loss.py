"""The benchmark runs as a program and writes its numbers; their values are for a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark_loss.py"
VARIANTS = {
    "aggregation": {"materialised float32", "float32", "bfloat16", "float32, 256 keys"},
    "loss": {
        "transformers CE",
        "CE",
        "label smoothing",
        "PALS, q given",
        "self-distillation",
        *(f"PALS, {keys} keys" for keys in (64, 128, 256, 512, 2048, "all")),
    },
    "step": {
        "Trainer + CE",
        "PALSTrainer + CE",
        "PALSTrainer + PALS",
        *(f"PALSTrainer + PALS, {w}" for w in ("channels last", "all pairs")),
    },
    "evaluation": {"evaluate", "PALSTrainer", "the network alone"},
}


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "sections",
    [pytest.param(sections, marks=pytest.mark.slow) for sections in (["aggregation"], ["loss", "step", "evaluation"])],
)
def test_leaves_numbers_and_a_plot(sections, tmp_path):
    result = run("--quick", "--rounds", 1, "--output_dir", tmp_path, "--sections", *sections)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    for section in sections:
        chosen = [row for row in rows if row["section"] == section]
        assert {row["variant"] for row in chosen} == VARIANTS[section]
        assert all(row["seconds"] > 0 and row["megabytes"] >= 0 for row in chosen)
        assert chosen[0]["time_ratio"] == chosen[0]["memory_ratio"] == 1
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_when_there_is_no_gpu():
    result = run("--device", "cuda")
    assert result.returncode == 2
    assert "torch sees no GPU" in result.stderr
