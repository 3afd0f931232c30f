"""Raw values and colours to class indices, for any mapping."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pals_hf.data import Classes

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
