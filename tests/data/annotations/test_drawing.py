"""Regions on a mask."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pals_hf.data.annotations.drawing import Canvas, Sizes, to_pixels
from pals_hf.errors import InputError

SIZE = (20, 10)


@pytest.fixture
def canvas():
    return Canvas(Sizes(SIZE, SIZE))


def pixels(canvas):
    return np.asarray(canvas.mask)


def test_later_regions_cover_earlier_ones(canvas):
    canvas.polygon([[0, 0], [9, 0], [9, 9], [0, 9]], 1, "a")
    canvas.rectangle([[12, 8], [5, 2]], 2, "b")
    canvas.disk((1, 1), 0.5, 3)
    assert pixels(canvas)[5].tolist() == [1] * 5 + [2] * 8 + [0] * 7
    assert pixels(canvas)[1, 1] == 3


def test_a_polygon_that_crosses_itself_is_filled_by_the_even_odd_rule(canvas):
    star = [[10 + 9 * math.sin(k * 0.8 * math.pi), 5 - 5 * math.cos(k * 0.8 * math.pi)] for k in range(5)]
    canvas.polygon(star, 1, "star")
    expected = Image.new("L", SIZE)
    ImageDraw.Draw(expected).polygon([tuple(point) for point in star], fill=1, outline=1)
    assert np.array_equal(pixels(canvas), np.asarray(expected))
    assert pixels(canvas)[5, 10] == 0  # the middle is crossed twice


def test_holes_are_not_filled(canvas):
    canvas.polygon([[0, 0], [19, 0], [19, 9], [0, 9]], 1, "a", holes=[[[5, 3], [10, 3], [10, 6], [5, 6]]])
    assert pixels(canvas).sum() == 200 - 6 * 4


def test_a_region_over_the_edge_is_cut_off(canvas):
    canvas.polygon([[-9, -5], [5, -5], [5, 5], [-9, 5]], 1, "a")
    assert pixels(canvas).sum() == 36


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([[0, 0], [1, 1]], "a has 2 corners, but needs at least 3"),
        ([[0, 0], [1, 1], [math.nan, 2]], "a has corners that are not pairs of numbers"),
        ([[0, 0], [1, 1], [math.inf, 2]], "a has corners that are not pairs of numbers"),
        ([[0, 0], [1, 1], [True, 2]], "a has corners that are not pairs of numbers"),
        ([[0, 0], [1, 1], [1, 2, 3]], "a has corners that are not pairs of numbers"),
        (None, "a has corners that are not pairs of numbers"),
        ([[25, 0], [30, 1], [27, 3]], "a reaches from 25 to 30, but the image has a width of 20 pixels"),
        ([[0, -9], [3, -1], [1, -4]], "a reaches from -9 to -1, but the image has a height of 10 pixels"),
        ([[0, 0], [3, 1], [1, 1e6]], r"a reaches from 0 to 1e\+06, but the image has a height of 10 pixels"),
        ([[0, 0], [3, 1], [1, 10**400]], "a has corners that are not pairs of numbers"),
    ],
)
def test_regions_that_cannot_be_meant(canvas, points, message):
    with pytest.raises(InputError, match=message):
        canvas.polygon(points, 1, "a")


def test_a_bitmap_must_be_inside(canvas):
    canvas.stamp(np.eye(3, dtype=bool), 17, 7, 4, "a")
    assert np.argwhere(pixels(canvas) == 4).tolist() == [[7, 17], [8, 18], [9, 19]]
    with pytest.raises(InputError, match="a has a bitmap of 3x3 pixels at column 18, row 7, which reaches out"):
        canvas.stamp(np.eye(3, dtype=bool), 18, 7, 4, "a")


def test_the_size_must_be_that_of_the_image():
    """As it is shown, or as it is stored."""
    sizes = Sizes((10, 20), (20, 10))
    assert Canvas(sizes).size == (10, 20)
    assert Canvas(sizes, (20, 10)).size == (20, 10)
    with pytest.raises(InputError, match="on an image of 40x20 pixels, but the image has 10x20"):
        Canvas(sizes, (40, 20))
    with pytest.raises(InputError, match="on an image of Nonex20 pixels"):
        Canvas(sizes, (None, 20))


def test_shares_of_few_digits():
    assert to_pixels(round(7 / 48, 6), 48) == 7
