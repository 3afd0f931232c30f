"""What PALS would learn from, of a tiny network."""

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
import run_seg_pals
from run_seg_pals import OneLineParser

from pals_hf import load_segmentation_dataset
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
    """The own prediction is what `predict` says; an affinity that is sharp enough changes nothing of it."""
    flags = ["--sources", "classifier_input", "--taus", "0.0001", "1", "--temperatures", "1", "2", "--validation"]
    rows, printed = look(folder, model, tmp_path / "out", *flags)
    assert [(row["source"], row["tau"], row["temperature"]) for row in rows] == [
        ("own prediction", None, 1.0),
        ("own prediction", None, 2.0),
        ("classifier_input", 0.0001, 1.0),
        ("classifier_input", 0.0001, 2.0),
        ("classifier_input", 1.0, 1.0),
        ("classifier_input", 1.0, 2.0),
    ]
    network, processor = load_for_inference(model, "cpu")
    hits, metrics = [], SegmentationMetrics(network.config.num_labels)
    for row in load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID]).validation:
        truth = np.array(row["labels"])
        mask = predict(network, processor, [row["image"]])[0].mask.numpy()
        hits.append((mask == truth)[truth != 255])
        metrics.update(torch.from_numpy(mask), torch.from_numpy(truth))
    assert rows[0]["hits"] == pytest.approx(np.concatenate(hits).mean(), abs=0.01)
    assert rows[0]["mean_iou"] == pytest.approx(metrics.compute()["mean_iou"], abs=0.01)
    for name in ("hits", "mean_iou", "nll", "entropy"):
        assert rows[2][name] == pytest.approx(rows[0][name], abs=0.01)
        assert abs(rows[4][name] - rows[0][name]) > (0.0 if name == "mean_iou" else 0.01)
    assert rows[1]["entropy"] > rows[0]["entropy"]
    assert "truths" not in rows[0]
    assert "own prediction" in printed
    assert Image.open(tmp_path / "out" / "targets.png").width > 4 * 48


def test_wrong_labels(folder, model, tmp_path):
    flags = ["--label_noise", "0.5", "--train_count", "4", "--taus", "0.1", "--sources", "encoder", "logits"]
    rows, printed = look(folder, model, tmp_path / "out", *flags)
    assert all(0 <= row["truths"] <= 1 for row in rows)
    assert {row["source"] for row in rows} == {"own prediction", "encoder", "logits"}
    assert "right without a right label" in printed


def test_sparse_labels(folder, model, tmp_path):
    """Anchors that outweigh all else, compared as sharply as can be: what is labelled is right."""
    flags = ["--label_clicks", "5000", "--taus", "0.0001", "--temperatures", "1", "--sources", "logits"]
    rows, printed = look(folder, model, tmp_path / "out", *flags, "--anchor_weights", "0", "100", "--train_count", "4")
    assert [row["anchor_weight"] for row in rows] == [0.0, 0.0, 100.0]
    assert rows[2]["hits"] > max(0.9, rows[1]["hits"])
    assert "anchors" in printed


def test_looks_at_the_images_a_training_would_take(folder, model):
    """With the same flags, those about what is drawn and left out among them."""
    (folder / "train" / "images" / "street 0.jpg").write_bytes(b"")
    for mask in (folder / "train" / "masks").iterdir():
        if mask.stem != "street 6":  # the only one with a car, which the balanced draw takes
            labels = np.array(Image.open(mask))
            Image.fromarray(np.where(labels == 3, 0, labels)).save(mask)
    flags = ["--dataset_dir", folder, "--void_labels", RAW_VOID, "--train_count", 3, "--skip_bad_samples", "True"]
    looked_at = []
    for method in ("random", "balanced"):
        both = [*map(str, flags), "--split_method", method]
        (args,) = OneLineParser(inspect_targets.TargetArguments).parse_args_into_dataclasses(both)
        pictures = [image for image, _, _ in inspect_targets.read_pairs(args)]
        (args,) = OneLineParser(run_seg_pals.ScriptArguments).parse_args_into_dataclasses(both)
        assert pictures == run_seg_pals.load_data(args)[0].train["image"][:]
        looked_at.append(pictures)
    assert looked_at[0] != looked_at[1]


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
