"""Raw values and colours to class indices, for any mapping."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pals_hf.data import Classes
from pals_hf.data.classes import Palettes
from pals_hf.errors import InputError

raw_values = st.lists(st.integers(0, 254), min_size=3, max_size=12, unique=True)


@given(raw_values, st.data())
def test_values_are_numbered_in_their_order(values, data):
    *classes, void = values
    chosen = data.draw(st.lists(st.sampled_from([*values, 255]), min_size=1, max_size=20))
    mask = Image.fromarray(np.array([chosen], dtype=np.uint8))
    encoded = Classes.from_names({value: f"class {value}" for value in classes}, [void]).encode(mask)[0]
    expected = [sorted(classes).index(value) if value in classes else 255 for value in chosen]
    assert encoded.dtype == np.uint8
    assert encoded.tolist() == expected


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=3, max_size=12, unique=True), st.data())
def test_colours(tmp_path_factory, colors, data):
    path = tmp_path_factory.mktemp("palette") / "palette.txt"
    *named, void = colors
    lines = [f"{r} {g} {b} class {index}" for index, (r, g, b) in enumerate(named)]
    path.write_text("\n".join([*lines, "{} {} {} void".format(*void)]))
    chosen = data.draw(st.lists(st.sampled_from(colors), min_size=1, max_size=20))
    mask = Image.fromarray(np.array([chosen], dtype=np.uint8))
    encoded = Classes.from_palette(path).encode(mask)[0]
    assert encoded.tolist() == [named.index(color) if color in named else 255 for color in chosen]


def test_a_class_cannot_be_255(tmp_path):
    names = {0: "background", 128: "road", 255: "car"}
    with pytest.raises(
        InputError, match=r"id2label: 'car' has the value 255, which always means no label.*palette file"
    ):
        Classes.from_names(names)
    # What the message says to do.
    path = tmp_path / "palette.json"
    path.write_text(json.dumps({name: [value] * 3 for value, name in names.items()}))
    assert Classes.from_palette(path).encode(Image.fromarray(np.uint8([[0, 128, 255]]))).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    "classes", [lambda void: Classes.from_names({0: "a", 1: "b"}, void), lambda void: Classes.known("camvid", void)]
)
def test_void_labels_may_be_any_iterable(classes):
    mask = Image.fromarray(np.uint8([[0, 77, 78]]))
    assert classes(value for value in (77, 78)).encode(mask).tolist() == [[0, 255, 255]]


def test_a_named_void_value_is_no_class():
    classes = Classes.from_names({0: "void", 1: "sky", 2: "road"}, void_labels=[0])
    assert classes.id2label == {0: "sky", 1: "road"}
    assert classes.codes == {1: 0, 2: 1, 0: 255, 255: 255}
    known = Classes.known("camvid", [0])
    assert len(known.names) == len(known.colors) == 10
    assert (known.names[0], known.codes[0], known.codes[1]) == ("building", 255, 0)


@pytest.mark.parametrize(
    "content",
    [
        '{"01": "cat", "2": "dog"}',
        '["", "cat", "dog"]',
        '[null, "cat", "dog"]',
        '{"0": null, "1": "cat"}',
        '{"0": 5, "1": 6}',
        '{"0": {"name": "cat"}, "1": {"name": "dog"}}',
        '{"0": "cat", "0": "dog", "1": "bird"}',
        '{"1": "cat", "01": "dog"}',
        '{"0": "cat", "1": "cat "}',
        '{"0": "caf\\u00e9", "1": "cafe\\u0301"}',
        '{"cat": 0, "dog": 1}',
        '{"1_0": "cat", "2": "dog"}',
        '{"1.0": "cat", "2": "dog"}',
        '{"true": "cat", "2": "dog"}',
        '[["cat"], ["dog"]]',
        '[{"id": 0, "title": "cat"}, {"id": 1, "title": "dog"}]',
        '{"categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]}',
    ],
)
def test_class_names_that_are_no_names_or_not_unique(tmp_path, content):
    path = tmp_path / "id2label.json"
    path.write_text(content)
    if content.startswith('{"01"'):  # leading zeros alone are no fault
        assert Classes.from_names(path).codes == {1: 0, 2: 1, 255: 255}
        return
    with pytest.raises(InputError, match=r"id2label\.json"):
        Classes.from_names(path)


def test_class_names_as_records(tmp_path):
    """As COCO lists its categories: `id` is the value in the masks, whatever the order of the records."""
    path = tmp_path / "id2label.json"
    path.write_text('[{"id": 7, "name": "dog", "color": [0, 255, 0]}, {"id": 1, "name": "cat", "supercategory": "x"}]')
    classes = Classes.from_names(path)
    assert (classes.names, classes.codes) == (("cat", "dog"), {1: 0, 7: 1, 255: 255})


def test_a_byte_order_mark(tmp_path):
    names, palette = tmp_path / "id2label.json", tmp_path / "palette.txt"
    names.write_text('{"0": "a", "1": "b"}', encoding="utf-8-sig")
    palette.write_text("0 0 0 a\n255 0 0 b\n", encoding="utf-8-sig")
    assert Classes.from_names(names).names == Classes.from_palette(palette).names == ("a", "b")


def test_a_palette_of_cvat(tmp_path):
    path = tmp_path / "labelmap.txt"
    path.write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\ncrack in a wall:250,50,83::\n")
    classes = Classes.from_palette(path)
    assert classes.names == ("background", "crack in a wall")
    assert classes.encode(Image.fromarray(np.uint8([[[250, 50, 83], [0, 0, 0]]]))).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("palette.txt", "0 0 0 a\n255 0 0 b\n0 255 0 b\n", "'b' twice"),
        ("palette.json", '{"a": [0, 0, 0], "b": [255, 0, 0], "b": [0, 255, 0]}', "two entries 'b'"),
        ("palette.json", '{"a": [0, 0, 0], "b ": [255, 0, 0], "b": [0, 255, 0]}', "'b' twice"),
        ("palette.txt", "0 0 0 a\n256 0 0 b\n", "not a colour"),
    ],
)
def test_a_palette_that_names_a_class_twice(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        Classes.from_palette(tmp_path / name)


def test_several_colours_may_mean_no_label(tmp_path):
    path = tmp_path / "palette.txt"
    path.write_text("0 0 0 void\n255 255 255 void\n1 1 1 a\n2 2 2 b\n")
    mask = Image.fromarray(np.repeat(np.uint8([[0, 255, 1, 2]])[..., None], 3, axis=2))
    assert Classes.from_palette(path).encode(mask).tolist() == [[255, 255, 0, 1]]


class TestTransparency:
    """What an eraser leaves behind is no class, unless the palette file says so."""

    def mask(self, alpha):
        pixels = np.zeros((2, 2, 4), dtype=np.uint8)
        pixels[..., 3] = 255
        pixels[0, 1] = (255, 0, 0, alpha)
        return Image.fromarray(pixels)

    def classes(self, tmp_path, **more):
        path = tmp_path / "palette.json"
        path.write_text(json.dumps({"a": [0, 0, 0], "b": [255, 0, 0], **more}))
        return Classes.from_palette(path)

    def test_is_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"row 0, column 1 is transparent.*\"void\": \"transparent\""):
            self.classes(tmp_path).encode(self.mask(0))
        with pytest.raises(InputError, match=r"row 0, column 1 is half transparent"):
            self.classes(tmp_path).encode(self.mask(100))

    @pytest.mark.parametrize(("name", "label"), [("void", 255), ("c", 2)])
    def test_can_be_named(self, tmp_path, name, label):
        classes = self.classes(tmp_path, **{name: "transparent"})
        assert classes.encode(self.mask(0)).tolist() == [[0, label], [0, 0]]
        assert classes.encode(self.mask(255)).tolist() == [[0, 1], [0, 0]]

    def test_of_a_palette_mask_whose_values_count_is_only_for_the_eye(self):
        mask = Image.fromarray(np.uint8([[0, 1]]))
        mask.putpalette([0, 0, 0, 255, 0, 0])
        mask.info["transparency"] = 0
        assert Classes.from_names({0: "a", 1: "b"}).encode(mask).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("greys", "format", "expected"),
    [
        ([0, 255], "PNG", [0, 1]),  # black and white for the eye
        ([0, 1, 3], "GIF", [0, 1, 3]),  # a GIF has nothing but palettes
        ([0, 1, 7], "PNG", [0, 1, 2]),  # 7 is no class
        ([0, 1, 3], "PNG", "stores the value 2 where it shows the grey 3"),
    ],
)
def test_a_palette_of_greys(greys, format, expected):
    mask = Image.fromarray(np.uint8([range(len(greys))]))
    mask.putpalette([channel for grey in greys for channel in (grey,) * 3])
    mask.format = format
    classes = Classes.from_names(dict(enumerate("abcd")))
    if isinstance(expected, list):
        assert classes.encode(mask).tolist() == [expected]
        return
    with pytest.raises(InputError, match=expected):
        classes.encode(mask)


def test_palettes_of_a_set_must_agree():
    """A program that numbers the colours of each file in the order of their appearance."""
    classes, palettes = Classes.from_names(dict(enumerate("abc"))), Palettes()

    def add(name, colors):
        mask = Image.fromarray(np.uint8([[0, 1, 2]]))
        mask.putpalette([channel for color in colors for channel in color])
        palettes.add(name, classes.colors_of(mask))

    black, red, green, blue = (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)
    add("one.png", [black, red, green, blue])
    add("two.png", [black, red, green, red])  # only colours that occur count
    add("grey.png", [(value,) * 3 for value in range(256)])
    with pytest.raises(InputError, match=r"three\.png shows the value 1 in the colour \(0, 255, 0\), but one\.png in"):
        add("three.png", [black, green, red])


class TestRanges:
    """Masks that number the objects of a class."""

    def test_every_value_of_a_range(self):
        classes = Classes.from_names({"0": "ground", "1-65535": "cell"})
        mask = Image.fromarray(np.uint16([[0, 1, 255, 300, 65535]]))
        assert classes.encode(mask).tolist() == [[0, 1, 1, 1, 1]]

    def test_void_values_in_a_range(self):
        classes = Classes.from_names({"0": "ground", "1-9": "cell"}, void_labels=[3, 255])
        assert classes.encode(Image.fromarray(np.uint8([[0, 2, 3, 255]]))).tolist() == [[0, 1, 255, 255]]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ({"0": "a", "1-5": "b", "5": "c"}, "names the value 5 twice: 'b' and 'c'"),
            ({"0": "a", "5-1": "b"}, "names '5-1'"),
            ({"0": "a", "1-70000": "b"}, "70000 is not a possible mask value"),
            ({"0": "a", "1-": "b"}, "names '1-'"),
            ({"0": "a", "1-5": "b", "7-9": "b"}, "names 'b' twice"),
        ],
    )
    def test_ranges_that_cannot_be(self, names, message):
        with pytest.raises(InputError, match=message):
            Classes.from_names(names)


def test_two_classes_of_0_and_255():
    """255 is named, so it is a class. Beside another class it may be void, see `test_a_class_cannot_be_255`."""
    classes = Classes.from_names({"0": "ground", "255": "crack"})
    assert classes.encode(Image.fromarray(np.uint8([[0, 255]]))).tolist() == [[0, 1]]
    with pytest.raises(InputError, match="2 to 255 classes, but it names 1"):
        Classes.from_names({"0": "ground", "255": "crack"}, void_labels=[255])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("_classes.csv", "Pixel Value, Class\n0, background\n4, car\n", {0: "background", 4: "car"}),
        ("class_names.txt", "_background_\ncar\n\n", {0: "_background_", 1: "car"}),
        ("class_names.txt", "__ignore__\n_background_\ncar\n", {0: "_background_", 1: "car"}),
        ("_classes.csv", "Pixel Value, Class\n0, a\n0, b\n", "names the value 0 twice"),
        ("_classes.csv", "Pixel Value, Class\n0, a, c\n1, b\n", "row 2: expected 2 columns"),
        ("_classes.csv", "Pixel Value, Class\nx, a\n1, b\n", "names 'x'"),
        ("_classes.csv", "", "2 to 255 classes, but it names 0"),
        ("class_names.txt", "car\ncar\n", "names 'car' twice"),
    ],
)
def test_names_in_the_files_of_exports(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8-sig")
    if isinstance(expected, dict):
        assert Classes.from_names(path).codes == Classes.from_names(expected).codes
        assert Classes.from_names(path).names == tuple(expected.values())
        return
    with pytest.raises(InputError, match=f"{name}.*{expected}"):
        Classes.from_names(path)


def test_a_palette_of_kaggle(tmp_path):
    path = tmp_path / "class_dict.csv"
    path.write_text("name, r, g, b\nsky, 1, 2, 3\nroad, 4, 5, 6\nVoid, 0, 0, 0\n")
    classes = Classes.from_palette(path)
    assert (classes.names, classes.colors) == (("sky", "road"), ((1, 2, 3), (4, 5, 6)))
    assert classes.encode(Image.fromarray(np.uint8([[[4, 5, 6], [0, 0, 0]]]))).tolist() == [[1, 255]]
    for row, message in (("sky,1,2", "row 2: expected 4 columns"), ("sky,1,2,x", "expected a name and red")):
        path.write_text(f"name,r,g,b\n{row}\n")
        with pytest.raises(InputError, match=rf"class_dict\.csv.*{message}"):
            Classes.from_palette(path)


class TestAnnotations:
    def of(self, *labels, unlabelled="background"):
        return Classes.from_annotations(labels, unlabelled, "a.json", None)

    def test_background_is_a_further_class(self):
        classes = self.of("car", "road")
        assert (classes.names, classes.codes) == (("background", "car", "road"), {0: 0, 1: 1, 2: 2})

    def test_background_is_named(self):
        classes = self.of("car", "Background")
        assert (classes.names, classes.codes) == (("car", "Background"), {0: 1, 1: 0, 2: 1})

    def test_void(self):
        classes = self.of("car", "ignore", "road", unlabelled="void")
        assert (classes.names, classes.codes) == (("car", "road"), {0: 255, 1: 0, 2: 255, 3: 1})

    def test_many_classes(self):
        """The last of 255 labels is drawn as 255, which is a class here."""
        labels = [f"class {number}" for number in range(255)]
        classes = self.of(*labels, unlabelled="void")
        assert (classes.codes[0], classes.codes[255]) == (255, 254)
        with pytest.raises(InputError, match=r"a\.json must name 2 to 255 classes, but it names 256"):
            self.of(*labels)

    @pytest.mark.parametrize(("labels", "message"), [((), "it names 1"), (("a", "a "), "'a' twice"), (("",), "text")])
    def test_labels_that_cannot_be(self, labels, message):
        with pytest.raises(InputError, match=message):
            self.of(*labels)
