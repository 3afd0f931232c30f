"""The training program of the studies: held-out training images, sparse and wrong labels."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import RAW_VOID, load_folder
from launching import call

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import study_train

SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--disable_tqdm", "True"]


def on_folder(folder, output, *arguments):
    return ["--dataset_dir", str(folder), "--void_labels", str(RAW_VOID), "--output_dir", str(output), *arguments]


def read(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_settings_are_tuned_on_held_out_training_images(folder, tmp_path, capsys):
    """Held out before the fraction is drawn; the validation split is not even scored."""
    output = tmp_path / "run"
    options = ["--train_fraction", "0.5", "--tuning_share", "0.25", "--eval_calibration", "True"]
    study_train.main(on_folder(folder, output, *options, *SHORT))
    results = read(output / "eval_results.json")
    manifest = read(output / "train_fraction.json")
    assert (manifest["available"], len(manifest["ids"])) == (6, 3)
    assert "3 training images, 2 validation images" in capsys.readouterr().out
    assert 0 <= results["eval_ece"] <= 1
    assert len(results["eval_reliability"]) == 15
    assert len(results["eval_per_category_boundary_iou"]) == 4


def test_settings_are_tuned_on_images_of_one_kind(folder, tmp_path, capsys):
    study_train.main(on_folder(folder, tmp_path / "run", "--tuning_ids", "street [0-2]$", *SHORT))
    assert "5 training images, 3 validation images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        study_train.main(on_folder(folder, tmp_path / "other", "--tuning_ids", "x", "--tuning_share", "0.5", *SHORT))
    assert "tuning_share and tuning_ids exclude each other" in capsys.readouterr().err


def test_sparse_labels(folder, tmp_path):
    """The manifest says which images; of their masks a few clicks are left, and the rest is distilled."""
    options = ["--label_clicks", "2", "--distill_unlabeled", "True", "--logging_steps", "1"]
    study_train.main(on_folder(folder, tmp_path / "run", *options, *SHORT))
    assert read(tmp_path / "run" / "trainer_state.json")["log_history"][0]["loss_unlabeled"] > 0
    assert read(tmp_path / "run" / "train_fraction.json")["available"] == 8


def test_wrong_labels(folder, tmp_path, monkeypatch):
    """The trainer gets wrong labels of the training images, and the right ones of the validation images."""
    given = []
    build = study_train.train.build_trainer

    def build_and_keep(args, config, data, manifest):
        given.append(data)
        return build(args, config, data, manifest)

    monkeypatch.setattr(study_train.train, "build_trainer", build_and_keep)
    study_train.main(on_folder(folder, tmp_path / "run", "--label_noise", "0.5", *SHORT))
    assert read(tmp_path / "run" / "model_card.json")["settings"]["label_noise"] == 0.5
    right = load_folder(folder)
    assert masks_of(given[0].train) != masks_of(right.train)
    assert masks_of(given[0].validation) == masks_of(right.validation)


def masks_of(split):
    return [np.asarray(row["labels"]).tolist() for row in split]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label_clicks", "0"], "label_clicks must be at least 1, got 0"),
        (["--streaming", "--crop_size", "8", "8", "--label_clicks", "2"], "label_clicks needs the list of all images"),
        (["--tuning_ids", "["], "is not a regular expression"),
    ],
)
def test_wrong_input(folder, tmp_path, flags, message):
    result = call(study_train.main, *on_folder(folder, tmp_path / "run", *flags, *SHORT))
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "run").exists()
