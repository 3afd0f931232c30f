"""Which format a folder has, from fixtures as the tools export them."""

import json
import re
import shutil
import sys
from pathlib import Path

import annotation_sets
import numpy as np
import pytest
from data_sets import save
from PIL import Image

from pals_hf import load_segmentation_dataset
from pals_hf.cli.inspect_data import main as inspect
from pals_hf.cli.train import main as train
from pals_hf.data import StreamedDataset, annotations, stream_segmentation_dataset
from pals_hf.errors import InputError

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
TABLE = PAGE[PAGE.index("| export | flags |") :].split("\n\n")[0]
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.splitlines()[2:]]
ONE_CLASS = {"my_cellpose": "cell", "my_imagej": "object"}


@pytest.mark.parametrize("flags", [row[1] for row in ROWS])
def test_every_format_of_the_table(flags, tmp_path, monkeypatch, capsys):
    """The command of `docs/data.md` on a fixture, and the masks beside those that PIL draws."""
    monkeypatch.chdir(tmp_path)
    option, name = flags.strip("`").split()
    annotation_sets.WRITERS[name](tmp_path / name)
    with pytest.raises(SystemExit, match="0"):
        inspect([option, name])
    names = {"background", ONE_CLASS[name]} if name in ONE_CLASS else {"background", "car", "road"}
    report = json.loads(Path("inspection.json").read_text())
    assert {name.strip("_") for name in report["classes"]["train"]} == {*names, "void"}
    _, labels = annotation_sets.read(tmp_path / name)
    if name == "my_coco":
        return  # pycocotools fills polygons in another way, see test_coco.py
    annotation_sets.assert_as_drawn(labels, {"car": 1, "road": 1} if name in ONE_CLASS else None)


def test_the_table_has_all_fixtures():
    assert [row[1].strip("`").split()[1] for row in ROWS] == list(annotation_sets.WRITERS)


class TestWholeProgram:
    """Fractions, bad samples and streams are the same as for masks."""

    @pytest.fixture
    def root(self, tmp_path):
        return annotation_sets.labelme(tmp_path / "my_labelme")

    def test_training(self, root, tmp_path, capsys):
        path = root / "train" / "street0.json"
        content = json.loads(path.read_text())
        content["shapes"][0]["points"] = [[1, 1], [2, 2]]
        path.write_text(json.dumps(content))
        short = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--disable_tqdm", "True"]
        short += ["--eval_strategy", "no", "--save_strategy", "no", "--crop_size", "32", "32", "--train_count", "2"]
        options = ["--dataset_dir", str(root), "--skip_bad_samples", "--output_dir", str(tmp_path / "run")]
        train([*options, *short, "--unlabelled", "void"])
        assert json.loads((tmp_path / "run" / "config.json").read_text())["id2label"] == {"0": "car", "1": "road"}
        skipped = json.loads((tmp_path / "run" / "skipped_samples.json").read_text())
        assert re.search(r"street0\.json: shape 1 \('road'\) has 2 corners", str(skipped))

    def test_unlabelled(self, root):
        for unlabelled, outside in ((None, "background"), ("background", "background"), ("void", None)):
            data = load_segmentation_dataset(dataset_dir=root, unlabelled=unlabelled)
            assert list(data.id2label.values()) == [*([outside] if outside else []), "car", "road"]
            mask = np.asarray(annotation_sets.drawn(annotation_sets.objects(0))).astype(int)
            assert np.array_equal(np.asarray(data.train[0]["labels"]), mask if outside else (mask - 1) % 256)
            assert data.notes[0].startswith("pixels outside of all annotations of labelme ")
            assert ("Set unlabelled to void" in data.notes[0]) == (outside is not None)

    @pytest.mark.parametrize("name", ["my_coco", "my_label_studio", "my_labelme"])
    def test_stream(self, name, tmp_path):
        root = annotation_sets.WRITERS[name](tmp_path / name)
        if name == "my_label_studio":
            with pytest.raises(InputError, match="no validation split"):
                stream_segmentation_dataset(dataset_dir=root)
            return
        stream = stream_segmentation_dataset(dataset_dir=root)
        data = load_segmentation_dataset(dataset_dir=root)
        rows = StreamedDataset(stream.train, stream.classes, lambda image, labels: {"labels": np.asarray(labels)})
        found = {row["id"]: row["labels"] for row in (pending.load() for pending in rows)}
        assert {id: mask.tobytes() for id, mask in found.items()} == {
            row["id"]: np.asarray(row["labels"]).tobytes() for row in data.train
        }
        assert stream.notes == data.notes

    def test_a_change_of_the_annotations_is_seen(self, tmp_path):
        root = annotation_sets.roboflow_coco(tmp_path)
        before = load_segmentation_dataset(dataset_dir=root).train["labels_sha256"]
        path = root / "train" / "_annotations.coco.json"
        content = json.loads(path.read_text())
        content["annotations"] = content["annotations"][1:]
        path.write_text(json.dumps(content))
        after = load_segmentation_dataset(dataset_dir=root).train["labels_sha256"]
        assert [one == two for one, two in zip(before, after, strict=True)] == [False, True, True, True]


class TestAmbiguous:
    def test_masks_and_annotations(self, folder):
        annotation_sets.write_json(folder / "train" / "_annotations.coco.json", annotation_sets.coco_content([]))
        with pytest.raises(InputError, match=r"has masks, like .*\.png, and annotations of COCO, like .*coco\.json"):
            load_segmentation_dataset(dataset_dir=folder, void_labels=[11])

    def test_two_files_for_one_split(self, tmp_path):
        root = annotation_sets.roboflow_coco(tmp_path)
        shutil.copy(root / "train" / "_annotations.coco.json", root / "train" / "copy.json")
        with pytest.raises(InputError, match=r"_annotations\.coco\.json and .*copy\.json may both hold"):
            load_segmentation_dataset(dataset_dir=root)

    def test_two_formats(self, tmp_path):
        root = annotation_sets.roboflow_coco(tmp_path)
        annotation_sets.yolo(root)
        with pytest.raises(InputError, match=r"annotations of two formats: COCO \(.*\) and YOLO \(.*data\.yaml\)"):
            load_segmentation_dataset(dataset_dir=root)

    @pytest.mark.parametrize("option", [{"id2label": {0: "a", 1: "b"}}, {"void_labels": [0]}])
    def test_other_class_names(self, option, tmp_path):
        with pytest.raises(InputError, match=f"labelme name their classes themselves. Remove {next(iter(option))}"):
            load_segmentation_dataset(dataset_dir=annotation_sets.labelme(tmp_path), **option)

    def test_unlabelled_for_masks(self, folder):
        with pytest.raises(InputError, match=r"unlabelled is for annotations.*but this data set has masks"):
            load_segmentation_dataset(dataset_dir=folder, void_labels=[11], unlabelled="void")
        with pytest.raises(InputError, match="unlabelled must be one of background, void, got 'all'"):
            load_segmentation_dataset(dataset_dir=folder, void_labels=[11], unlabelled="all")

    def test_an_image_in_two_folders(self, tmp_path):
        root = annotation_sets.label_studio(tmp_path)
        shutil.copytree(root / "images", root / "others")
        with pytest.raises(InputError, match=r"names the image .* which may be .*images.* or .*others"):
            load_segmentation_dataset(dataset_dir=root)

    def test_images_that_are_not_named(self, tmp_path):
        root = annotation_sets.roboflow_coco(tmp_path)
        save(Image.new("RGB", (48, 32)), root / "train" / "more.jpg")
        notes = load_segmentation_dataset(dataset_dir=root).notes
        assert f"{root / 'train'} has 1 images that are not used" in notes


@pytest.mark.parametrize("name", ["my_coco", "my_labelme", "my_label_studio", "my_supervisely"])
def test_an_image_that_is_missing(name, tmp_path):
    root = annotation_sets.WRITERS[name](tmp_path / name)
    next(root.rglob("street0.jpg")).unlink()
    with pytest.raises(InputError, match=r"\.json names the image .*street0\.jpg', which is not in .*Add the image"):
        load_segmentation_dataset(dataset_dir=root)


def test_only_the_validation_split_is_annotated(tmp_path):
    root = annotation_sets.coco(tmp_path)
    (root / "annotations" / "instances_train2017.json").unlink()
    source, labels = annotation_sets.read(root)  # a single file is no split
    assert (list(source.splits), len(labels)) == (["train"], 2)
    (root / "annotations" / "instances_val2017.json").rename(root / "annotations" / "instances_test2017.json")
    with pytest.raises(InputError, match="annotations of COCO for test, but not for the train split"):
        load_segmentation_dataset(dataset_dir=root)


def test_packages_that_are_not_installed(tmp_path, monkeypatch):
    root = annotation_sets.coco(tmp_path / "my_coco")
    monkeypatch.setitem(sys.modules, "msgspec", None)
    for name in ("coco", "json_files"):
        monkeypatch.delitem(sys.modules, f"{annotations.__name__}.{name}", raising=False)
        monkeypatch.delattr(annotations, name, raising=False)
    with pytest.raises(InputError, match=r"annotations of COCO need msgspec.*pip install 'pals_hf\[annotations\]'"):
        load_segmentation_dataset(dataset_dir=root)
    assert len(annotation_sets.read(annotation_sets.labelme(tmp_path / "my_labelme"))[1]) == 6  # needs none of them
