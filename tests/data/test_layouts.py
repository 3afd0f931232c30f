"""Data sets as people download them, from fixtures in their exact layout."""

import json
import os
import shutil

import annotation_sets
import data_sets
import numpy as np
import pytest
from launching import time_limit
from PIL import Image as PILImage

from pals_hf import load_segmentation_dataset
from pals_hf.data.layouts import read_layout
from pals_hf.errors import InputError


def masks_of(split):
    return [np.array(mask) for mask in split["labels"]]


class TestCityscapes:
    @pytest.fixture
    def root(self, tmp_path):
        return data_sets.cityscapes(tmp_path / "cityscapes")

    def test_label_ids_become_the_19_classes(self, root):
        data = load_segmentation_dataset(dataset_dir=root)
        assert (len(data.train), len(data.validation), len(data.test)) == (4, 3, 2)
        assert data.name == "Cityscapes"
        assert len(data.id2label) == 19
        assert (data.id2label[0], data.id2label[13], data.id2label[18]) == ("road", "car", "bicycle")
        assert data.train["id"][0] == "aachen/aachen_000000_000019"
        raw = np.array(
            PILImage.open(root / "gtFine" / "train" / "aachen" / "aachen_000000_000019_gtFine_labelIds.png")
        )
        expected = np.full_like(raw, 255)
        for value, index in ((7, 0), (26, 13), (23, 10)):
            expected[raw == value] = index
        assert {3, 4} & set(np.unique(raw))
        assert np.array_equal(masks_of(data.train)[0], expected)

    def test_all_label_ids_have_their_meaning(self, root):
        """The 34 labelIds of the data set's own table, license plate (-1, stored as 255) included."""
        train_ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
        path = root / "gtFine" / "train" / "aachen" / "aachen_000000_000019_gtFine_labelIds.png"
        mask = np.zeros(data_sets.SIZE, dtype=np.uint8)
        mask[0, :34], mask[0, 34] = range(34), 255
        PILImage.fromarray(mask).save(path)
        labels = masks_of(load_segmentation_dataset(dataset_dir=root).train)[0][0]
        for value in range(34):
            assert labels[value] == (train_ids.index(value) if value in train_ids else 255)
        assert labels[34] == 255

    def test_the_test_split_has_no_masks(self, root):
        data = load_segmentation_dataset(dataset_dir=root)
        assert data.test.column_names == ["id", "image"]
        assert data.test[0]["image"].size == (48, 32)

    def test_knows_colours_and_terms(self, root):
        data = load_segmentation_dataset(dataset_dir=root)
        assert data.colors[0] == (128, 64, 128)
        assert "cityscapes-dataset.com" in data.license

    def test_missing_mask(self, root):
        path = root / "gtFine" / "val" / "frankfurt" / "frankfurt_000001_000019_gtFine_labelIds.png"
        path.unlink()
        with pytest.raises(InputError, match=f"{path.name} is missing, but .*frankfurt_000001_000019_leftImg8bit.png"):
            load_segmentation_dataset(dataset_dir=root)

    def test_without_train(self, root):
        shutil.rmtree(root / "leftImg8bit" / "train")
        with pytest.raises(InputError, match=r"train is missing or empty"):
            load_segmentation_dataset(dataset_dir=root)


class TestVOC2012:
    def test_reads_lists_and_palette_masks(self, tmp_path):
        data = load_segmentation_dataset(dataset_dir=data_sets.voc2012(tmp_path))
        assert data.name == "Pascal VOC2012"
        assert data.train["id"] == ["2007_000032", "2007_000039", "2007_000063"]
        assert data.validation["id"] == ["2007_000033", "2007_000042"]
        assert data.test["id"] == ["2008_000001"]
        assert (len(data.id2label), data.id2label[15]) == (21, "person")
        raw = PILImage.open(tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2007_000032.png")
        assert raw.mode == "P"
        assert np.array_equal(masks_of(data.train)[0], np.array(raw))

    def test_the_augmented_list_is_used_where_present(self, tmp_path):
        data = load_segmentation_dataset(dataset_dir=data_sets.voc2012(tmp_path, trainaug=True))
        assert data.name == "Pascal VOC2012 (trainaug)"
        assert len(data.train) == 5
        assert data.train["id"][-1] == "2008_000003"

    def test_a_list_must_not_lead_out_of_the_folder(self, tmp_path):
        data_sets.voc2012(tmp_path)
        secret = tmp_path / "VOCdevkit" / "secret.jpg"
        data_sets.scene([0, 1])[0].save(secret)
        path = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt"
        path.write_text("../../secret\n")
        with pytest.raises(InputError, match=r"train\.txt: '../../secret\.jpg' is outside of .*JPEGImages"):
            load_segmentation_dataset(dataset_dir=tmp_path)

    def test_a_list_with_an_unknown_image(self, tmp_path):
        data_sets.voc2012(tmp_path)
        path = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt"
        path.write_text("2007_999999\n")
        with pytest.raises(InputError, match=r"2007_999999\.jpg is missing, but .*val\.txt needs it"):
            load_segmentation_dataset(dataset_dir=tmp_path)


def test_ade20k_zero_is_void(tmp_path):
    data = load_segmentation_dataset(dataset_dir=data_sets.ade20k(tmp_path))
    assert (data.name, len(data.train), len(data.validation)) == ("ADE20K", 3, 2)
    assert len(data.id2label) == len(data.colors) == 150
    assert (data.id2label[0], data.id2label[2], data.id2label[149]) == ("wall", "sky", "flag")
    raw = np.array(
        PILImage.open(tmp_path / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png"), dtype=int
    )
    assert np.array_equal(masks_of(data.train)[0], np.where(raw == 0, 255, raw - 1))
    assert (raw == 0).any()


def test_camvid_in_segnets_split(tmp_path):
    data = load_segmentation_dataset(dataset_dir=data_sets.camvid(tmp_path))
    assert (data.name, len(data.train), len(data.validation), len(data.test)) == ("CamVid", 4, 2, 2)
    assert (data.id2label[8], data.colors[8]) == ("car", (64, 0, 128))
    raw = np.array(PILImage.open(tmp_path / "trainannot" / "0001TP_000000.png"))
    assert np.array_equal(masks_of(data.train)[0], np.where(raw == 11, 255, raw))


def test_known_data_sets_take_other_class_names(tmp_path):
    """Void and names of one's own, for example with two classes of CamVid joined beforehand."""
    names = {value: f"class {value}" for value in (0, 3, 8)}
    data = load_segmentation_dataset(dataset_dir=data_sets.camvid(tmp_path), id2label=names, void_labels=[11])
    assert data.id2label == {0: "class 0", 1: "class 3", 2: "class 8"}
    assert set(np.unique(masks_of(data.train))) == {0, 1, 2, 255}


class TestOwnDataInAKnownStructure:
    """Classes that the folder names itself count, and it is not called what it is not."""

    def test_class_names(self, tmp_path):
        root = data_sets.ade20k(tmp_path) / "ADEChallengeData2016"
        (root / "id2label.json").write_text(json.dumps({"1": "crack", "3": "rust", "150": "paint"}))
        data = load_segmentation_dataset(dataset_dir=root, void_labels=[0])
        assert data.id2label == {0: "crack", 1: "rust", 2: "paint"}
        assert (data.name, data.colors, data.license) == ("ADEChallengeData2016", None, None)
        assert (len(data.train), len(data.validation)) == (3, 2)
        raw = np.array(PILImage.open(root / "annotations/training/ADE_train_00000001.png"))
        assert np.array_equal(masks_of(data.train)[0] == 1, raw == 3)

    def test_class_names_beside_the_known_structure(self, tmp_path):
        """In the folder that was given, which holds the known one."""
        data_sets.ade20k(tmp_path)
        (tmp_path / "id2label.json").write_text(json.dumps({"1": "crack", "3": "rust", "150": "paint"}))
        data = load_segmentation_dataset(dataset_dir=tmp_path, void_labels=[0])
        assert (data.id2label, data.license) == ({0: "crack", 1: "rust", 2: "paint"}, None)

    def test_palette(self, tmp_path):
        root = data_sets.voc2012(tmp_path) / "VOCdevkit" / "VOC2012"
        for path in (root / "SegmentationClass").iterdir():
            shown = np.array(PILImage.open(path)) == 15
            PILImage.fromarray(np.where(shown[..., None], [70, 130, 180], 0).astype(np.uint8)).save(path)
        (root / "palette.json").write_text(json.dumps({"ground": [0, 0, 0], "sky": "#4682b4"}))
        data = load_segmentation_dataset(dataset_dir=root)
        assert (data.name, data.id2label) == ("VOC2012", {0: "ground", 1: "sky"})
        assert data.train["id"] == ["2007_000032", "2007_000039", "2007_000063"]


class TestAnyFolder:
    def test_colours_nested_folders_and_other_names(self, tmp_path):
        data = load_segmentation_dataset(dataset_dir=data_sets.color_folder(tmp_path / "mine"))
        assert (len(data.train), len(data.validation)) == (4, 2)
        assert data.id2label == {0: "ground", 1: "wall", 2: "sky"}
        assert data.colors == ((128, 64, 128), (255, 0, 0), (70, 130, 180))
        assert data.train["id"] == [f"day {i % 2}/straße {i}" for i in (0, 2, 1, 3)]
        _, mask = data_sets.scene([0, 1, 2, 3], seed=[len("train"), 0])
        assert np.array_equal(masks_of(data.train)[0], np.where(mask == 3, 255, mask))

    def test_a_colour_that_is_not_in_the_palette(self, tmp_path):
        root = data_sets.color_folder(tmp_path / "mine")
        path = root / "labels" / "train" / "day 1" / "straße 3_mask.png"
        mask = PILImage.open(path)
        mask.putpixel((5, 7), (1, 2, 3))
        mask.save(path)
        with pytest.raises(InputError, match=r"straße 3_mask\.png: colour \(1, 2, 3\) is not in the palette file"):
            load_segmentation_dataset(dataset_dir=root)

    def test_palette_as_text_lines(self, tmp_path):
        root = data_sets.color_folder(tmp_path / "mine")
        (root / "palette.json").unlink()
        lines = ["# red green blue name", "128 64 128\tground", "255 0 0 wall", "70 130 180 the sky", "0 0 0 Void"]
        (tmp_path / "label_colors.txt").write_text("\n".join(lines))
        data = load_segmentation_dataset(dataset_dir=root, palette=tmp_path / "label_colors.txt")
        assert list(data.id2label.values()) == ["ground", "wall", "the sky"]

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            ('{"a": [0, 0, 0], "b": [0, 0, 0]}', r"'b' has the colour \(0, 0, 0\) of another class"),
            ('{"a": [0, 0, 256], "b": [0, 0, 0]}', r"\[0, 0, 256\] is not a colour"),
            ('{"a": [0, 0, 0], "void": [1, 1, 1]}', "2 to 255 classes, but it names 1"),
            ("[[0, 0, 0], [1, 1, 1]]", "must map class names to colours"),
            ("{", "not readable JSON"),
        ],
    )
    def test_palette_with_something_wrong(self, tmp_path, content, part):
        root = data_sets.color_folder(tmp_path / "mine")
        (root / "palette.json").write_text(content)
        with pytest.raises(InputError, match=rf"palette\.json.*{part}"):
            load_segmentation_dataset(dataset_dir=root)

    def test_palette_with_void_labels(self, tmp_path):
        with pytest.raises(InputError, match="combined with id2label or void_labels"):
            load_segmentation_dataset(dataset_dir=data_sets.color_folder(tmp_path / "mine"), void_labels=[3])

    def test_without_splits(self, tmp_path):
        root = data_sets.color_folder(tmp_path / "mine")
        for kind in ("images", "labels"):
            (root / kind / "train").rename(root / "part")
            shutil.rmtree(root / kind)
            (root / "part").rename(root / kind)
        data = load_segmentation_dataset(dataset_dir=root, validation_share=0.25)
        assert (len(data.train), len(data.validation)) == (3, 1)

    def test_other_images_without_masks_to_predict(self, folder):
        (folder / "test" / "images").mkdir(parents=True)
        data_sets.scene([0, 1])[0].save(folder / "test" / "images" / "new.jpg")
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[11])
        assert data.test["id"] == ["new"]

    def test_values_with_gaps_are_numbered(self, folder):
        (folder / "id2label.json").write_text(json.dumps({"0": "ground", "1": "wall", "3": "car", "200": "ghost"}))
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[2, 11])
        assert data.id2label == {0: "ground", 1: "wall", 2: "car", 3: "ghost"}
        assert set(np.unique(masks_of(data.train))) == {0, 1, 2, 255}


class TestNothingIsLeftOutInSilence:
    def load(self, folder):
        return load_segmentation_dataset(dataset_dir=folder, void_labels=[11])

    @pytest.mark.parametrize("name", ["valid", "dev", "eval", "validation"])
    def test_other_names_of_the_validation_split(self, folder, name):
        (folder / "val").rename(folder / name)
        data = self.load(folder)
        assert (len(data.train), len(data.validation), data.notes) == (8, 5, ())

    def test_a_folder_that_no_split_uses(self, folder):
        shutil.copytree(folder / "val", folder / "holdout")
        shutil.copytree(folder / "val", folder / "test")
        data = self.load(folder)
        assert len(data.test) == 5
        unused = ("holdout/images", "holdout/masks", "test/masks")
        assert data.notes == tuple(f"{folder / name} has 5 images that are not used" for name in unused)

    def test_masks_without_an_image_or_outside_of_the_lists(self, tmp_path):
        root = data_sets.cityscapes(tmp_path / "cityscapes")
        next((root / "leftImg8bit" / "val" / "frankfurt").iterdir()).unlink()
        note = f"{root / 'gtFine' / 'val'} has 1 masks without an image, which are not used"
        assert load_segmentation_dataset(dataset_dir=root).notes == (note,)
        home = data_sets.voc2012(tmp_path / "voc") / "VOCdevkit" / "VOC2012"
        assert load_segmentation_dataset(dataset_dir=home).notes == ()
        (home / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_000032\n2007_000039\n")
        note = f"{home / 'SegmentationClass'} has 1 masks that are in no list, which are not used"
        assert load_segmentation_dataset(dataset_dir=home).notes == (note,)

    @pytest.mark.parametrize("copy", ["train/imgs", "images/train", "training/images", "train/labels"])
    def test_two_folders_for_one_thing(self, folder, copy):
        shutil.copytree(folder / "train" / ("masks" if "labels" in copy else "images"), folder / copy)
        with pytest.raises(InputError, match=r"train.* and .* may both hold the (images of|masks of)"):
            self.load(folder)

    def test_a_folder_of_other_labels_beside_the_masks(self, folder):
        """YOLO's text files."""
        (folder / "train" / "labels").mkdir()
        (folder / "train" / "labels" / "street 0.txt").write_text("0 0.5 0.5 0.1 0.1")
        assert len(self.load(folder).train) == 8

    @pytest.mark.parametrize("name", ["extra.heic", "street 9.npy", "Extra.JP2"])
    def test_a_picture_of_a_format_that_is_not_read(self, folder, name):
        (folder / "train" / "images" / name).write_bytes(b"something")
        with pytest.raises(InputError, match=f"{name}: pictures of this format are not read"):
            self.load(folder)

    def test_a_folder_full_of_images_without_a_layout(self, folder, tmp_path):
        for number, path in enumerate((folder / "train" / "images").iterdir()):
            shutil.copy(path, tmp_path / f"{number}.jpg")
        with pytest.raises(InputError, match=r"has images, like .*\.jpg, but not in a layout that is known"):
            self.load(tmp_path)

    def test_masks_of_other_names(self, folder):
        for path in (folder / "train" / "masks").iterdir():
            path.rename(path.with_name(f"{path.stem}-segmented.png"))
        with pytest.raises(InputError, match=r"street 0\.jpg has no mask.*have other names, like .*-segmented\.png"):
            self.load(folder)


class TestOneFolder:
    """Images and masks in one folder, told apart by the ending of their names."""

    @pytest.mark.parametrize("ending", ["_mask", "_masks", "_gt", "_label"])
    def test_endings(self, folder, ending):
        for kind in ("train", "val"):
            for path in (folder / kind / "masks").iterdir():
                path.rename(folder / kind / "images" / f"{path.stem}{ending}.png")
            (folder / kind / "masks").rmdir()
            (folder / kind / "images").rename(folder / kind / "pictures")
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[11])
        assert (len(data.train), len(data.validation), data.notes) == (8, 5, ())
        assert data.train["id"][0] == "pictures/street 0"
        (folder / "train" / "pictures" / f"street 1{ending}.png").unlink()
        with pytest.raises(InputError, match=r"street 1\.jpg has no mask"):
            load_segmentation_dataset(dataset_dir=folder, void_labels=[11])

    def test_names_that_differ_between_the_splits(self, tmp_path):
        root = annotation_sets.roboflow_masks(tmp_path)
        (root / "valid" / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, road\n2, car\n")
        with pytest.raises(InputError, match=r"train/_classes\.csv and .*valid/_classes\.csv name other classes"):
            load_segmentation_dataset(dataset_dir=root)


class TestCVAT:
    @pytest.fixture
    def root(self, tmp_path):
        return annotation_sets.cvat(tmp_path)

    def test_subsets(self, root):
        """They are called as they were typed."""
        lists = root / "ImageSets" / "Segmentation"
        names = (lists / "default.txt").read_text().splitlines()
        (lists / "default.txt").unlink()
        (lists / "Train.txt").write_text("\n".join(names[:4]))
        (lists / "Validation.txt").write_text("\n".join(names[4:]))
        source, labels = annotation_sets.read(root)
        assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 4, "validation": 2}
        annotation_sets.assert_as_drawn(labels)
        (lists / "val.txt").write_text("\n".join(names[4:]))
        with pytest.raises(InputError, match=r"val\.txt and .*Validation\.txt may both hold the names"):
            load_segmentation_dataset(dataset_dir=root)

    def test_an_export_without_images(self, root):
        shutil.rmtree(root / "JPEGImages")
        with pytest.raises(InputError, match=r"JPEGImages is missing\. Export the data set with its images"):
            load_segmentation_dataset(dataset_dir=root)


def test_masks_of_older_labelme(tmp_path):
    """Arrays in `SegmentationClass`, PNGs in `SegmentationClassPNG`."""
    root = annotation_sets.labelme_voc(tmp_path)
    (root / "SegmentationClass").rename(root / "SegmentationClassPNG")
    (root / "SegmentationClass").mkdir()
    np.save(root / "SegmentationClass" / "street0.npy", np.zeros((2, 2)))
    annotation_sets.assert_as_drawn(annotation_sets.read(root)[1])


class TestNames:
    def test_masks_as_gif(self, folder):
        """PIL saves grey as a palette of the greys that occur."""
        expected = masks_of(load_segmentation_dataset(dataset_dir=folder, void_labels=[11]).train)
        for path in (folder / "train" / "masks").iterdir():
            PILImage.open(path).save(path.with_name(f"{path.stem}_mask.gif"))
            path.unlink()
        found = masks_of(load_segmentation_dataset(dataset_dir=folder, void_labels=[11]).train)
        assert np.array_equal(found, expected)

    def test_letters_that_macos_decomposes(self, folder):
        """One name is composed (NFC), and the other decomposed (NFD)."""
        for kind, name in (("images/street 0.jpg", "caf\u00e9.jpg"), ("masks/street 0.png", "cafe\u0301.png")):
            path = folder / "train" / kind
            path.rename(path.with_name(name))
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[11])
        assert data.train["id"][0] == "caf\u00e9"

    def test_letters_in_a_list(self, tmp_path):
        data_sets.voc2012(tmp_path)
        home = tmp_path / "VOCdevkit" / "VOC2012"
        (home / "id2label.json").write_text(json.dumps([f"class {index}" for index in range(21)]))
        for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
            (home / folder / f"2007_000032.{suffix}").rename(home / folder / f"cafe\u0301.{suffix}")
        path = home / "ImageSets" / "Segmentation" / "train.txt"
        path.write_text(path.read_text().replace("2007_000032", "caf\u00e9"), encoding="utf-8-sig")
        assert load_segmentation_dataset(dataset_dir=tmp_path).train["id"][0] == "caf\u00e9"

    def test_a_name_that_is_not_utf8(self, folder):
        path = os.fsencode(folder / "train" / "images")
        os.rename(path + b"/street 0.jpg", path + b"/caf\xe9.jpg")
        with pytest.raises(InputError, match=r"caf\\udce9\.jpg: the name is not UTF-8\. Rename the file") as error:
            load_segmentation_dataset(dataset_dir=folder, void_labels=[11])
        str(error.value).encode()


class TestClassesOfALayout:
    """A known layout does not say what the values mean. The names of the images tell whose they are."""

    def rename(self, root):
        """Give the images of the VOC fixture names of one's own."""
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix != ".txt":
                path.rename(path.with_name(path.name.replace("200", "plant")))
        for path in root.rglob("*.txt"):
            path.write_text(path.read_text().replace("200", "plant"))
        return root / "VOCdevkit" / "VOC2012"

    def test_other_images_need_class_names(self, tmp_path):
        home = self.rename(data_sets.voc2012(tmp_path))
        with pytest.raises(InputError, match=r"VOC2012/id2label\.json is missing"):
            load_segmentation_dataset(dataset_dir=tmp_path)
        (home / "id2label.json").write_text(json.dumps([f"class {index}" for index in range(21)]))
        data = load_segmentation_dataset(dataset_dir=tmp_path)
        assert (data.id2label[15], data.license, data.colors) == ("class 15", None, None)

    def test_names_of_cvat(self, tmp_path):
        home = self.rename(data_sets.voc2012(tmp_path))
        masks = [np.array(PILImage.open(path)) for path in (home / "SegmentationClass").iterdir()]
        used = np.unique(masks).tolist()
        colors = {value: f"{value * 37 % 256},{value * 91 % 256},{value}" for value in used}
        lines = [f"{'void' if value == 255 else f'part {value}'}:{color}::" for value, color in colors.items()]
        (home / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + "\n".join(lines))
        data = load_segmentation_dataset(dataset_dir=tmp_path)
        assert list(data.id2label.values()) == ["part 0", "part 1", "part 2", "part 3", "part 15"]
        raw = np.array(PILImage.open(home / "SegmentationClass" / "plant7_000032.png"))
        assert np.array_equal(masks_of(data.train)[0] == 4, raw == 15)

    @pytest.mark.parametrize("name", ["classes.txt", "obj.names"])
    def test_names_in_a_file_of_another_program(self, tmp_path, name):
        home = data_sets.voc2012(tmp_path) / "VOCdevkit" / "VOC2012"
        (home / name).write_text("mud\nsand\n")
        with pytest.raises(InputError, match=rf"{name} is not read\. Name the classes in .*id2label\.json instead"):
            load_segmentation_dataset(dataset_dir=tmp_path)

    def test_two_files_of_names(self, folder):
        (folder / "palette.json").write_text(json.dumps({"a": [0, 0, 0], "b": [255, 0, 0]}))
        with pytest.raises(InputError, match=r"id2label\.json and .*palette\.json both name the classes"):
            load_segmentation_dataset(dataset_dir=folder)


class TestParquet:
    def test_a_folder_of_parquet_files(self, tmp_path):
        root = data_sets.parquet(tmp_path / "set")
        data = load_segmentation_dataset(str(root))
        assert (len(data.train), len(data.validation)) == (4, 2)
        assert data.id2label == {0: "ground", 1: "wall", 2: "sky"}
        assert np.array_equal(masks_of(data.train)[1], data_sets.scene([0, 1, 2, 255], seed=[len("train"), 1])[1])

    def test_one_file_of_another_writer(self, tmp_path):
        """Encoded bytes in a plain binary column, no word about images in the metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = {"image": [], "label": []}
        for index in range(5):
            picture, mask = data_sets.scene([0, 1], seed=index)
            for column, value in (("image", picture), ("label", PILImage.fromarray(mask.astype(np.uint8)))):
                value.save(tmp_path / "picture.png")
                rows[column].append((tmp_path / "picture.png").read_bytes())
        pq.write_table(pa.table(rows), tmp_path / "mine.parquet")
        data = load_segmentation_dataset(str(tmp_path / "mine.parquet"), id2label={0: "a", 1: "b"})
        assert (len(data.train), len(data.validation)) == (4, 1)


def test_links_in_a_circle_are_followed_once(tmp_path):
    """Two links to their own folder make 2**40 paths, after which the system gives up."""
    for kind in ("images", "masks"):
        folder = tmp_path / "train" / kind
        (folder / "city").mkdir(parents=True)
        (folder / "city" / "a.png").touch()
        for name in ("a link before it", "one", "two"):
            (folder / name).symlink_to("city" if name[0] == "a" else ".")
    with time_limit(60):
        records = read_layout(tmp_path).splits["train"]
    assert [record.id for record in records] == ["city/a"]
