"""Supervisely: `meta.json`, and `DATASET/img/NAME.jpg` with `DATASET/ann/NAME.jpg.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...files import has_type, parse_json, read_json
from .bitmaps import decode_base64_png
from .drawing import Canvas, Sizes
from .found import Annotated
from .images import ImageIndex, to_records

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

META = "meta.json"


@dataclass(frozen=True)
class Supervisely:
    """Draws the objects of an image.

    Attributes:
        values: title of a class to the value in the mask.
    """

    values: Mapping[str, int]

    def draw(self, content: bytes, sizes: Sizes) -> Picture:
        """Draw the objects of a file in their order.

        Raises:
            InputError: the file is not Supervisely's JSON, has an unknown class or geometry, or its image has another
                size.
        """
        document = parse_json(content)
        objects = document.get("objects") if isinstance(document, dict) else None
        if not has_type(objects, list[dict]) or not has_type(document.get("size"), dict):
            raise InputError("it is not an annotation of Supervisely: it has no `objects` or no `size`.")
        canvas = Canvas(sizes, (document["size"].get("width"), document["size"].get("height")))
        for number, entry in enumerate(objects, start=1):
            title = entry.get("classTitle")
            what = f"object {number} ({title!r})"
            if title not in self.values:
                raise InputError(f"{what} has a class that is not in {META}. Add it there, or remove the object.")
            _draw(canvas, entry, self.values[title], what)
        return canvas.mask


def read(root: Path, files: Mapping[str, list[Path]]) -> Annotated:
    """Read a project. The classes are those of `meta.json`, in its order.

    Raises:
        InputError: an image or a class name is missing.
    """
    images, splits = ImageIndex(root), {}
    for split, paths in files.items():
        splits[split] = to_records(((images.find(f"img/{path.stem}", path, split), path) for path in paths), root)
    meta = read_json(root / META)
    classes = meta.get("classes") if isinstance(meta, dict) else None
    if not has_type(classes, list[dict]) or not all(isinstance(entry.get("title"), str) for entry in classes):
        raise InputError(f"{root / META} must list the classes, each with a title.")
    titles = [entry["title"] for entry in classes]
    values = {title: value for value, title in enumerate(titles, start=1)}
    return Annotated("Supervisely", splits, tuple(titles), Supervisely(values), (), root / META)


def _draw(canvas: Canvas, entry: Mapping[str, Any], value: int, what: str) -> None:
    kind, points = entry.get("geometryType"), entry.get("points")
    points = points if isinstance(points, dict) else {}
    if kind == "polygon":
        canvas.polygon(points.get("exterior"), value, what, holes=points.get("interior") or ())
    elif kind == "rectangle":
        canvas.rectangle(points.get("exterior"), value, what)
    elif kind == "bitmap":
        bitmap = entry.get("bitmap")
        if not isinstance(bitmap, dict) or not has_type(bitmap.get("origin"), list[int]) or len(bitmap["origin"]) != 2:
            raise InputError(f"{what} has no bitmap with data and origin. Draw it again, or remove it.")
        shape = decode_base64_png(bitmap.get("data"), what, compressed=True)
        canvas.stamp(shape, *bitmap["origin"], value, what)
    else:
        raise InputError(f"{what} is of the type {kind!r}, which is not read. Draw it as a polygon, or remove it.")
