"""The public functions on good and bad folders."""

import json
import os

import numpy as np
import pytest
from conftest import NUM_LABELS, RAW_VOID, load_folder, rewrite_mask
from PIL import Image as PILImage

from pals_hf import load_segmentation_dataset
from pals_hf.data import checking, stream_segmentation_dataset
from pals_hf.errors import InputError


def test_loads_images_and_masks(folder):
    data = load_folder(folder)
    assert (len(data.train), len(data.validation)) == (8, 5)
    assert data.id2label == {0: "ground", 1: "wall", 2: "sky", 3: "car"}
    assert data.train["id"][0] == "street 0"
    example = data.train[0]
    assert example["image"].size == example["labels"].size == (48, 32)
    assert example["image"].mode == "RGB"


def test_class_names_as_a_list_or_argument(folder):
    (folder / "id2label.json").write_text(json.dumps(["a", "b", "c", "d"]))
    assert load_folder(folder).id2label[3] == "d"
    assert load_folder(folder, id2label=dict(enumerate("wxyz"))).id2label[0] == "w"


def test_built_in():
    data = load_segmentation_dataset()
    assert 6 <= len(data.id2label) <= 8
    assert (len(data.train), len(data.validation)) == (200, 50)
    assert 255 in np.array(data.train[0]["labels"])


def test_name_and_folder():
    with pytest.raises(InputError, match="Give only one of them"):
        load_segmentation_dataset("a", dataset_dir="b")


class TestBadFolder:
    def expect(self, folder, *parts, **options):
        with pytest.raises(InputError) as error:
            load_folder(folder, **options)
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
        self.expect(folder, "alley-2.jpg", f"has no mask. Add {folder / 'val' / 'masks' / 'alley-2.png'}")

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
        self.expect(folder, path, "not a readable image", "truncated" if keep else "the file is empty")

    def test_something_else_than_an_image(self, folder):
        path = folder / "val" / "images" / "alley-3.jpg"
        path.write_text("<html>404</html>")
        self.expect(folder, path, "not a readable image", "format is not known")

    def test_mask_larger_than_its_image(self, folder):
        path = rewrite_mask(folder, lambda mask: np.pad(mask, ((0, 8), (0, 8))))
        self.expect(folder, path, "56x40", "48x32")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_unreadable_folder(self, folder):
        (folder / "train" / "images").chmod(0)
        try:
            self.expect(folder, folder / "train" / "images", "cannot be read")
        finally:
            (folder / "train" / "images").chmod(0o755)

    def test_one_class_only(self, folder):
        for path in (folder / "train" / "masks").iterdir():
            PILImage.fromarray(np.full((32, 48), 2, dtype=np.uint8)).save(path)
        self.expect(folder, "labels of the class 'sky' only", "void_labels")

    def test_binary_masks_of_0_and_255(self, folder):
        for path in (folder / "train" / "masks").iterdir():
            PILImage.fromarray(np.array(PILImage.open(path)) // 3 % 2 * np.uint8(255)).save(path)
        self.expect(folder, "labels of the class 'ground' only", "255 always means no label", "palette file")

    def test_nothing_labelled(self, folder):
        for path in (folder / "train" / "masks").iterdir():
            PILImage.fromarray(np.full((32, 48), RAW_VOID, dtype=np.uint8)).save(path)
        self.expect(folder, "the training images have no labels")

    def test_validation_without_labels(self, folder):
        for path in (folder / "val" / "masks").iterdir():
            PILImage.fromarray(np.full(PILImage.open(path).size[::-1], RAW_VOID, dtype=np.uint8)).save(path)
        self.expect(folder, "the validation images have no labels, but without labels there is no score")

    def test_validation_of_0_and_255(self, folder):
        """Only the background would be scored."""
        for path in (folder / "val" / "masks").iterdir():
            PILImage.fromarray(np.array(PILImage.open(path)) // 3 % 2 * np.uint8(255)).save(path)
        self.expect(folder, "the validation images have labels of the class 'ground' only", "palette file")

    def test_every_sample_is_bad(self, folder):
        for path in (folder / "train" / "masks").iterdir():
            PILImage.open(path).convert("RGB").save(path)
        self.expect(folder, "no valid images: 8 samples failed a check", "mode RGB", skip_bad_samples=True)
        for path in (folder / "val" / "masks").iterdir():
            path.write_bytes(b"")
        self.expect(folder, "street 0.png", "mode RGB", "and 12 more")

    def test_bad_samples_are_left_out_on_request(self, folder):
        rewrite_mask(folder, lambda mask: np.where(mask == 3, 37, mask).astype(np.uint8))
        (folder / "val" / "images" / "alley-3.jpg").write_bytes(b"")
        self.expect(folder, "street 0.png", "value 37", "and 1 more", "skip_bad_samples")
        data = load_folder(folder, skip_bad_samples=True)
        assert (len(data.train), len(data.validation)) == (7, 4)
        assert data.skipped.keys() == {"train/street 0", "validation/alley-3"}
        assert "value 37" in data.skipped["train/street 0"]
        assert "street 0" not in data.train["id"]
        data = load_folder(folder, skip_bad_samples=True)  # from the cache
        assert data.skipped.keys() == {"train/street 0", "validation/alley-3"}

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
            ('{"0": "a", "-2": "b"}', "-2 is not a possible mask value"),
            ('{"0": "a", "1": "a"}', "'a' twice"),
            ('{"0": "a"}', "2 to 255 classes"),
            ('{"zero": "a"}', "class indices"),
            ("3", "class indices"),
        ],
    )
    def test_class_names(self, folder, content, part):
        path = folder / "id2label.json"
        path.unlink() if content is None else path.write_text(content)
        self.expect(folder, path, part)

    def test_impossible_void_label(self, folder):
        self.expect(folder, "void_labels", "-1", void_labels=[-1])


class TestBlackAndWhite:
    """Masks of 0 and 255 with two class names, whose values do not say otherwise."""

    @pytest.fixture
    def root(self, folder):
        (folder / "id2label.json").write_text('["ground", "crack"]')
        for path in folder.glob("*/masks/*"):
            PILImage.fromarray(np.where(np.array(PILImage.open(path)) % RAW_VOID, 255, 0).astype(np.uint8)).save(path)
        return folder

    def test_are_read_as_0_and_1(self, root):
        data = load_segmentation_dataset(dataset_dir=root)
        raw = np.array(PILImage.open(root / "train" / "masks" / "street 0.png"))
        assert np.array_equal(np.array(data.train[0]["labels"]), raw // 255)
        assert (data.id2label, len(data.notes)) == ({0: "ground", 1: "crack"}, 1)
        assert data.notes[0].startswith(
            "the masks hold the values 0 and 255 only, so 255 is read as the class 'crack'."
        )
        stream = stream_segmentation_dataset(dataset_dir=root)
        assert (stream.notes, stream.classes.codes) == (data.notes, {0: 0, 255: 1})

    def test_names_by_value(self, root):
        """The values 0 and 1 contradict the masks; 0 and 255 are theirs."""
        names = root / "id2label.json"
        for load in (load_segmentation_dataset, stream_segmentation_dataset):
            names.write_text('{"0": "ground", "1": "crack"}')
            with pytest.raises(InputError, match=r"by 255 in id2label: \{'0': 'ground', '255': 'crack'\}"):
                load(dataset_dir=root)
            names.write_text('{"0": "ground", "255": "crack"}')
            load(dataset_dir=root)
        assert set(np.unique(load_segmentation_dataset(dataset_dir=root).train[0]["labels"])) == {0, 1}

    def test_a_void_value_that_is_named(self, root):
        for load in (load_segmentation_dataset, stream_segmentation_dataset):
            with pytest.raises(InputError, match="labels of the class 'ground' only"):
                load(dataset_dir=root, void_labels=[255])

    def test_a_further_value(self, root):
        """Then 255 is void in all masks."""
        for split in ("train", "val"):
            path = sorted((root / split / "masks").iterdir())[0]
            PILImage.fromarray(np.array(PILImage.open(path)) // 255).save(path)
        data = load_segmentation_dataset(dataset_dir=root)
        assert data.notes == stream_segmentation_dataset(dataset_dir=root).notes == ()
        assert set(np.unique(data.train[0]["labels"])) == {0, 1}
        assert set(np.unique(data.train[1]["labels"])) == {0, 255}

    def test_a_value_that_a_stream_meets_later(self, root, monkeypatch):
        """It is refused: the values before it were read as if it did not exist."""
        monkeypatch.setattr(checking, "LOOKED_AT", 2)
        path = sorted((root / "train" / "masks").iterdir())[5]
        PILImage.fromarray(np.ones((32, 48), dtype=np.uint8)).save(path)
        stream = stream_segmentation_dataset(dataset_dir=root)
        with pytest.raises(InputError, match=r"street 5\.png: value 1 is not a class \(0, 255\)"):
            [checking.read_pair(row, stream.classes) for row in stream.train]
