import json

import numpy as np
import pytest
from conftest import NUM_LABELS, RAW_VOID, write_pair
from datasets import Dataset, DatasetDict, Features, Image, Value, load_from_disk
from PIL import Image as PILImage

from pals_hf import load_segmentation_dataset
from pals_hf.errors import InputError


def load(folder, **options):
    return load_segmentation_dataset(dataset_dir=folder, **{"void_labels": [RAW_VOID], **options})


def rewrite_mask(folder, change):
    path = sorted((folder / "train" / "masks").iterdir())[0]
    mask = PILImage.fromarray(change(np.array(PILImage.open(path))))
    mask.save(path)
    return path


class TestFolder:
    def test_loads_images_and_masks(self, folder):
        data = load(folder)
        assert (len(data.train), len(data.validation)) == (8, 5)
        assert data.id2label == {0: "ground", 1: "wall", 2: "sky", 3: "car"}
        assert data.train["id"][0] == "street 0"
        example = data.train[0]
        assert example["image"].size == example["labels"].size == (48, 32)
        assert example["image"].mode == "RGB"

    def test_void_is_mapped_once_and_classes_are_kept(self, folder):
        raw = np.array(PILImage.open(folder / "train" / "masks" / "street 0.png"))
        labels = np.array(load(folder).train[0]["labels"])
        assert np.array_equal(labels, np.where(raw == RAW_VOID, 255, raw))
        assert (raw == RAW_VOID).any()

    @pytest.mark.parametrize("mode", ["P", "I;16"])
    def test_masks_keep_their_indices_in_every_mode(self, folder, mode):
        path = folder / "train" / "masks" / "street 0.png"
        raw = np.array(PILImage.open(path))
        expected = np.where(raw == RAW_VOID, 255, raw)
        if mode == "P":
            mask = PILImage.fromarray(raw)
            mask.putpalette(list(range(255, -1, -1)) * 3)  # colours say nothing about the index
        else:
            mask = PILImage.fromarray(raw.astype(np.uint16))
        mask.save(path)
        assert np.array_equal(np.array(load(folder).train[0]["labels"]), expected)

    def test_an_exif_rotated_image_is_turned(self, folder):
        """The mask is drawn on the picture as it is shown."""
        path = folder / "train" / "images" / "street 0.jpg"
        upright = PILImage.open(path)
        exif = PILImage.Exif()
        exif[0x0112] = 6  # shown turned by 90 degrees clockwise
        upright.rotate(90, expand=True).save(path, exif=exif, quality=95)
        assert load(folder).train[0]["image"].size == (48, 32)

    def test_without_validation_one_is_cut_off(self, folder, tmp_path):
        (folder / "val").rename(tmp_path / "gone")
        data = load(folder, validation_share=0.25)
        assert (len(data.train), len(data.validation)) == (6, 2)
        assert not set(data.train["id"]) & set(data.validation["id"])
        assert load(folder, validation_share=0.25).validation["id"] == data.validation["id"]
        others = [load(folder, validation_share=0.25, validation_seed=seed).validation["id"] for seed in range(1, 5)]
        assert any(other != data.validation["id"] for other in others)

    def test_class_names_as_a_list_or_argument(self, folder):
        (folder / "id2label.json").write_text(json.dumps(["a", "b", "c", "d"]))
        assert load(folder).id2label[3] == "d"
        assert load(folder, id2label=dict(enumerate("wxyz"))).id2label[0] == "w"


class TestBadFolder:
    def expect(self, folder, *parts, **options):
        with pytest.raises(InputError) as error:
            load(folder, **options)
        message = str(error.value)
        assert "\n" not in message
        for part in parts:
            assert str(part) in message

    def test_missing(self, tmp_path):
        self.expect(tmp_path / "nowhere", tmp_path / "nowhere", "not a folder")

    def test_no_train(self, tmp_path):
        self.expect(tmp_path, tmp_path, "train/")

    def test_empty_split(self, folder):
        for path in (folder / "train" / "images").iterdir():
            path.unlink()
        self.expect(folder, folder / "train" / "images", "no images")

    def test_image_without_mask(self, folder):
        (folder / "val" / "masks" / "alley-2.png").unlink()
        self.expect(folder, "alley-2.jpg", folder / "val" / "masks" / "alley-2.png", "missing")

    def test_mask_without_image(self, folder):
        (folder / "val" / "images" / "alley-2.jpg").unlink()
        self.expect(folder, "alley-2.png", "no image")

    def test_mask_of_another_size(self, folder):
        path = rewrite_mask(folder, lambda mask: mask[:, :-4])
        self.expect(folder, path, "44x32", "48x32")

    def test_label_outside_the_classes(self, folder):
        path = rewrite_mask(folder, lambda mask: np.where(mask == 3, 37, mask).astype(np.uint8))
        self.expect(folder, path, "value 37", f"0..{NUM_LABELS - 1}", "void_labels")

    def test_negative_label(self, folder):
        path = folder / "train" / "masks" / "street 0.png"
        mask = np.array(PILImage.open(path)).astype(np.int32)
        mask[5, 5] = -1
        buffer = path.with_suffix(".tif")
        PILImage.fromarray(mask).save(buffer)
        buffer.replace(path)  # decoded by content, not by name
        self.expect(folder, path, "value -1")

    def test_void_not_declared(self, folder):
        self.expect(folder, f"value {RAW_VOID}", void_labels=[])

    @pytest.mark.parametrize("keep", [0, 200])
    def test_truncated_or_empty_image(self, folder, keep):
        path = folder / "val" / "images" / "alley-3.jpg"
        path.write_bytes(path.read_bytes()[:keep])
        self.expect(folder, path, "not a readable image")

    def test_truncated_mask(self, folder):
        path = folder / "train" / "masks" / "street 3.png"
        path.write_bytes(path.read_bytes()[:-40])
        self.expect(folder, path, "not a readable image")

    def test_colour_mask(self, folder):
        path = folder / "train" / "masks" / "street 3.png"
        PILImage.open(path).convert("RGB").save(path)
        self.expect(folder, path, "mode RGB")

    def test_lossy_mask(self, folder):
        path = folder / "train" / "masks" / "street 3.png"
        PILImage.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
        self.expect(folder, path.with_suffix(".jpg"), "PNG")

    def test_two_images_of_one_name(self, folder):
        path = folder / "train" / "images" / "street 3.jpg"
        PILImage.open(path).save(path.with_suffix(".png"))
        self.expect(folder, "street 3.jpg", "street 3.png")

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            (None, "missing"),
            ("{", "not readable JSON"),
            ('{"0": "a", "2": "b"}', "without a gap"),
            ('{"0": "a"}', "2 to 255 classes"),
            ('{"zero": "a"}', "class indices"),
            ("3", "class indices"),
        ],
    )
    def test_class_names(self, folder, content, part):
        path = folder / "id2label.json"
        path.unlink() if content is None else path.write_text(content)
        self.expect(folder, path, part)

    def test_one_image_and_no_validation(self, tmp_path):
        write_pair(tmp_path / "train", "only")
        (tmp_path / "id2label.json").write_text(json.dumps(list("abcd")))
        self.expect(tmp_path, "one training image is too few")

    def test_impossible_void_label(self, folder):
        self.expect(folder, "void_labels", "-1", void_labels=[-1])


class TestColumns:
    @pytest.fixture
    def saved(self, folder, tmp_path):
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

    def test_named_and_found_columns(self, saved, folder):
        data = load_segmentation_dataset(str(saved), image_column="photo", void_labels=[RAW_VOID])
        expected = load(folder)
        assert data.id2label == expected.id2label
        assert data.train.column_names == ["id", "image", "labels"]
        assert data.train["id"][0] == "train-000000"
        for split in ("train", "validation"):
            ours, theirs = getattr(data, split), getattr(expected, split)
            assert [np.array(mask).tobytes() for mask in ours["labels"]] == [
                np.array(mask).tobytes() for mask in theirs["labels"]
            ]

    def test_missing_columns(self, saved):
        with pytest.raises(InputError, match=r"image_column: no column 'image' or .*'photo': 'Image'"):
            load_segmentation_dataset(str(saved))
        for column in ("nothing", "place"):
            with pytest.raises(InputError, match=f"label_column: no column '{column}' holds images.*'place': 'Value'"):
                load_segmentation_dataset(str(saved), image_column="photo", label_column=column)

    def test_validation_with_other_columns(self, saved, folder, tmp_path):
        splits = load_from_disk(saved)
        splits["val"] = splits["val"].rename_column("annotation", "truth")
        splits.save_to_disk(tmp_path / "other")
        with pytest.raises(InputError, match="label_column: no column 'annotation'"):
            load_segmentation_dataset(str(tmp_path / "other"), image_column="photo", id2label=dict(enumerate("abcd")))

    def test_leaves_the_folder_as_it_is(self, saved):
        before = sorted(path for path in saved.rglob("*"))
        load_segmentation_dataset(str(saved), image_column="photo", void_labels=[RAW_VOID])
        assert sorted(path for path in saved.rglob("*")) == before

    def test_a_wrong_value_names_its_row(self, saved):
        with pytest.raises(InputError, match=r"value 11 is not a class"):
            load_segmentation_dataset(str(saved), image_column="photo")

    def test_not_to_be_found(self):
        with pytest.raises(InputError, match=r"cannot load the data set 'nobody/nothing'"):
            load_segmentation_dataset("nobody/nothing")

    def test_no_class_names(self, saved):
        (saved / "id2label.json").unlink()
        with pytest.raises(InputError, match=r"id2label\.json is missing"):
            load_segmentation_dataset(str(saved), image_column="photo")


def test_built_in():
    data = load_segmentation_dataset()
    assert 6 <= len(data.id2label) <= 8
    assert (len(data.train), len(data.validation)) == (200, 50)
    assert 255 in np.array(data.train[0]["labels"])


def test_name_and_folder():
    with pytest.raises(InputError, match="not both"):
        load_segmentation_dataset("a", dataset_dir="b")
