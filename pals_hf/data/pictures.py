"""Decode image files without dropping what PIL drops in silence: further pages, bits beyond 8, and further bands.

A picture of at most 8 bits is a PIL image. A *deep* picture - more bits, floating point numbers, or another number of
bands than a network for RGB takes - is an array `(H, W, bands)` of the values in the file.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, ImageOps, TiffTags
from PIL import Image as PILImage
from torch import Tensor

from ..errors import InputError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_QUARTER_TURNS = {5, 6, 7, 8}  # orientations that swap width and height
_TAGS = {info.name: number for number, info in TiffTags.TAGS_V2.items()}
_REDUCED = 1  # bit of a TIFF's NewSubfileType: a smaller copy of another page
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_AS_STORED = ("L", "LA", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I;16L", "I", "F")  # modes whose bands are the file's

RGB = 3  # channels of a usual network
MAX_CHANNELS = 256


class Depth(NamedTuple):
    """What the values of a deep picture are."""

    dtype: str
    """The name of numpy's type, like `uint16`."""
    bands: int
    """The number of values of a pixel."""

    @classmethod
    def of(cls, values: np.ndarray) -> Depth:
        """Return the depth of a picture `(H, W, bands)`."""
        return cls(values.dtype.name, values.shape[2])

    def __str__(self) -> str:
        return f"{self.dtype} values in {self.bands} band{'s' if self.bands > 1 else ''}"


def decode_picture(content: bytes, name: str) -> Picture:
    """Return the picture in an image file as it is stored (not rotated), with the [`bits_of`] it in `info["bits"]`.

    Args:
        content: the file.
        name: the name of the file, for messages.

    Raises:
        InputError: the file cannot be decoded, or has several pages or frames.
    """
    with _reading(content, name):
        picture = PILImage.open(io.BytesIO(content))
        pages = count_pages(picture)
        bits = bits_of(picture)
        picture.load()
    _refuse_pages(pages, name)
    picture.info["bits"] = bits
    return picture


@contextmanager
def _reading(content: bytes, name: str) -> Iterator[None]:
    """Turn what decoders raise into one line that names the file."""
    try:
        if not content:
            raise ValueError("the file is empty")
        yield
    except InputError:
        raise
    except PILImage.UnidentifiedImageError as error:
        raise InputError(f"{name} is not a readable image: its format is not known") from error
    except Exception as error:  # decoders raise many types of errors for damaged files
        raise InputError(f"{name} is not a readable image: {first_line(error)}") from error


def _refuse_pages(pages: int, name: str) -> None:
    if pages > 1:
        raise InputError(f"{name} has {pages} pages or frames, but must have one. Save each of them as a file.")


def decode_any(content: bytes, name: str, channels: int = RGB, max_pixels: int | None = None) -> Picture | np.ndarray:
    """Return the picture in an image file: by [`decode_picture`], or by [`decode_bands`] if it is deep.

    Args:
        content, name: see [`decode_picture`].
        channels: the number of channels of the network. With 3, only pictures of more than 8 bits, and TIFFs that PIL
            cannot open, are deep. With another number, all are.
        max_pixels: see [`decode_bands`].

    Raises:
        InputError: the file cannot be decoded, or has several pages or frames.
    """
    if channels == RGB and not is_deep(content):
        return decode_picture(content, name)
    return decode_bands(content, name, channels, max_pixels)


def refuse_other_bands(values: np.ndarray, name: str, channels: int) -> None:
    """Refuse a deep picture `(H, W, bands)` of other bands than a network takes. One band is enough for 3 channels.

    Raises:
        InputError: the message names both numbers.
    """
    bands = values.shape[2]
    if bands != channels and (channels, bands) != (RGB, 1):
        raise InputError(
            f"{name} has {Depth.of(values)}, but the network takes {channels} channels. Save these bands only, or use "
            f"--channels {bands}."
        )


def is_deep(content: bytes) -> bool:
    """Tell whether a file holds more than 8 bits per channel, or is a TIFF with bands that PIL has no mode for."""
    try:
        picture = PILImage.open(io.BytesIO(content))
        return has_more_bits(picture, bits_of(picture))
    except PILImage.UnidentifiedImageError:
        return content.startswith(_TIFF)  # PIL has no mode for stacks of bands
    except Exception:  # the decoder names what is damaged
        return False


def decode_bands(content: bytes, name: str, channels: int, max_pixels: int | None = None) -> np.ndarray:
    """Return all bands of the picture in an image file as they are stored, without cutting them to 8 bits.

    Needs tifffile for TIFFs of several bands, and imagecodecs for colour PNGs of 16 bits (extra `deep`).

    Args:
        content, name: see [`decode_picture`].
        channels: the number of channels of the network. With 3, bands of transparency are dropped. With another
            number, the pages of a TIFF are its bands if it has so many pages of one band.
        max_pixels: refuse larger pictures before they are decoded, and less than that of more than 3 bands: those with
            more values than so large an RGB picture. Default: the limit of Pillow, 179 megapixels.

    Returns:
        `(H, W, bands)`, integers or floating point numbers in the byte order of the machine.

    Raises:
        InputError: the file cannot be decoded, a package is missing, the file has several pages or frames, is stored
            rotated or with white as zero, or a value is not finite.
    """
    with _reading(content, name):
        decode = _decode_tiff if content.startswith(_TIFF) else _decode_other
        values, num_alpha = decode(content, name, channels, max_pixels)
    if num_alpha and channels == RGB:
        values = values[..., :-num_alpha]
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype.kind not in "uif":
        raise InputError(f"{name} has values of type {values.dtype}. Save it with integers or floating point numbers.")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        row, column, band = np.argwhere(~np.isfinite(values))[0]
        raise InputError(
            f"{name}: the pixel in row {row}, column {column} is {values[row, column, band]} in band {band + 1}. "
            "Replace such values by numbers."
        )
    return values


def _decode_tiff(content: bytes, name: str, channels: int, max_pixels: int | None) -> tuple[np.ndarray, int]:
    """Return the bands `(H, W, bands)` of a TIFF, and how many of them, at the end, are transparency."""
    try:
        picture = PILImage.open(io.BytesIO(content))
    except PILImage.UnidentifiedImageError:
        picture = None
    if picture is not None:
        samples = picture.tag_v2.get(_TAGS["SamplesPerPixel"], 1)
        is_whole = samples == 1 or (bits_of(picture) <= 8 and samples == len(picture.getbands()))
        if is_whole and (count_pages(picture) == 1 or channels == RGB):
            return _bands_of(picture, name, max_pixels)
    try:
        from tifffile import TiffFile
    except ImportError as error:
        raise InputError(
            f"{name}: TIFFs of this kind need tifffile. Install it with: pip install 'pals_hf[deep]'"
        ) from error
    with TiffFile(io.BytesIO(content)) as file:
        pages = [page for page in file.pages if not page.is_reduced]
        page = pages[0]
        is_stack = channels == len(pages) != RGB and {(page.shape, page.dtype, 1)} == {
            (each.shape, each.dtype, each.samplesperpixel) for each in pages
        }
        if not is_stack:
            _refuse_pages(len(pages), name)
        _refuse_large(page.imagewidth, page.imagelength, len(pages) if is_stack else page.samplesperpixel, max_pixels)
        orientation = page.tags.get("Orientation")
        _refuse_stored_otherwise(1 if orientation is None else orientation.value, page.photometric == 0, name)
        if is_stack:
            return np.stack([each.asarray() for each in pages], axis=2), 0
        values = page.asarray()
        values = np.moveaxis(values, 0, 2) if page.axes == "SYX" else values.reshape(*values.shape[:2], -1)
        return values, sum(kind != 0 for kind in page.extrasamples)  # 0: not said what it is


def _decode_other(content: bytes, name: str, _: int, max_pixels: int | None) -> tuple[np.ndarray, int]:
    """Return the bands `(H, W, bands)` of a picture in another format, and the number of those of transparency."""
    picture = PILImage.open(io.BytesIO(content))
    bits = bits_of(picture)
    if bits <= 8 or picture.mode.startswith("I"):
        values, num_alpha = _bands_of(picture, name, max_pixels)
        return values.astype(np.uint16) if bits == 16 else values, num_alpha  # old versions of PIL make int32 of PNGs
    # The only other deep pictures that PIL opens, cut to 8 bits, are colour PNGs.
    try:
        from imagecodecs import png_decode
    except ImportError as error:
        raise InputError(
            f"{name}: colour PNGs of 16 bits need imagecodecs. Install it with: pip install 'pals_hf[deep]'"
        ) from error
    _refuse_large(*picture.size, len(picture.getbands()), max_pixels)
    values = png_decode(content)
    return values, 1 - values.shape[2] % 2


def _bands_of(picture: Picture, name: str, max_pixels: int | None) -> tuple[np.ndarray, int]:
    _refuse_large(*picture.size, len(picture.getbands()), max_pixels)
    _refuse_pages(count_pages(picture), name)
    _refuse_stored_otherwise(picture.getexif().get(ExifTags.Base.Orientation, 1), is_inverted(picture), name)
    if picture.mode not in _AS_STORED:
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    return np.atleast_3d(np.asarray(picture)), int(picture.mode in ("LA", "RGBA"))


def _refuse_large(width: int, height: int, bands: int, max_pixels: int | None) -> None:
    """Refuse more values than an RGB picture of `max_pixels` has, and more bands than [`MAX_CHANNELS`]."""
    if bands > MAX_CHANNELS:
        raise ValueError(f"it has {bands} bands, but at most {MAX_CHANNELS} are read")
    most = max_pixels or 2 * (PILImage.MAX_IMAGE_PIXELS or sys.maxsize)  # PIL refuses twice its number
    if width * height * max(RGB, bands) > RGB * most:
        stack = f" in {bands} bands" if bands > RGB else ""
        raise ValueError(f"it has {width}x{height} pixels{stack}, but at most {most / 1e6:g} megapixels are allowed")


def _refuse_stored_otherwise(orientation: int, is_inverted: bool, name: str) -> None:
    if orientation != 1:
        raise InputError(f"{name} is stored rotated (orientation {orientation}). Save it upright.")
    if is_inverted:
        raise InputError(f"{name} stores white as zero. Save it with black as zero.")


def bits_of(picture: Picture) -> int:
    """Return the bits per channel of an opened file. PIL makes 8 of them where it can, and forgets it in `load`."""
    if picture.format == "TIFF":
        return max(picture.tag_v2.get(_TAGS["BitsPerSample"], (1,)))
    raw_mode = picture.tile[0].args if picture.format == "PNG" and picture.tile else ""
    found = re.search(r";(\d+)", raw_mode if isinstance(raw_mode, str) else "")
    return int(found[1]) if found else 8


def count_pages(picture: Picture) -> int:
    """Count the pages or frames of a file, without smaller copies of a page and the previews that cameras add."""
    count = getattr(picture, "n_frames", 1)
    if picture.format == "MPO":
        return 1
    if picture.format != "TIFF" or count == 1:
        return count
    pages = 0
    for index in range(count):
        picture.seek(index)
        pages += not picture.tag_v2.get(_TAGS["NewSubfileType"], 0) & _REDUCED
    picture.seek(0)
    return pages


def has_more_bits(picture: Picture, bits: int) -> bool:
    """Tell whether a picture has more than the 8 bits per channel to which PIL clips or cuts it."""
    return bits > 8 or picture.mode.startswith(("I", "F"))


def refuse_deep(picture: Picture, bits: int, where: str) -> None:
    """Refuse a picture with more than 8 bits per channel, which PIL clips or cuts to 8 bits.

    Args:
        picture: the picture.
        bits: see [`bits_of`].
        where: who reads 8 bits only, and what to do about it, for the message.

    Raises:
        InputError: the picture has 16 bits per colour, or a mode like `I`, `I;16` or `F`.
    """
    if has_more_bits(picture, bits):
        depth = f"{max(bits, 16)} bits, mode {picture.mode}"
        raise InputError(f"images with more than 8 bits per channel ({depth}) are not read {where}")


def to_tensor(image: Picture | np.ndarray) -> Tensor:
    """Return a picture of 8 bits as a tensor, uint8 `(C, H, W)`.

    Args:
        image: a PIL image, which becomes RGB, or an array `(H, W, C)`.

    Raises:
        InputError: the array has not been scaled to 8 bits.
    """
    values = image if isinstance(image, np.ndarray) else np.array(image.convert("RGB"))
    if values.dtype != np.uint8:
        raise InputError(f"a deep picture ({values.dtype}) must be scaled to 8 bits first, see scale_pictures")
    return torch.from_numpy(values).permute(2, 0, 1)


def size_of(image: Picture | np.ndarray) -> tuple[int, int]:
    """Return height and width of a picture."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def to_rgb(image: Picture | np.ndarray) -> Picture:
    """Return a picture of 8 bits as people see it: arrays `(H, W, C)` by their first three bands, or the first one."""
    if isinstance(image, np.ndarray):
        image = PILImage.fromarray(np.ascontiguousarray(image[..., :3] if image.shape[2] >= 3 else image[..., 0]))
    return image.convert("RGB")


def is_inverted(picture: Picture) -> bool:
    """Tell whether a TIFF stores white as zero, as ImageJ does with an inverting lookup table."""
    return picture.format == "TIFF" and picture.tag_v2.get(_TAGS["PhotometricInterpretation"]) == 0


def orientation_of_mask(mask: Picture, image: Picture) -> int | None:
    """Return the orientation (EXIF) by which a mask must be turned to stand like its upright image, or None.

    Cameras store images as the sensor was held, with an orientation tag. A mask with a tag of its own follows that
    tag. A mask without a tag is turned with the image if it has the size of the stored image and not of the upright
    image. If both sizes are equal, the mask is taken as upright.
    """
    orientation = mask.getexif().get(ExifTags.Base.Orientation)
    if orientation is None and mask.size == image.size and image.width != image.height:
        noted = image.getexif().get(ExifTags.Base.Orientation)
        orientation = noted if noted in _QUARTER_TURNS else None
    return orientation


def turn(picture: Picture, orientation: int) -> Picture:
    """Turn a picture by an orientation of EXIF."""
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(picture)
