"""YOLO segmentation: `data.yaml` as exports write it, and what may be wrong with a line."""

import shutil

import annotation_sets
import numpy as np
import pytest

from pals_hf.data.annotations.drawing import Sizes
from pals_hf.data.annotations.yolo import Yolo
from pals_hf.errors import InputError

SIZE = (20, 10)


def draw(text):
    return np.asarray(Yolo({0: 1, 4: 2}).draw(text.encode(), Sizes(SIZE, SIZE)))


def test_lines_are_drawn_in_their_order():
    mask = draw("0 0 0 0.95 0 0.95 0.9 0 0.9\n\n4 0.5 0.5 0.95 0.5 0.95 0.9\n")
    assert (mask[1, 1], mask[6, 15]) == (1, 2)
    assert not draw("").any()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1 0.1", "line 1 has a box, not a polygon. Export the data set for segmentation"),
        ("0 0.1 0.1 0.2 0.2 0.3", "line 1 has 5 coordinates, which are not pairs"),
        ("0 0.1 0.1", "line 1 has 1 corners, but needs at least 3"),
        ("0", "line 1 has 0 corners"),
        ("3 0.1 0.1 0.2 0.2 0.3 0.1", r"line 1 has the class 3, which data\.yaml does not name \(0, 4\)"),
        ("car 0.1 0.1 0.2 0.2 0.3 0.1", "line 1 must be a class and coordinates, got 'car"),
        ("0 12 3 18 3 18 9", "line 1 reaches from 240 to 360, but the image has a width of 20 pixels"),
        ("0 nan 0.1 0.2 0.2 0.3 0.1", "corners that are not pairs of numbers"),
    ],
)
def test_a_bad_line(line, message):
    with pytest.raises(InputError, match=message):
        draw(line)


class TestDataYaml:
    @pytest.fixture
    def root(self, tmp_path):
        return annotation_sets.yolo(tmp_path / "x")

    @pytest.mark.parametrize(
        ("train", "val"),
        [
            ("../images/train", "../images/val"),
            ("/home/me/datasets/x/images/train", "x/images/val"),
            ("[images/train]", "./images/val/"),
            ("train.txt", "images/val"),
        ],
    )
    def test_places_of_images(self, root, train, val):
        (root / "train.txt").write_text("".join(f"data/images/train/street{number}.jpg\n" for number in range(4)))
        (root / "data.yaml").write_text(f"train: {train}\nval: {val}\nnc: 2\nnames: {{0: car, 1: road}}\n")
        annotation_sets.assert_as_drawn(annotation_sets.read(root)[1])

    def test_splits_outside(self, root):
        """`train/images` and `train/labels`, as Roboflow exports them."""
        for split in ("train", "val"):
            for kind in ("images", "labels"):
                (root / split).mkdir(exist_ok=True)
                shutil.move(root / kind / split, root / split / kind)
        (root / "data.yaml").write_text("train: ../train/images\nval: ../val/images\nnames: [car, road]\n")
        annotation_sets.assert_as_drawn(annotation_sets.read(root)[1])

    def test_images_without_a_text_file_show_nothing(self, root):
        (root / "labels" / "train" / "street0.txt").unlink()
        source, labels = annotation_sets.read(root)
        assert not labels["street0"].any()
        assert "1 images of the train split have no text file, so they show none of the classes" in source.notes
        shutil.rmtree(root / "labels" / "val")
        with pytest.raises(InputError, match=r"no image of the validation split has a text file, like .*street4\.txt"):
            annotation_sets.read(root)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("train: images/train\n", "does not name the classes"),
            ("names: [car\n", "is not readable YAML"),
            ("names: [car, road]\nnc: 3\ntrain: images/train\n", "`names` must name the 3 classes"),
            ("names: [car, 5]\ntrain: images/train\n", "`names` must name the classes"),
            ("names: [car, road]\n", "names no images for the train split"),
            ("names: [car, road]\ntrain: pictures\n", "the train images are in pictures, which is not below"),
        ],
    )
    def test_something_wrong(self, root, content, message):
        (root / "data.yaml").write_text(content)
        with pytest.raises(InputError, match=rf"data\.yaml.*{message}"):
            annotation_sets.read(root)

    def test_two_files(self, root):
        shutil.copy(root / "data.yaml", root / "dataset.yaml")
        with pytest.raises(InputError, match=r"data\.yaml and .*dataset\.yaml may both describe"):
            annotation_sets.read(root)
