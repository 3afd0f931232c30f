"""Data sets with columns, saved by `save_to_disk`."""

import numpy as np
import pytest
from conftest import RAW_VOID, load_folder, rewrite_mask
from datasets import Dataset, DatasetDict, Features, Image, Value, load_from_disk

from pals_hf import load_segmentation_dataset
from pals_hf.errors import InputError


@pytest.fixture
def saved(folder, tmp_path):
    """The folder as a `save_to_disk` data set with columns of other names."""
    splits = {}
    for split in ("train", "val"):
        images, masks = (sorted((folder / split / kind).iterdir()) for kind in ("images", "masks"))
        columns = {
            "photo": list(map(str, images)),
            "annotation": list(map(str, masks)),
            "place": [split] * len(images),
        }
        features = Features({"photo": Image(), "annotation": Image(), "place": Value("string")})
        splits[split] = Dataset.from_dict(columns, features=features)
    path = tmp_path / "saved"
    DatasetDict(splits).save_to_disk(path)
    (path / "id2label.json").write_text((folder / "id2label.json").read_text())
    return path


def test_named_and_found_columns(saved, folder):
    data = load_segmentation_dataset(str(saved), image_column="photo", void_labels=[RAW_VOID])
    expected = load_folder(folder)
    assert data.id2label == expected.id2label
    assert data.train.column_names[:3] == ["id", "image", "labels"]
    assert data.train["id"][0] == "train-000000"
    for split in ("train", "validation"):
        ours, theirs = getattr(data, split), getattr(expected, split)
        assert [np.array(mask).tobytes() for mask in ours["labels"]] == [
            np.array(mask).tobytes() for mask in theirs["labels"]
        ]


def test_masks_that_were_corrected_and_saved_again(saved, folder, tmp_path):
    """The fingerprint of `datasets` is that of the files' names here."""

    def save():
        images, masks = (sorted((folder / "train" / kind).iterdir()) for kind in ("images", "masks"))
        features = Features({"image": Image(), "labels": Image()})
        columns = {"image": list(map(str, images)), "labels": list(map(str, masks))}
        Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "again")

    def read():
        options = {"id2label": folder / "id2label.json", "void_labels": [RAW_VOID]}
        data = load_segmentation_dataset(str(tmp_path / "again"), validation_share=0.5, **options)
        return sorted([*data.train["labels_sha256"], *data.validation["labels_sha256"]])

    save()
    before = read()
    assert read() == before
    rewrite_mask(folder, lambda mask: np.where(mask == 3, 2, mask).astype(np.uint8))
    save()
    assert len(set(read()) & set(before)) == len(before) - 1


def test_missing_columns(saved):
    with pytest.raises(InputError, match=r"image_column: no column named 'image' or .*'photo': 'Image'"):
        load_segmentation_dataset(str(saved))
    for column in ("nothing", "place"):
        with pytest.raises(
            InputError, match=f"label_column: no column named '{column}' holds images.*'place': 'Value'"
        ):
            load_segmentation_dataset(str(saved), image_column="photo", label_column=column)


def test_validation_with_other_columns(saved, folder, tmp_path):
    splits = load_from_disk(saved)
    splits["val"] = splits["val"].rename_column("annotation", "truth")
    splits.save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match="label_column: no column named 'annotation'"):
        load_segmentation_dataset(str(tmp_path / "other"), image_column="photo", id2label=dict(enumerate("abcd")))


def test_leaves_the_folder_as_it_is(saved):
    before = sorted(path for path in saved.rglob("*"))
    load_segmentation_dataset(str(saved), image_column="photo", void_labels=[RAW_VOID])
    assert sorted(path for path in saved.rglob("*")) == before


def test_a_wrong_value_names_its_row(saved):
    with pytest.raises(InputError, match=r"value 11 is not a class"):
        load_segmentation_dataset(str(saved), image_column="photo")


def test_not_to_be_found():
    with pytest.raises(InputError, match=r"the data set 'nobody/nothing' cannot be loaded"):
        load_segmentation_dataset("nobody/nothing")


def test_no_class_names(saved):
    (saved / "id2label.json").unlink()
    with pytest.raises(InputError, match=r"id2label\.json is missing"):
        load_segmentation_dataset(str(saved), image_column="photo")


@pytest.mark.parametrize("name", ["valid", "dev", "eval", "Validation"])
def test_other_names_of_the_validation_split(saved, tmp_path, name):
    splits = load_from_disk(saved)
    splits = DatasetDict({"train": splits["train"], name: splits["val"], "extra": splits["val"]})
    splits.save_to_disk(tmp_path / "other")
    options = {"image_column": "photo", "id2label": saved / "id2label.json", "void_labels": [RAW_VOID]}
    data = load_segmentation_dataset(str(tmp_path / "other"), **options)
    assert (len(data.train), len(data.validation)) == (8, 5)
    (note,) = data.notes
    assert note.startswith(f"the split 'extra' of {tmp_path / 'other'} is not used")


def test_a_test_split_is_not_for_scores(saved, tmp_path):
    splits = load_from_disk(saved)
    DatasetDict({"train": splits["train"], "test": splits["val"]}).save_to_disk(tmp_path / "other")
    options = {"image_column": "photo", "id2label": saved / "id2label.json", "void_labels": [RAW_VOID]}
    data = load_segmentation_dataset(str(tmp_path / "other"), **options)
    assert (len(data.train), len(data.validation)) == (6, 2)
    assert "the split 'test' of" in data.notes[0]


def test_a_row_without_a_mask(saved, tmp_path):
    rows = load_from_disk(saved)["train"].to_list()
    rows[3]["annotation"] = None
    features = Features({"photo": Image(), "annotation": Image(), "place": Value("string")})
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "other")
    options = {"image_column": "photo", "id2label": saved / "id2label.json", "void_labels": [RAW_VOID]}
    with pytest.raises(InputError, match="labels of train-000003 is missing"):
        load_segmentation_dataset(str(tmp_path / "other"), **options)
