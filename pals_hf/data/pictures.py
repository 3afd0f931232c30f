"""Decode image files, and refuse what PIL would drop in silence: further pages, and more than 8 bits per channel."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from PIL import ExifTags, ImageOps, TiffTags
from PIL import Image as PILImage

from ..errors import InputError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_QUARTER_TURNS = {5, 6, 7, 8}  # orientations that swap width and height
_TAGS = {info.name: number for number, info in TiffTags.TAGS_V2.items()}
_REDUCED = 1  # bit of a TIFF's NewSubfileType: a smaller copy of another page


def decode_picture(content: bytes, name: str) -> Picture:
    """Return the picture in an image file as it is stored (not rotated), with the [`bits_of`] it in `info["bits"]`.

    Args:
        content: the file.
        name: the name of the file, for messages.

    Raises:
        InputError: the file cannot be decoded, or has several pages or frames.
    """
    try:
        if not content:
            raise ValueError("the file is empty")
        picture = PILImage.open(io.BytesIO(content))
        pages = count_pages(picture)
        bits = bits_of(picture)
        picture.load()
    except PILImage.UnidentifiedImageError as error:
        raise InputError(f"{name} is not a readable image: its format is not known") from error
    except Exception as error:  # decoders raise many types of errors for damaged files
        raise InputError(f"{name} is not a readable image: {first_line(error)}") from error
    if pages > 1:
        raise InputError(f"{name} has {pages} pages or frames, but must have one. Save each of them as a file.")
    picture.info["bits"] = bits
    return picture


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


def refuse_deep(picture: Picture, bits: int) -> None:
    """Refuse a picture with more than 8 bits per channel, which PIL clips or cuts to 8 bits.

    Raises:
        InputError: the picture has 16 bits per colour, or a mode like `I`, `I;16` or `F`.
    """
    if bits > 8 or picture.mode.startswith(("I", "F")):
        raise InputError(
            f"images with more than 8 bits per channel ({max(bits, 16)} bits, mode {picture.mode}) are not supported. "
            "Convert the image to 8 bits."
        )


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
