"""Supervisely: what an object may be, and what may be wrong with it."""

import json

import annotation_sets
import numpy as np
import pytest

from pals_hf.data.annotations.drawing import Sizes
from pals_hf.data.annotations.supervisely import Supervisely
from pals_hf.errors import InputError

SIZE = (20, 10)


def draw(**entry):
    content = {"size": {"width": 20, "height": 10}, "objects": [{"classTitle": "a", **entry}]}
    return np.asarray(Supervisely({"a": 1}).draw(json.dumps(content).encode(), Sizes(SIZE, SIZE)))


def polygon(exterior, interior=()):
    return {"geometryType": "polygon", "points": {"exterior": exterior, "interior": list(interior)}}


SQUARE = [[2, 1], [11, 1], [11, 8], [2, 8]]


def test_holes():
    assert draw(**polygon(SQUARE)).sum() == 10 * 8
    assert draw(**polygon(SQUARE, [[[5, 3], [7, 3], [7, 5], [5, 5]]])).sum() == 10 * 8 - 9


def test_a_rectangle():
    assert draw(geometryType="rectangle", points={"exterior": [[2, 1], [11, 8]], "interior": []}).sum() == 10 * 8


def test_opencv_fills_like_us():
    """As Supervisely does: integer corners give the same pixels, but for the outline of slanted edges."""
    cv2 = pytest.importorskip("cv2")
    expected = np.zeros(SIZE[::-1], dtype=np.uint8)
    cv2.fillPoly(expected, [np.array(SQUARE)], 1)
    assert np.array_equal(draw(**polygon(SQUARE)), expected)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (polygon([[1, 1], [2, 2]]), r"object 1 \('a'\) has 2 corners"),
        (polygon(SQUARE, [[[1, 1]]]), r"a hole of object 1 \('a'\) has 1 corners"),
        ({**polygon(SQUARE), "classTitle": "b"}, r"object 1 \('b'\) has a class that is not in meta\.json"),
        ({"geometryType": "cuboid"}, "is of the type 'cuboid', which is not read"),
        ({"geometryType": "bitmap"}, "has no bitmap with data and origin"),
        ({"geometryType": "bitmap", "bitmap": {"data": "eA==", "origin": [0, 0]}}, "has a bitmap that is damaged"),
        ({"geometryType": "polygon", "points": None}, "has corners that are not pairs of numbers"),
    ],
)
def test_a_bad_object(entry, message):
    with pytest.raises(InputError, match=message):
        draw(**entry)


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"objects": [], "size": 3}', b'{"objects": [1], "size": {}}'])
def test_a_file_of_another_kind(content):
    with pytest.raises(InputError, match="is not an annotation of Supervisely"):
        Supervisely({}).draw(content, Sizes(SIZE, SIZE))


def test_a_data_set_that_is_no_split(tmp_path):
    root = annotation_sets.supervisely(tmp_path)
    (root / "train").rename(root / "monday")
    (root / "valid").rename(root / "tuesday")
    source, labels = annotation_sets.read(root)
    assert list(source.splits) == ["train"]
    annotation_sets.assert_as_drawn(labels)


@pytest.mark.parametrize("meta", ["{}", '{"classes": [{"color": "#fff"}]}', '{"classes": 3}', "[]"])
def test_meta_without_classes(tmp_path, meta):
    root = annotation_sets.supervisely(tmp_path)
    (root / "meta.json").write_text(meta)
    with pytest.raises(InputError, match=r"meta\.json must list the classes, each with a title"):
        annotation_sets.read(root)
