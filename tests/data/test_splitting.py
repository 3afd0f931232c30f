"""Held-out images, folds, and images that are in both splits."""

import json
import shutil

import pytest
from conftest import load_folder, write_pair

from pals_hf.data.splitting import hold_out
from pals_hf.errors import InputError


def test_without_validation_one_is_cut_off(folder, tmp_path):
    (folder / "val").rename(tmp_path / "gone")
    data = load_folder(folder, validation_share=0.25)
    assert (len(data.train), len(data.validation)) == (6, 2)
    assert not set(data.train["id"]) & set(data.validation["id"])
    assert load_folder(folder, validation_share=0.25).validation["id"] == data.validation["id"]
    others = [
        load_folder(folder, validation_share=0.25, validation_seed=seed).validation["id"] for seed in range(1, 5)
    ]
    assert any(other != data.validation["id"] for other in others)


def test_images_of_one_kind_are_held_out(folder):
    data = load_folder(folder)
    cut = hold_out(data, pattern="street [12]$")
    assert [id[-1] for id in cut.validation["id"]] == ["1", "2"]
    assert sorted([*cut.train["id"], *cut.validation["id"]]) == sorted(data.train["id"])
    for pattern, problem in (
        ("alley", "matches 0 of the 8"),
        ("street", "matches 8 of the 8"),
        ("(", "not a regular"),
    ):
        with pytest.raises(InputError, match=problem):
            hold_out(data, pattern=pattern)


def test_a_share_is_held_out(folder):
    data = load_folder(folder)
    cut = hold_out(data, share=0.25)
    assert (len(cut.train), len(cut.validation)) == (6, 2)
    assert sorted([*cut.train["id"], *cut.validation["id"]]) == sorted(data.train["id"])


def test_what_is_held_out_is_not_trained_on_under_another_name(folder):
    shutil.copy(folder / "train" / "images" / "street 1.jpg", folder / "train" / "images" / "copy.jpg")
    shutil.copy(folder / "train" / "masks" / "street 1.png", folder / "train" / "masks" / "copy.png")
    data = load_folder(folder)
    with pytest.raises(InputError, match="training image 'copy' is also validation image 'street 1'"):
        hold_out(data, pattern="street [12]$")
    cut = hold_out(data, pattern="street [12]$", skip_bad_samples=True)
    assert "copy" not in cut.train["id"]
    assert list(cut.skipped) == ["train/copy"]


def test_folds_cover_all_images_once(folder):
    folds = [load_folder(folder, num_folds=3, fold=fold) for fold in range(3)]
    scored = [id for data in folds for id in data.validation["id"]]
    assert len(scored) == len(set(scored)) == 13
    for data in folds:
        assert not set(data.train["id"]) & set(data.validation["id"])
        assert len(data.train) + len(data.validation) == 13
    other = load_folder(folder, num_folds=3, fold=0, validation_seed=1)
    assert other.validation["id"] != folds[0].validation["id"]
    for options in ({"num_folds": 1}, {"num_folds": 14}, {"num_folds": 3, "fold": 3}):
        with pytest.raises(InputError, match="fold"):
            load_folder(folder, **options)


def test_folds_of_splits_that_share_names(folder):
    """Ids are paths below the split: these are told apart by it."""
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        (folder / "val" / kind / f"alley-3.{suffix}").rename(folder / "val" / kind / f"street 5.{suffix}")
    data = load_folder(folder, num_folds=3)
    alleys = [f"validation/{name}" for name in ("alley-0", "alley-1", "alley-2", "alley-4", "street 5")]
    streets = [f"train/street {index}" for index in range(8)]
    assert sorted([*data.train["id"], *data.validation["id"]]) == [*streets, *alleys]
    assert data.train.column_names == load_folder(folder).train.column_names
    images = dict(zip(load_folder(folder).train["id"], load_folder(folder).train["image_sha256"], strict=True))
    for split in (data.train, data.validation):
        for id, content in zip(split["id"], split["image_sha256"], strict=True):
            assert id.startswith("validation/") or images[id.removeprefix("train/")] == content


def test_a_training_image_in_the_validation_split(folder):
    shutil.copy(folder / "train" / "images" / "street 5.jpg", folder / "val" / "images" / "alley-2.jpg")
    shutil.copy(folder / "train" / "masks" / "street 5.png", folder / "val" / "masks" / "alley-2.png")
    with pytest.raises(InputError, match="training image 'street 5' is also validation image 'alley-2'"):
        load_folder(folder)
    data = load_folder(folder, skip_bad_samples=True)
    assert (len(data.train), len(data.validation)) == (7, 5)
    assert list(data.skipped) == ["train/street 5"]


def test_one_image_and_no_validation(tmp_path):
    write_pair(tmp_path / "train", "only")
    (tmp_path / "id2label.json").write_text(json.dumps(list("abcd")))
    with pytest.raises(InputError, match="at least 2 training images, got 1"):
        load_folder(tmp_path)
