"""labelme's JSON: the masks of its own export, and what may be wrong with a file."""

import importlib.util
import json
import sys
import types

import annotation_sets
import numpy as np
import pytest
from PIL import Image

from pals_hf.data.annotations.drawing import Sizes
from pals_hf.data.annotations.labelme import Labelme
from pals_hf.errors import InputError

SIZE = (60, 40)


@pytest.fixture(scope="module")
def labelme():
    """`labelme.utils.shape`, without the user interface that importing labelme starts."""
    found = importlib.util.find_spec("labelme")
    if found is None:
        pytest.skip("labelme is not installed")
    shape_of_labels = types.ModuleType("labelme._label_file")
    shape_of_labels.ShapeDict = dict
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "labelme", types.ModuleType("labelme"))
        patch.setitem(sys.modules, "labelme._label_file", shape_of_labels)
        place = f"{found.submodule_search_locations[0]}/utils/shape.py"
        spec = importlib.util.spec_from_file_location("labelme_shape", place)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def random_shapes(seed):
    generator = np.random.default_rng(seed)
    counts = {
        "polygon": 7,
        "rectangle": 2,
        "circle": 2,
        "line": 2,
        "linestrip": 4,
        "point": 1,
        "oriented_rectangle": 4,
    }
    for kind, count in counts.items():
        points = (generator.random((count, 2)) * SIZE).round(2).tolist()
        yield {"label": "ab"[seed % 2], "points": points, "shape_type": kind}


def draw(shapes, size=SIZE, **more):
    content = json.dumps({"shapes": shapes, "imageWidth": SIZE[0], "imageHeight": SIZE[1], **more})
    return np.asarray(Labelme({"a": 1, "b": 2}).draw(content.encode(), Sizes(size, size)))


@pytest.mark.parametrize("seed", range(5))
def test_masks_equal_those_of_labelme(labelme, seed):
    shapes = [shape for number in range(3) for shape in random_shapes(10 * seed + number)]
    expected, _ = labelme.shapes_to_label(SIZE[::-1], shapes, {"a": 1, "b": 2})
    assert np.array_equal(draw(shapes), expected)


@pytest.mark.parametrize("shape", list(random_shapes(0)), ids=lambda shape: shape["shape_type"])
def test_each_shape_is_drawn(shape):
    """Where labelme is not installed: at its first corner, or in the middle of what lies between two."""
    mask = draw([shape])
    is_between = shape["shape_type"] in ("rectangle", "line", "linestrip")
    x, y = np.mean(shape["points"][: 2 if is_between else 1], axis=0)
    assert mask[int(y), int(x)] == 1
    assert not mask.all()


def test_the_size_may_be_missing():
    shape = {"label": "b", "points": [[0, 0], [9, 0], [9, 9]]}  # old files have no shape_type either
    assert draw([shape], imageWidth=None, imageHeight=None)[1, 5] == 2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"points": [[0, 0], [1, 1]]}, r"shape 1 \('a'\) has 2 corners"),
        ({"points": [[0, 0], [1, 1]], "shape_type": "cuboid"}, "is of the type 'cuboid', which is not read"),
        ({"points": [[0, 0]], "shape_type": "circle"}, "has 1 corners, but needs exactly 2"),
        ({"points": [[0, 0]], "shape_type": "linestrip"}, "has 1 corners, but needs at least 2"),
        ({"points": [[0, 0], [3, 3]], "shape_type": "mask"}, "has a bitmap that is damaged"),
        ({"points": [[0, 0], [3, 3]], "shape_type": "mask", "mask": "AAAA"}, "bitmap of .* is not a readable image"),
        ({"label": "c", "points": [[0, 0], [1, 1], [2, 0]]}, "has a label that is not in labels.txt"),
        ({"label": None}, "is not a file of labelme"),
    ],
)
def test_a_bad_shape(shape, message):
    with pytest.raises(InputError, match=message):
        draw([{"label": "a", **shape}])


def test_a_file_that_is_no_json():
    with pytest.raises(InputError, match="not readable JSON"):
        Labelme({}).draw(b"{", Sizes(SIZE, SIZE))


class TestFolder:
    @pytest.fixture
    def root(self, tmp_path):
        return annotation_sets.labelme(tmp_path)

    def test_names_in_labels_txt(self, root):
        """They give the order, and may name a class that does not occur."""
        (root / "labels.txt").write_text("__ignore__\n_background_\nroad\ntree\ncar\n")
        source, labels = annotation_sets.read(root)
        assert source.classes.names == ("_background_", "road", "tree", "car")
        annotation_sets.assert_as_drawn(labels, {"road": 1, "car": 3})

    def test_ignored_regions_are_not_labelled(self, root):
        path = root / "train" / "street0.json"
        path.write_text(path.read_text().replace('"car"', '"__ignore__"'))
        source, labels = annotation_sets.read(root)
        assert source.classes.names == ("background", "car", "road")
        assert np.array_equal(
            labels["street0"], annotation_sets.drawn(annotation_sets.objects(0), {"car": 255, "road": 2})
        )

    def test_an_image_of_another_name(self, root):
        path = root / "train" / "street0.json"
        path.rename(path.with_name("first.json"))
        annotation_sets.assert_as_drawn(annotation_sets.read(root)[1])

    def test_a_damaged_file_is_a_bad_sample(self, root):
        path = root / "train" / "street0.json"
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(InputError, match=r"street0\.json: not readable JSON"):
            annotation_sets.read(root)

    def test_an_empty_export(self, root):
        for path in root.rglob("*.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), "shapes": []}))
        with pytest.raises(InputError, match="has no shapes in its labelme files"):
            annotation_sets.read(root)

    def test_an_image_that_the_camera_turned(self, root):
        """labelme shows images upright, and its sizes are those of the upright image."""
        path = root / "train" / "street0.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6  # shown turned by 90 degrees clockwise
        Image.open(path).rotate(90, expand=True).save(path, exif=exif, quality=95)
        annotation_sets.assert_as_drawn(annotation_sets.read(root)[1])
