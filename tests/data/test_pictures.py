"""Every band at its own depth, from files of several programs, or one line."""

import io
import re
import sys

import numpy as np
import pytest
from deep_pictures import png, tiff
from PIL import Image

from pals_hf.data.pictures import decode_any, decode_bands, decode_picture, to_rgb, to_tensor
from pals_hf.errors import InputError

DTYPES = ("uint8", "uint16", "float32", "float64")


def some(dtype, bands, size=(5, 7)):
    return (np.random.default_rng(bands).random((*size, bands)) * 250).astype(dtype)


@pytest.fixture(autouse=True)
def _packages():
    pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("options", [{}, {"compression": "lzw"}, {"byteorder": ">"}], ids=str)
def test_samples_of_a_tiff(dtype, bands, options):
    values = some(dtype, bands)
    found = decode_bands(tiff(values, **options), "x.tif", bands)
    assert (found.dtype, found.dtype.isnative) == (dtype, True)
    assert np.array_equal(found, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bands", [2, 3, 4, 7])
def test_planes_and_pages_of_a_tiff(dtype, bands):
    values = some(dtype, bands)
    planes = np.moveaxis(values, 2, 0)
    kind = "rgb" if bands == 3 else "minisblack"
    found = decode_bands(tiff(planes, planarconfig="separate", photometric=kind), "x.tif", bands)
    assert (found.dtype, found.tolist()) == (dtype, values.tolist())
    pages = tiff(planes, planarconfig=None, photometric="minisblack")
    if bands != 3:
        assert decode_bands(pages, "x.tif", bands).tolist() == values.tolist()
    for channels in (3, bands + 2):
        with pytest.raises(InputError, match=rf"x\.tif has {bands} pages or frames, but must have one"):
            decode_bands(pages, "x.tif", channels)


def test_integers_with_a_sign():
    values = some("int16", 1) - 100
    assert np.array_equal(decode_bands(tiff(values), "x.tif", 3), values)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_a_png_of_16_bits(bands):
    """Its second or fourth band is transparency, which a network for RGB does not see."""
    values = some("uint16", bands) * 200
    seen = bands - (bands in (2, 4))
    assert np.array_equal(decode_any(png(values), "x.png", 3), values[..., :seen])
    found = decode_any(png(values), "x.png", 5)
    assert found.dtype == np.uint16
    assert np.array_equal(found, values)


def test_transparency_and_a_fourth_band_of_a_tiff():
    values = some("uint16", 4)
    marked = tiff(values, photometric="rgb", extrasamples=["unassalpha"])
    assert decode_any(marked, "x.tif", 3).shape == (5, 7, 3)
    assert decode_any(marked, "x.tif", 4).shape == (5, 7, 4)
    infrared = tiff(values, photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(decode_any(infrared, "x.tif", 3), values)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
def test_usual_pictures(mode):
    """For 3 channels they are PIL images as before, and for others the bands of the file."""
    file = io.BytesIO()
    picture = Image.fromarray(some("uint8", 3)).convert(mode)
    picture.save(file, "tiff" if mode == "CMYK" else "png")
    image, before = decode_any(file.getvalue(), "x", 3), decode_picture(file.getvalue(), "x")
    assert (image.mode, image.tobytes()) == (before.mode, before.tobytes())
    expected = picture.convert({"1": "L", "P": "RGB"}.get(mode, mode))
    assert np.array_equal(decode_any(file.getvalue(), "x", 5), np.atleast_3d(np.asarray(expected)))


def with_value(value):
    values = some("float32", 2)
    values[3, 2, 1] = value
    return tiff(values)


def rotated(**options):
    return tiff(some("uint16", 1), extratags=[(274, "H", 1, 6, True)], **options)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            lambda: with_value(np.nan),
            "x: the pixel in row 3, column 2 is nan in band 2. Replace such values by numbers.",
        ),
        (
            lambda: with_value(np.inf),
            "x: the pixel in row 3, column 2 is inf in band 2. Replace such values by numbers.",
        ),
        (rotated, "x is stored rotated (orientation 6). Save it upright."),
        (
            lambda: tiff(some("uint16", 1), photometric="miniswhite"),
            "x stores white as zero. Save it with black as zero.",
        ),
        (lambda: tiff(some("complex64", 1)), "x has values of type complex64. Save it with integers or floating"),
        (lambda: tiff(some("uint16", 2))[:60], "x is not a readable image: "),
        (lambda: b"II*\0", "x is not a readable image: "),
        (lambda: png(some("uint16", 3))[:80], "x is not a readable image: "),
        (lambda: b"", "x is not a readable image: the file is empty"),
        (lambda: b"no image", "x is not a readable image: its format is not known"),
        (lambda: tiff(some("uint8", 300, (2, 3))), "x is not a readable image: it has 300 bands, but at most 256 are"),
    ],
)
def test_what_cannot_be_read(content, problem):
    with pytest.raises(InputError, match=f"^{re.escape(problem)}") as error:
        decode_bands(content(), "x", 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [tiff, png], ids=["tiff", "png"])
@pytest.mark.parametrize("bands", [1, 3])
def test_large_pictures_are_refused_before_they_are_decoded(content, bands, monkeypatch):
    content = content(some("uint16", bands))
    assert decode_bands(content, "x", 3, max_pixels=35).shape == (5, 7, bands)
    with pytest.raises(
        InputError, match=r"x is not a readable image: it has 7x5 pixels, but at most 3\.4e-05 megapixels"
    ):
        decode_bands(content, "x", 3, max_pixels=34)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 17)
    with pytest.raises(InputError, match="x is not a readable image: "):
        decode_bands(content, "x", 3)


def test_large_stacks_are_refused_too():
    with pytest.raises(
        InputError, match=r"x is not a readable image: it has 7x5 pixels in 6 bands, but at most 6\.9e-05 "
    ):
        decode_bands(tiff(some("uint16", 6)), "x", 6, max_pixels=69)
    assert decode_bands(tiff(some("uint16", 6)), "x", 6, max_pixels=70).shape == (5, 7, 6)


@pytest.mark.parametrize("content", [tiff(some("float32", 5)), png(some("uint16", 3))], ids=["tiff", "png"])
def test_damage_of_any_kind_ends_in_one_line(content):
    generator, problems = np.random.default_rng(0), []
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[generator.integers(4, len(damaged))] = generator.integers(256)
        cut = bytes(damaged[: generator.integers(len(damaged) // 2, len(damaged) + 1)])
        try:
            assert decode_bands(cut, "x", 5).ndim == 3
        except InputError as error:
            problems.append(str(error))
    assert len(problems) > 20
    assert not any("\n" in problem for problem in problems)


@pytest.mark.parametrize(("content", "package"), [(tiff, "tifffile"), (png, "imagecodecs")])
def test_a_missing_package_is_named(content, package, monkeypatch):
    content, grey = content(some("uint16", 3)), content(some("uint16", 1))
    monkeypatch.setitem(sys.modules, package, None)
    assert decode_any(grey, "x", 3).shape == (5, 7, 1)  # PIL is enough
    with pytest.raises(InputError, match=rf"x: .* need {package}\. Install it with: pip install 'pals_hf\[deep\]'"):
        decode_any(content, "x", 3)


def test_what_people_and_networks_see():
    values = some("uint8", 5)
    assert np.array_equal(np.asarray(to_rgb(values)), values[..., :3])
    assert np.array_equal(np.asarray(to_rgb(values[..., 3:])), values[..., [3, 3, 3]])
    assert np.array_equal(to_tensor(values), np.moveaxis(values, 2, 0))
    with pytest.raises(InputError, match=r"a deep picture \(uint16\) must be scaled to 8 bits first"):
        to_tensor(some("uint16", 5))
