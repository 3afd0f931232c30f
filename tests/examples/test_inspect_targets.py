"""The targets of PALS beside the predictions of a tiny network."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RAW_VOID
from launching import call
from PIL import Image
from trained import save_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import inspect_targets

from pals_hf import load_segmentation_dataset
from pals_hf.cli.arguments import TrainArguments
from pals_hf.cli.parser import OptionParser
from pals_hf.cli.train_data import load_data
from pals_hf.inference import load_for_inference, predict
from pals_hf.metrics import SegmentationMetrics


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    return save_checkpoint(tmp_path / "model")


def look(folder, model, output, *more):
    flags = ["--dataset_dir", folder, "--void_labels", RAW_VOID, "--model", model, "--output_dir", output]
    result = call(inspect_targets.main, *flags, *more)
    assert result.returncode == 0, result.stderr
    return json.loads((output / "targets.json").read_text()), result.stdout


def test_scores(folder, model, tmp_path):
    """Self-distillation is the prediction itself, and so is an affinity that is sharp enough."""
    flags = ["--taus", "0.0001", "1", "--keys", "0", "6", "--without_self", "--validation"]
    rows, printed = look(folder, model, tmp_path / "out", *flags)
    assert [(row["weight"], row["tau"], row["keys"], row["include_self"]) for row in rows[1:]] == [
        (1.0, tau, keys, own) for tau in (0.0001, 1.0) for keys in (None, 6) for own in (True, False)
    ]
    assert rows[0]["weight"] == 0
    network, processor = load_for_inference(model, "cpu")
    hits, metrics = [], SegmentationMetrics(network.config.num_labels)
    for row in load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID]).validation:
        truth = np.array(row["labels"])
        mask = predict(network, processor, [row["image"]])[0].mask.numpy()
        hits.append((mask == truth)[truth != 255])
        metrics.update(torch.from_numpy(mask), torch.from_numpy(truth))
    assert rows[0]["accuracy"] == pytest.approx(np.concatenate(hits).mean(), abs=0.01)
    assert rows[0]["mean_iou"] == pytest.approx(metrics.compute()["mean_iou"], abs=0.01)
    sharp, wide = rows[1], rows[5]  # both with all pairs
    for name in ("accuracy", "mean_iou", "nll", "entropy"):
        assert sharp[name] == pytest.approx(rows[0][name], abs=0.01)
        assert abs(wide[name] - rows[0][name]) > (0.0 if name == "mean_iou" else 0.01)
    assert "self-distillation" in printed
    assert Image.open(tmp_path / "out" / "targets.png").width > 4 * 48


def test_sources_and_another_image_size(folder, model, tmp_path):
    flags = ["--train_count", "3", "--taus", "0.1", "--sources", "encoder", "logits"]
    rows, _ = look(folder, model, tmp_path / "out", *flags)
    assert [row["source"] for row in rows[1:]] == ["encoder", "logits"]
    larger, _ = look(folder, model, tmp_path / "larger", *flags, "--image_size", "64", "96")
    assert larger[0]["nll"] != rows[0]["nll"]


def test_uses_the_images_that_a_training_would_use(folder, model):
    """With the same flags, also those for the fraction and for skipped images."""
    (folder / "train" / "images" / "street 0.jpg").write_bytes(b"")
    for mask in (folder / "train" / "masks").iterdir():
        if mask.stem != "street 6":  # the only one with a car, which the balanced fraction contains
            labels = np.array(Image.open(mask))
            Image.fromarray(np.where(labels == 3, 0, labels)).save(mask)
    flags = ["--dataset_dir", folder, "--void_labels", RAW_VOID, "--train_count", 3, "--skip_bad_samples", "True"]
    seen = []
    for method in ("random", "balanced"):
        both = [*map(str, flags), "--fraction_method", method]
        (args,) = OptionParser(inspect_targets.TargetArguments, description="").parse(both)
        pictures = inspect_targets.read_images(args)[0]["image"][:]
        (args,) = OptionParser(TrainArguments, description="").parse(both)
        assert pictures == load_data(args)[0].train["image"][:]
        seen.append(pictures)
    assert seen[0] != seen[1]


def test_wrong_input(folder, model, tmp_path):
    for flags, said in (
        (["--dataset_dir", folder], "model is missing"),
        (
            ["--dataset_dir", folder, "--void_labels", "11", "--model", model, "--sources", "x"],
            "--sources: invalid choice: 'x'",
        ),
        (["--dataset_dir", folder, "--void_labels", "11", "--model", model, "--taus", "0"], "tau must be positive"),
    ):
        result = call(inspect_targets.main, *flags, "--output_dir", tmp_path)
        assert (result.returncode, said in result.stderr) == (2, True), result.stderr
