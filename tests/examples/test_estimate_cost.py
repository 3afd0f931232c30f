"""The formula beside the measurement, for memory only: times need a quiet machine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "estimate_cost.py"
sys.path.insert(0, str(SCRIPT.parent))

import estimate_cost  # noqa: E402
from launching import call  # noqa: E402


def test_keys_and_positions():
    case = estimate_cost.Case((1024, 2048), 19, 1, keys=256)
    assert case.grid == (256, 512)
    assert case.blocks == 242  # blocks of 24 x 24 positions
    assert estimate_cost.Case((1024, 2048), 19, 1, output_stride=8).grid == (128, 256)


def test_says_what_a_run_needs():
    result = call(estimate_cost.main, "--crop_size", 1024, 2048, "--num_labels", 150)
    assert "131072 positions are compared with" in result.stdout
    megabytes = [float(number) for number in re.findall(r"([\d.]+) MB", result.stdout)]
    assert megabytes == [
        pytest.approx(value, abs=0.6) for value in estimate_cost.Case((1024, 2048), 150, 1).megabytes().values()
    ]


@pytest.mark.slow
def test_formula_and_measurement_agree():
    """Of the largest part that is quick to measure; allocators differ, so not to the last megabyte."""
    command = [
        sys.executable,
        SCRIPT,
        "--crop_size",
        "512",
        "1024",
        "--num_labels",
        "150",
        "--measure",
        "--rounds",
        "1",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    ratios = {line[:19].strip(): float(line.split("MB")[2].split()[0]) for line in result.stdout.splitlines()[3:]}
    assert ratios.keys() == set(estimate_cost.PARTS)
    assert ratios["together"] == pytest.approx(1.0, abs=0.35)
