"""Tables and figures from results, and a real study of two runs."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import RAW_VOID
from launching import call
from PIL import Image

pytest.importorskip("ray")
pytest.importorskip("scipy")
Figure = pytest.importorskip("matplotlib.figure").Figure
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import study_fractions  # noqa: E402
import sweep  # noqa: E402

GRID = {
    "method": {"ce": {"loss": "ce"}, "pals": {"loss": "pals"}},
    "train_fraction": [0.1, 0.5],
    "pair": {str(index): {"fraction_seed": index, "seed": index} for index in range(6)},
}


@pytest.fixture
def study(tmp_path):
    """Results as the runs would leave them: PALS gains 2 points at 10 %, of which nothing is left at 50 %."""
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"common": {"max_steps": 5}, "grid": GRID}, sort_keys=False))
    generator = np.random.default_rng(0)
    easy = {pair: generator.normal(0, 0.03) for pair in GRID["pair"]}  # draws differ far more than methods
    for cell in sweep.read_cells(folder / "recipe.yaml"):
        gain = 0.02 if cell.place["method"] == "pals" and cell.place["train_fraction"] == "0.1" else 0.0
        iou = 0.45 + easy[cell.place["pair"]] + gain + generator.normal(0, 0.002)
        metrics = {
            "eval_mean_iou": iou,
            "eval_per_category_iou": [iou, None],
            "eval_ece": 0.1,
            "eval_loss": 0.5,
            "eval_reliability": [[0.5, 0.4, 0.3], [0.5, 0.9, 0.8], [0.0, None, None]],
        }
        result = {"place": cell.place, "flags": cell.flags, "classes": ["a", "b"], "metrics": metrics}
        sweep.append_result(folder, result)
    return folder


def test_a_temperature_makes_a_method_of_its_own(study, capsys):
    """PALS as trained can then be compared with cross-entropy and its temperature."""
    cells = sweep.read_cells(study / "recipe.yaml")
    (study / "results.jsonl").unlink()
    for cell in cells:
        pair = int(cell.place["pair"])
        metrics = {
            "eval_mean_iou": 0.5,
            "eval_per_category_iou": [0.5, 0.5],
            "eval_loss": 0.5,
            "eval_temperature": 1.5,
            "eval_uncalibrated_ece": (0.06 if cell.place["method"] == "ce" else 0.03) + 0.001 * pair,
            "eval_calibrated_ece": 0.01,
            "eval_calibrated_loss": 0.4,
        }
        result = {"place": cell.place, "flags": cell.flags, "classes": ["a", "b"], "metrics": metrics}
        sweep.append_result(study, result)
    assert call(study_fractions.main, study, "--baseline", "ce", "ce, T").returncode == 0
    table = (study / "table.md").read_text()
    assert "| ce | 6 | 50.00 |  | 6.25 | 0.500 |" in table
    assert "| ce, T | 6 | 50.00 |  | 1.00 | 0.400 |" in table
    rows = [line.split(" | ") for line in table.splitlines()]
    against = next(row for row in rows if row[0] == "| pals" and row[1] == "ce, T")
    assert against[5].startswith("+2.25 [")
    assert "training images" not in [row[0] for row in rows]


def lines_of(study):
    """The lines of its results, by (method, fraction, pair)."""
    lines = sweep.results_path(study).read_text().splitlines(keepends=True)
    places = [json.loads(line)["place"] for line in lines]
    return {(p["method"], p["train_fraction"], p["pair"]): line for p, line in zip(places, lines, strict=True)}


def remove_lines(study, unwanted):
    """Remove the results whose (method, fraction, pair) is unwanted."""
    kept = [line for place, line in lines_of(study).items() if not unwanted(*place)]
    sweep.results_path(study).write_text("".join(kept))


def add_method(study, name):
    """Another method, with the results of cross-entropy."""
    grid = {**GRID, "method": {**GRID["method"], name: {"loss": "ce"}}}
    (study / "recipe.yaml").write_text(yaml.safe_dump({"common": {"max_steps": 5}, "grid": grid}, sort_keys=False))
    for (method, _, _), line in lines_of(study).items():
        if method == "ce":
            result = json.loads(line)
            sweep.append_result(study, result | {"place": result["place"] | {"method": name}})


def report(folder, *options):
    return call(study_fractions.main, folder, *options)


def test_pairs_show_what_means_hide(study):
    result = report(study)
    assert result.returncode == 0, result.stderr
    with open(study / "table.csv", newline="") as file:
        rows = {(r["fraction"], r["method"], r["metric"]): r for r in csv.DictReader(file)}
    gain, none = (rows[fraction, "pals", "mIoU"] for fraction in ("0.1", "0.5"))
    assert float(gain["low"]) > 1.0
    assert float(gain["low"]) < 2.0 < float(gain["high"]) + 0.3
    assert float(gain["p"]) == pytest.approx(2 / 2**6)  # all six differences have one sign
    assert float(none["low"]) < 0 < float(none["high"])
    assert rows["0.1", "ce", "mIoU"]["difference"] == ""
    table = (study / "table.md").read_text()
    assert "### 10% of the training images" in table
    assert "| pals | 6 |" in table
    assert "without a result" not in table
    for name in ("fractions", "classes", "reliability"):
        assert Image.open(study / f"{name}.png").width > 300


def test_incomplete_studies_are_called_so(study):
    remove_lines(study, lambda method, fraction, pair: pair in "345")
    result = report(study)
    assert "Runs of the recipe without a result: 12." in result.stdout
    assert "| pals | 3 |" in result.stdout


def test_figures_show_only_what_can_be_compared(study):
    """A mean over other pairs is not set beside the baseline's; a method looks the same in every panel."""
    add_method(study, "uniform")
    remove_lines(study, lambda *place: place == ("uniform", "0.1", "0"))
    results = study_fractions.Results(study)
    assert study_fractions.comparable(results, "0.1", "ce") == ["ce", "pals"]
    assert study_fractions.comparable(results, "0.5", "ce") == ["ce", "pals", "uniform"]
    looks = study_fractions.styles(results)
    assert len({str(look) for look in looks.values()}) == len(looks) == 3
    axes = Figure().subplots(1, 2)
    axes[0].plot([0], [0], label="ce", **looks["ce"])
    for method in ("ce", "uniform"):
        axes[1].plot([0], [0], label=method, **looks[method])
    study_fractions.legend(axes[0].figure, axes)
    (shown,) = axes[0].figure.legends
    assert [text.get_text() for text in shown.get_texts()] == ["ce", "uniform"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: sweep.results_path(f).unlink(), "has no results yet"),
        (lambda f: (f / "recipe.yaml").unlink(), "cannot be read"),
        (
            lambda f: (f / "recipe.yaml").write_text("grid: {loss: [ce]}"),
            "the axes must be method",
        ),
    ],
)
def test_nothing_to_report(study, change, message):
    change(study)
    result = report(study)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        (GRID, ["--baseline", "best"], "baseline best is not a method. Choose from ce, pals."),
        (
            {**GRID, "train_fraction": {"few": {"train_count": 3}}},
            [],
            "train_fraction few must be a number or have a number as its name",
        ),
    ],
)
def test_what_cannot_be_reported_is_not_run(study, monkeypatch, grid, options, message):
    monkeypatch.setattr(study_fractions, "run_cells", lambda *_, **__: pytest.fail("was run"))
    (study / "recipe.yaml").write_text(yaml.safe_dump({"common": {"max_steps": 5}, "grid": grid}))
    result = report(study, "--run", *options)
    assert result.returncode == 2
    assert message in result.stderr


def test_other_baselines(study):
    add_method(study, "uniform")
    result = report(study, "--baseline", "pals", "ce")
    assert "| ce | pals | 6 | -2." in result.stdout
    assert "| pals | ce |" not in result.stdout  # which would say the same
    assert result.stdout.count("| uniform | pals | 6 |") == result.stdout.count("| uniform | ce | 6 |") == 2
    with open(study / "table.csv", newline="") as file:
        assert [(r["method"], r["against"]) for r in csv.DictReader(file)][:1] == [("ce", "pals")]


def test_differences():
    difference = study_fractions.Difference.of(np.array([3.0, 4.0, 5.0]), np.array([1.0, 2.0, 2.0]))
    assert difference.difference == pytest.approx(7 / 3)
    half = 4.302653 * np.std([2, 2, 3], ddof=1) / np.sqrt(3)  # t of 2 degrees of freedom
    assert (difference.low, difference.high) == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-5)
    assert difference.p == pytest.approx(0.25)
    assert np.isnan(study_fractions.Difference.of(np.array([1.0]), np.array([0.0])).low)


@pytest.mark.slow
def test_runs_what_is_missing(folder, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    common = {"dataset_dir": str(folder), "void_labels": [RAW_VOID], "crop_size": [32, 32], "max_steps": 1}
    common |= {"per_device_train_batch_size": 2, "eval_strategy": "no", "eval_calibration": True}
    grid = {**GRID, "train_fraction": [0.5], "pair": {"0": {"seed": 0}}}
    (study / "recipe.yaml").write_text(yaml.safe_dump({"common": common, "grid": grid}, sort_keys=False))
    result = report(study, "--run")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "| pals | 1 |" in result.stdout
    assert len(lines_of(study)) == 2
