import errno
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import NUM_LABELS, RAW_VOID, write_pair
from datasets import Dataset, DatasetDict, Features, Image, Value, load_from_disk
from PIL import Image as PILImage
from PIL import ImageOps

from pals_hf import load_segmentation_dataset
from pals_hf.data import EvalTransform, checking
from pals_hf.data.sources import hold_out
from pals_hf.errors import InputError
from pals_hf.models import build_image_processor


def load(folder, **options):
    return load_segmentation_dataset(dataset_dir=folder, **{"void_labels": [RAW_VOID], **options})


def rewrite_mask(folder, change):
    path = sorted((folder / "train" / "masks").iterdir())[0]
    mask = PILImage.fromarray(change(np.array(PILImage.open(path))))
    mask.save(path)
    return path


def grey_png(values, bits):
    """A grey PNG of few bits, which PIL reads but does not write."""
    packed = np.zeros((values.shape[0], values.shape[1] * bits // 8), dtype=np.uint8)
    for place in range(8 // bits):
        packed |= values[:, place :: 8 // bits] << (8 - bits * (place + 1))
    lines = b"".join(b"\0" + row.tobytes() for row in packed)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


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

    @pytest.mark.parametrize("mode", ["P", "I;16", "P, 4 bits", "L, 4 bits", "L, 2 bits", "1"])
    def test_masks_keep_their_indices_in_every_mode(self, folder, mode):
        """PIL stretches grey of 2 and 4 bits to 0..255, and shows a bit as True."""
        path = folder / "train" / "masks" / "street 0.png"
        raw = np.array(PILImage.open(path))
        if mode in ("L, 2 bits", "1"):
            raw = raw % (4 if mode.startswith("L") else 2)
        expected = np.where(raw == RAW_VOID, 255, raw)
        mask = PILImage.fromarray(raw)
        if mode.startswith("P"):
            mask.putpalette(list(range(255, -1, -1)) * 3)  # colours say nothing about the index
            mask.save(path, bits=4 if "4" in mode else 8)
        elif mode == "I;16":
            PILImage.fromarray(raw.astype(np.uint16)).save(path)
        elif mode == "1":
            PILImage.fromarray(raw.astype(bool)).save(path)
        else:
            path.write_bytes(grey_png(raw, bits=int(mode[3])))
        assert np.array_equal(np.array(load(folder).train[0]["labels"]), expected)

    @pytest.mark.parametrize("mode", ["RGBA", "CMYK", "L", "P", "LA", "1"])
    def test_images_of_every_mode(self, folder, mode):
        path = folder / "train" / "images" / "street 0.jpg"
        picture = PILImage.open(path).convert(mode)
        picture.save(path, format="jpeg" if mode == "CMYK" else "png")
        data = load(folder)
        transform = EvalTransform(build_image_processor(None))
        assert transform(data.train[0]["image"], data.train[0]["labels"])["pixel_values"].shape == (3, 32, 48)

    @pytest.mark.parametrize(("kind", "dtype"), [("png", "<u2"), ("tiff", ">u2"), ("tiff", "<i4"), ("tiff", "<f4")])
    def test_an_image_of_more_than_8_bits(self, folder, kind, dtype):
        path = folder / "train" / "images" / "street 0.jpg"
        PILImage.fromarray(np.zeros((32, 48), dtype=dtype)).save(path, format=kind)
        with pytest.raises(InputError, match=r"street 0\.jpg: images of more than 8 bits a channel"):
            load(folder)

    def test_an_exif_rotated_image_is_turned(self, folder):
        """The mask is drawn on the picture as it is shown."""
        path = folder / "train" / "images" / "street 0.jpg"
        upright = PILImage.open(path)
        exif = PILImage.Exif()
        exif[0x0112] = 6  # shown turned by 90 degrees clockwise
        upright.rotate(90, expand=True).save(path, exif=exif, quality=95)
        assert load(folder).train[0]["image"].size == (48, 32)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("mask_has_a_note", [True, False])
    def test_a_mask_is_turned_like_its_image(self, folder, orientation, mask_has_a_note):
        """A mask drawn on the stored pixels: with a note of its own, or as large as the stored image."""
        if orientation < 5 and not mask_has_a_note:
            pytest.skip("nothing tells how such a mask was drawn")
        image_path, mask_path = (
            folder / "train" / kind / f"street 0.{suffix}" for kind, suffix in (("images", "jpg"), ("masks", "png"))
        )
        expected = np.array(load(folder).train[0]["labels"])
        back = {v: k for k, v in {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.items()}[orientation]
        for path in (image_path, mask_path):
            picture = PILImage.open(path)
            picture.load()
            picture.getexif()[0x0112] = back
            stored, exif = ImageOps.exif_transpose(picture), PILImage.Exif()
            if path is image_path or mask_has_a_note:
                exif[0x0112] = orientation
            stored.save(path, exif=exif, **({"quality": 95} if path is image_path else {}))
        example = load(folder).train[0]
        assert example["image"].size == (48, 32)
        assert np.array_equal(np.array(example["labels"]), expected)

    def test_without_validation_one_is_cut_off(self, folder, tmp_path):
        (folder / "val").rename(tmp_path / "gone")
        data = load(folder, validation_share=0.25)
        assert (len(data.train), len(data.validation)) == (6, 2)
        assert not set(data.train["id"]) & set(data.validation["id"])
        assert load(folder, validation_share=0.25).validation["id"] == data.validation["id"]
        others = [load(folder, validation_share=0.25, validation_seed=seed).validation["id"] for seed in range(1, 5)]
        assert any(other != data.validation["id"] for other in others)

    def test_images_of_one_kind_are_held_out(self, folder):
        data = load(folder)
        cut = hold_out(data, pattern="street [12]$")
        assert [id[-1] for id in cut.validation["id"]] == ["1", "2"]
        assert sorted([*cut.train["id"], *cut.validation["id"]]) == sorted(data.train["id"])
        for pattern, problem in (
            ("alley", "matches 0 of the 8"),
            ("street", "matches 8 of the 8"),
            ("(", "no regular"),
        ):
            with pytest.raises(InputError, match=problem):
                hold_out(data, pattern=pattern)

    def test_a_share_is_held_out(self, folder):
        data = load(folder)
        cut = hold_out(data, share=0.25)
        assert (len(cut.train), len(cut.validation)) == (6, 2)
        assert sorted([*cut.train["id"], *cut.validation["id"]]) == sorted(data.train["id"])

    def test_what_is_held_out_is_not_trained_on_under_another_name(self, folder):
        shutil.copy(folder / "train" / "images" / "street 1.jpg", folder / "train" / "images" / "copy.jpg")
        shutil.copy(folder / "train" / "masks" / "street 1.png", folder / "train" / "masks" / "copy.png")
        data = load(folder)
        with pytest.raises(InputError, match="training image 'copy' is also validation image 'street 1'"):
            hold_out(data, pattern="street [12]$")
        cut = hold_out(data, pattern="street [12]$", skip_bad_samples=True)
        assert "copy" not in cut.train["id"]
        assert list(cut.skipped) == ["train/copy"]

    def test_folds_cover_all_images_once(self, folder):
        folds = [load(folder, num_folds=3, fold=fold) for fold in range(3)]
        scored = [id for data in folds for id in data.validation["id"]]
        assert len(scored) == len(set(scored)) == 13
        for data in folds:
            assert not set(data.train["id"]) & set(data.validation["id"])
            assert len(data.train) + len(data.validation) == 13
        other = load(folder, num_folds=3, fold=0, validation_seed=1)
        assert other.validation["id"] != folds[0].validation["id"]
        for options in ({"num_folds": 1}, {"num_folds": 14}, {"num_folds": 3, "fold": 3}):
            with pytest.raises(InputError, match="fold"):
                load(folder, **options)

    def test_folds_of_splits_that_share_names(self, folder):
        """Ids are paths below the split: these are told apart by it."""
        for kind, suffix in (("images", "jpg"), ("masks", "png")):
            (folder / "val" / kind / f"alley-3.{suffix}").rename(folder / "val" / kind / f"street 5.{suffix}")
        data = load(folder, num_folds=3)
        alleys = [f"validation/{name}" for name in ("alley-0", "alley-1", "alley-2", "alley-4", "street 5")]
        streets = [f"train/street {index}" for index in range(8)]
        assert sorted([*data.train["id"], *data.validation["id"]]) == [*streets, *alleys]
        assert data.train.column_names == load(folder).train.column_names
        images = dict(zip(load(folder).train["id"], load(folder).train["image_sha256"], strict=True))
        for split in (data.train, data.validation):
            for id, content in zip(split["id"], split["image_sha256"], strict=True):
                assert id.startswith("validation/") or images[id.removeprefix("train/")] == content

    def test_counts_pixels_and_hashes_contents(self, folder):
        data = load(folder)
        labels = np.array(data.train[2]["labels"])
        assert data.train[2]["class_pixels"] == [*(int((labels == label).sum()) for label in range(4)), 48]
        before = data.train[2]
        rewrite_mask(folder, lambda mask: np.where(mask == 1, 2, mask))
        after = load(folder).train
        assert after[2]["labels_sha256"] == before["labels_sha256"]
        assert after[0]["labels_sha256"] != data.train[0]["labels_sha256"]
        assert after["image_sha256"] == data.train["image_sha256"]

    def test_looks_at_the_files_once(self, folder, monkeypatch):
        expected = load(folder)
        monkeypatch.setattr(checking, "_look_at", lambda *_: pytest.fail("looked again"))
        data = load(folder)
        assert [np.array(m).tobytes() for m in data.train["labels"]] == [
            np.array(m).tobytes() for m in expected.train["labels"]
        ]
        with pytest.raises(pytest.fail.Exception):  # void means something else now
            load(folder, void_labels=[RAW_VOID, 77])
        rewrite_mask(folder, lambda mask: mask)
        with pytest.raises(pytest.fail.Exception):  # a file was written
            load(folder)

    def test_what_a_disk_failed_to_read_is_read_again(self, folder, monkeypatch):
        def fail(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", fail)
            with pytest.raises(InputError, match="Permission denied"):
                load(folder, skip_bad_samples=True)
        data = load(folder, skip_bad_samples=True)
        assert (len(data.train), data.skipped) == (8, {})

    def test_several_processes_check_the_same(self, folder):
        with_one, with_two = load(folder), load(folder, void_labels=[RAW_VOID, 77], num_proc=2)
        assert with_one.train["labels_sha256"] == with_two.train["labels_sha256"]

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
        self.expect(folder, "every labelled pixel is 'sky' in the 8 training images", "void_labels")

    def test_binary_masks_of_0_and_255(self, folder):
        for path in (folder / "train" / "masks").iterdir():
            PILImage.fromarray(np.array(PILImage.open(path)) // 3 % 2 * np.uint8(255)).save(path)
        self.expect(folder, "every labelled pixel is 'ground'", "255 is always void", "palette file")

    def test_nothing_labelled(self, folder):
        for path in (folder / "train" / "masks").iterdir():
            PILImage.fromarray(np.full((32, 48), RAW_VOID, dtype=np.uint8)).save(path)
        self.expect(folder, "no pixel is labelled in the 8 training images")

    def test_a_training_image_in_the_validation_split(self, folder):
        shutil.copy(folder / "train" / "images" / "street 5.jpg", folder / "val" / "images" / "alley-2.jpg")
        shutil.copy(folder / "train" / "masks" / "street 5.png", folder / "val" / "masks" / "alley-2.png")
        self.expect(folder, "training image 'street 5' is also validation image 'alley-2'")
        data = load(folder, skip_bad_samples=True)
        assert (len(data.train), len(data.validation)) == (7, 5)
        assert list(data.skipped) == ["train/street 5"]

    def test_bad_samples_are_left_out_on_request(self, folder):
        rewrite_mask(folder, lambda mask: np.where(mask == 3, 37, mask).astype(np.uint8))
        (folder / "val" / "images" / "alley-3.jpg").write_bytes(b"")
        self.expect(folder, "street 0.png", "value 37", "and 1 more", "skip_bad_samples")
        data = load(folder, skip_bad_samples=True)
        assert (len(data.train), len(data.validation)) == (7, 4)
        assert data.skipped.keys() == {"train/street 0", "validation/alley-3"}
        assert "value 37" in data.skipped["train/street 0"]
        assert "street 0" not in data.train["id"]
        data = load(folder, skip_bad_samples=True)  # from the cache
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
            ('{"0": "a", "-2": "b"}', "-2 is not a value a mask can have"),
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
        assert data.train.column_names[:3] == ["id", "image", "labels"]
        assert data.train["id"][0] == "train-000000"
        for split in ("train", "validation"):
            ours, theirs = getattr(data, split), getattr(expected, split)
            assert [np.array(mask).tobytes() for mask in ours["labels"]] == [
                np.array(mask).tobytes() for mask in theirs["labels"]
            ]

    def test_masks_that_were_corrected_and_saved_again(self, saved, folder, tmp_path):
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
