"""Bitmaps of single regions, as text in JSON files."""

from __future__ import annotations

import base64
import zlib

import numpy as np

from ...errors import InputError, first_line
from ..pictures import decode_picture


def decode_base64_png(text: object, what: str, compressed: bool = False) -> np.ndarray:
    """Return the pixels that a PNG in base64 shows, bool `(H, W)`: those that are opaque and not black.

    Args:
        text: the PNG.
        what: the name of the region, for messages.
        compressed: whether the PNG was compressed by zlib once more.

    Raises:
        InputError: the text is no picture.
    """
    try:
        content = base64.b64decode(text, validate=True)
        content = zlib.decompress(content) if compressed else content
    except (TypeError, ValueError, zlib.error) as error:
        raise InputError(f"{what} has a bitmap that is damaged: {first_line(error)}. Export it again.") from error
    picture = decode_picture(content, f"the bitmap of {what}")
    levels = np.asarray(picture.convert("LA" if picture.has_transparency_data else "L"))
    return levels > 0 if levels.ndim == 2 else levels[..., 1] > 0


def decode_brush(codes: object, size: tuple[int, int], what: str) -> np.ndarray:
    """Decode a brush mask of Label Studio, bool `(H, W)`.

    The code is that of `@thi.ng/rle-pack`: a header with the number of values (32 bits), the bits of a value (5) and
    four bit widths of run lengths (4 each); then for each run a bit for "repeated", two bits for the width of its
    length, the length less one, and the value, or so many values. The values are those of RGBA pixels, of which the
    opacity counts.

    Args:
        codes: the bytes, as a list of integers.
        size: width and height of the image.
        what: the name of the region, for messages.

    Raises:
        InputError: the code is damaged or is of another size.
    """
    width, height = size
    try:
        bits = _Bits(bytes(codes))
        number, value_bits, *length_bits = bits.read(32), bits.read(5) + 1, *(bits.read(4) + 1 for _ in range(4))
        if number != 4 * width * height:
            raise ValueError(f"it has {number} values instead of {4 * width * height}")
        values = np.zeros(number, dtype=np.uint8)
        start = 0
        while start < number:
            is_repeated = bits.read(1)
            end = start + 1 + bits.read(length_bits[bits.read(2)])
            if end > number:
                raise ValueError("it is too long")
            values[start:end] = (
                bits.read(value_bits) if is_repeated else [bits.read(value_bits) for _ in values[start:end]]
            )
            start = end
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{what} has a brush mask that is damaged: {first_line(error)}. Export it again.") from error
    return values.reshape(height, width, 4)[..., 3] > 0


class _Bits:
    """Reads a number of bits at a time."""

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    def read(self, count: int) -> int:
        start, self._at = self._at, self._at + count
        if self._at > 8 * len(self._content):
            raise ValueError("it ends too early")
        first, last = start // 8, (self._at + 7) // 8
        return int.from_bytes(self._content[first:last]) >> (8 * last - self._at) & ((1 << count) - 1)
