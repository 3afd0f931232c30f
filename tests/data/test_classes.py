"""Raw values and colours to class indices, for any mapping."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pals_hf.data import Classes
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
