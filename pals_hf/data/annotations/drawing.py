"""Draw the regions of an annotation file on a mask. Later regions cover earlier ones.

Polygons are filled as labelme fills them: by PIL, with their outline, and by the even-odd rule where they cross
themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from ...errors import InputError

Point = tuple[float, float]
_LARGEST = 1e9  # coordinate, of which no image is so large


class Sizes(NamedTuple):
    """Width and height of an image, upright and as it is stored, which differ if the image has an orientation."""

    upright: tuple[int, int]
    stored: tuple[int, int]


class Canvas:
    """A mask of the value 0 on which regions are drawn.

    Args:
        sizes: of the image.
        stated: width and height of the image in the annotation file, or None if the file does not say.

    Raises:
        InputError: the image has another size than the file says.
    """

    def __init__(self, sizes: Sizes, stated: tuple[object, object] | None = None):
        size = sizes.upright if stated is None else stated
        if size not in sizes:
            width, height = sizes.upright
            raise InputError(
                f"the regions were drawn on an image of {size[0]}x{size[1]} pixels, but the image has "
                f"{width}x{height}. Both must have the same size."
            )
        self.size: tuple[int, int] = size
        self.mask = PILImage.new("L", size)
        self._pen = ImageDraw.Draw(self.mask)

    def polygon(self, points: object, value: int, what: str, holes: Sequence[object] = ()) -> None:
        """Fill a polygon, without its holes.

        Args:
            points: its corners, `[[x, y], ...]` in pixels.
            value: of its pixels.
            what: the name of the region, for messages.
            holes: polygons that are not filled.

        Raises:
            InputError: see [`corners`].
        """
        corner_points = corners(points, self.size, what)
        if not holes:
            self._pen.polygon(corner_points, fill=value, outline=value)
            return
        shape = PILImage.new("1", self.size)
        pen = ImageDraw.Draw(shape)
        pen.polygon(corner_points, fill=1, outline=1)
        for hole in holes:
            pen.polygon(corners(hole, self.size, f"a hole of {what}"), fill=0, outline=0)
        self.mask.paste(value, mask=shape)

    def rectangle(self, points: object, value: int, what: str) -> None:
        """Fill the rectangle between two opposite corners, which belong to it."""
        (left, top), (right, bottom) = corners(points, self.size, what, number=2)
        box = (min(left, right), min(top, bottom), max(left, right), max(top, bottom))
        self._pen.rectangle(box, fill=value, outline=value)

    def disk(self, center: Point, radius: float, value: int) -> None:
        """Fill a circle."""
        (x, y), radius = center, min(radius, 2 * max(self.size))
        self._pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=value, outline=value)

    def line(self, points: list[Point], width: int, value: int) -> None:
        """Draw a line through points."""
        self._pen.line(points, fill=value, width=width)

    def stamp(self, shape: np.ndarray, left: int, top: int, value: int, what: str) -> None:
        """Fill the pixels that a bitmap `(h, w)` of bool shows, whose upper left corner has these coordinates.

        Raises:
            InputError: the bitmap reaches out of the image.
        """
        height, width = shape.shape
        if left < 0 or top < 0 or left + width > self.size[0] or top + height > self.size[1]:
            raise InputError(
                f"{what} has a bitmap of {width}x{height} pixels at column {left}, row {top}, which reaches out of "
                f"the image of {self.size[0]}x{self.size[1]} pixels. Draw the region again."
            )
        self.mask.paste(value, (left, top), PILImage.fromarray(shape))


def corners(
    points: object, size: tuple[int, int], what: str, number: int | None = None, least: int = 3
) -> list[Point]:
    """Check the corners of a region. A region may reach over the edge of the image, where it is cut off.

    Args:
        points: `[[x, y], ...]` in pixels.
        size: width and height of the image.
        what: the name of the region, for messages.
        number: how many corners it has. Default: any number from `least` on.
        least: the smallest number of corners.

    Raises:
        InputError: there are too few corners, a coordinate is no finite number, the region is outside of the image, or
            it reaches further over the edge than the image is large, which means that the coordinates have another
            unit.
    """
    if not are_points(points):
        raise InputError(f"{what} has corners that are not pairs of numbers. Draw the region again, or remove it.")
    if len(points) < least if number is None else len(points) != number:
        needed = f"at least {least}" if number is None else f"exactly {number}"
        raise InputError(f"{what} has {len(points)} corners, but needs {needed}. Draw the region again, or remove it.")
    for axis, (name, length) in enumerate(zip(("width", "height"), size, strict=True)):
        low, high = min(point[axis] for point in points), max(point[axis] for point in points)
        if high < 0 or low > length or low < -length or high > 2 * length:
            raise InputError(
                f"{what} reaches from {low:g} to {high:g}, but the image has a {name} of {length} pixels. Is the "
                "annotation of another image, or are its coordinates not in the unit of this format?"
            )
    return [(x, y) for x, y in points]


def are_points(points: object) -> bool:
    """Tell whether a value from JSON is a list of pairs of finite numbers."""
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        return False
    coordinates = [coordinate for point in points for coordinate in point]
    return set(map(type, coordinates)) <= {int, float} and all(-_LARGEST < value < _LARGEST for value in coordinates)


def to_pixels(share: float, length: int) -> float:
    """Return a coordinate that is given as a share of the image's width or height.

    Exports write shares with a few digits. Without rounding, 6.99999 pixels would be drawn as 6, as PIL cuts off.
    """
    return round(share * length, 2)
