"""The reference checkpoints, their cards, and publishing them, on a small study and a local stand-in for the Hub."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from launching import call

pytest.importorskip("ray")
pytest.importorskip("scipy")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import publish_checkpoints  # noqa: E402
import study_train  # noqa: E402
import sweep  # noqa: E402

from pals_hf.model_card import CARD, CARD_DATA, CardData, render  # noqa: E402

FLAGS = {
    "max_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "eval_strategy": "no",
    "save_strategy": "no",
}
PALS = "method=pals,train_fraction=0.1,pair=0"
GRID = {
    "method": {"ce": {"loss": "ce"}, "pals": {"loss": "pals"}},
    "train_fraction": ["0.1"],
    "pair": {"0": {"fraction_seed": 0, "seed": 0}},
}


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study of two runs on the built-in scenes, with its results."""
    folder = tmp_path_factory.mktemp("studied") / "study"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"common": FLAGS, "grid": GRID}, sort_keys=False))
    for cell in sweep.read_cells(folder / "recipe.yaml"):
        run = folder / "runs" / cell.name
        study_train.main([*sweep.to_argv(cell.flags), "--output_dir", str(run), "--disable_tqdm", "True"])
        metrics = json.loads((run / "eval_results.json").read_text())
        sweep.append_result(folder, {"place": cell.place, "flags": cell.flags, "metrics": metrics})
    return folder


@pytest.fixture
def references(studied, tmp_path):
    """A list of references that names one of its runs."""
    shutil.copytree(studied, tmp_path / "study")
    path = tmp_path / "cards" / "references.yaml"
    path.parent.mkdir()
    run = {"method": "pals", "train_fraction": "0.1", "pair": "0"}
    path.write_text(yaml.safe_dump({"scenes-10-pals": {"study": "study", "run": run}}))
    return path


def test_publishing(references, tmp_path):
    """Checked, with a card that compares, and pushed without pictures of the data."""
    script = ROOT / "examples" / "publish_checkpoints.py"
    command = [
        sys.executable,
        ROOT / "tests" / "hub.py",
        sys.executable,
        script,
        "someone",
        "--references",
        references,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "checked: scenes-10-pals" in result.stdout
    pushed = result.stdout[result.stdout.index("someone/scenes-10-pals, public, ") :]
    for name in ("model.safetensors", "README.md", "train_fraction.json", "curves.png"):
        assert f"\n  {name}, " in pushed
    assert "predictions.png" not in pushed
    card = ModelCard.load(references.parent / "scenes-10-pals" / "README.md")
    assert "| pals (this checkpoint) | 1 |" in card.text
    assert "1 pair of draw and seed, too few for a claim" in card.text
    scored = CardData.load(tmp_path / "study" / "runs" / PALS).metrics["eval_mean_iou"]
    assert card.data.eval_results[0].metric_value == scored


def test_what_is_not_as_it_should_be(references, tmp_path):
    """A network that is not what its card says is not published; a render follows the study."""
    study = tmp_path / "study"
    run = study / "runs" / PALS
    card = CardData.load(run)
    data = (run / CARD_DATA).read_text()
    (run / CARD_DATA).write_text(data.replace(f'_iou": {card.metrics["eval_mean_iou"]}', '_iou": 0.9'))
    refused = call(publish_checkpoints.main, "--references", references)
    assert refused.returncode == 2
    assert "its card says 0.9000" in refused.stderr
    card.save(run)
    assert call(publish_checkpoints.main, "--references", references).returncode == 0
    (reference,) = publish_checkpoints.read_references(references)
    sweep.append_result(study, reference.result | {"metrics": {"eval_mean_iou": 0.125}})
    assert call(publish_checkpoints.main, "--references", references, "--render_only").returncode == 0
    assert "| pals (this checkpoint) | 1 | 12.50 |" in (references.parent / "scenes-10-pals" / CARD).read_text()


@pytest.mark.parametrize("reference", publish_checkpoints.read_references(), ids=lambda reference: reference.name)
def test_committed_cards(reference):
    """They are what their data renders to, with the figures of the study's result and no picture of the data."""
    card = CardData.load(reference.card_dir)
    assert render(card).encode() == (reference.card_dir / CARD).read_bytes()
    assert card == publish_checkpoints.with_comparison(card, reference)
    studied = reference.result["metrics"]
    assert card.metrics["eval_mean_iou"] == studied["eval_mean_iou"]
    assert card.metrics["eval_per_category_iou"] == studied["eval_per_category_iou"]
    assert "predictions.png" not in card.pictures
    assert {path.name for path in reference.card_dir.iterdir()} == {CARD, CARD_DATA, *card.pictures}
