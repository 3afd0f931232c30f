"""labelme's JSON: one file for each image. Shapes are filled as by `labelme.utils.shapes_to_label`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Features, List, Value

from ...errors import InputError
from ...files import has_type, parse_json, read_json, read_lines
from ..caching import cached_map
from ..checking import fingerprint_of_files
from .bitmaps import decode_base64_png
from .drawing import Canvas, Sizes, corners
from .found import Annotated
from .images import ImageIndex, to_records

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

NAMES = "labels.txt"  # with which labelme is started
_LINE_WIDTH, _POINT_RADIUS = 10, 5  # of labelme's own export
_FORMAT = 1  # of the cached names: increase it when they change


@dataclass(frozen=True)
class Labelme:
    """Draws the shapes of an image.

    Attributes:
        values: label to the value in the mask.
    """

    values: Mapping[str, int]

    def draw(self, content: bytes, sizes: Sizes) -> Picture:
        """Draw the shapes of a file in their order.

        Raises:
            InputError: the file is not labelme's JSON, has an unknown label or shape, or its image has another size.
        """
        document = parse_json(content)
        shapes = _shapes_of(document)
        stated = (document.get("imageWidth"), document.get("imageHeight"))
        canvas = Canvas(sizes, None if None in stated else stated)
        for number, shape in enumerate(shapes, start=1):
            what = f"shape {number} ({shape['label']!r})"
            if shape["label"] not in self.values:
                raise InputError(f"{what} has a label that is not in {NAMES}. Add it there, or change the label.")
            _draw(canvas, shape, self.values[shape["label"]], what)
        return canvas.mask


def read(root: Path, files: Mapping[str, list[Path]]) -> Annotated:
    """Read the files of labelme.

    The classes are those of `labels.txt` in their order, or else the labels that occur, sorted by name. An image is
    that of the file's own name, or else the one that the file names.

    Raises:
        InputError: an image is missing, or there is no shape.
    """
    images, splits = ImageIndex(root), {}
    outlines = {split: _outlines(paths) for split, paths in files.items()}
    for split, paths in files.items():
        pairs = []
        for path, name in zip(paths, outlines[split]["image"], strict=True):
            beside = images.beside(path)
            pairs.append((beside or images.find(name, path, split), path))
        splits[split] = to_records(pairs, root)
    listed = next((path for path in (root / NAMES, files["train"][0].parent / NAMES) if path.is_file()), None)
    if listed is not None:
        labels = read_lines(listed)
    else:
        labels = sorted({label for found in outlines.values() for some in found["labels"] for label in some})
    if not labels:
        raise InputError(f"{root} has no shapes in its labelme files. Annotate the images first.")
    values = {label: value for value, label in enumerate(labels, start=1)}
    return Annotated("labelme", splits, tuple(labels), Labelme(values), (), listed or root)


def _outlines(paths: list[Path]) -> Dataset:
    """Return the image and the labels that each file names, from the cache if the files have not changed."""
    names = list(map(str, paths))
    return cached_map(
        Dataset.from_dict({"path": names}),
        lambda row: _outline(row["path"]),
        f"labelme {_FORMAT} {fingerprint_of_files(names)}",
        features=Features({"image": Value("string"), "labels": List(Value("string"))}),
        remove_columns=["path"],
        desc="Reading the names of labels",
    )


def _outline(path: str) -> dict[str, Any]:
    """Return the image and the labels of a file. What is wrong with the file is said when it is drawn."""
    try:
        document = read_json(path)
        return {
            "image": document.get("imagePath"),
            "labels": sorted({shape["label"] for shape in _shapes_of(document)}),
        }
    except InputError:
        return {"image": None, "labels": []}


def _shapes_of(document: Any) -> list[dict[str, Any]]:
    shapes = document.get("shapes") if isinstance(document, dict) else None
    if not has_type(shapes, list[dict]) or not all(isinstance(shape.get("label"), str) for shape in shapes):
        raise InputError("it is not a file of labelme: it has no list `shapes` whose entries have a `label`.")
    return shapes


def _draw(canvas: Canvas, shape: Mapping[str, Any], value: int, what: str) -> None:
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    if kind in ("polygon", "oriented_rectangle"):
        canvas.polygon(points, value, what)
    elif kind == "rectangle":
        canvas.rectangle(points, value, what)
    elif kind == "circle":
        center, edge = corners(points, canvas.size, what, number=2)
        canvas.disk(center, math.dist(center, edge), value)
    elif kind == "point":
        (center,) = corners(points, canvas.size, what, number=1)
        canvas.disk(center, _POINT_RADIUS, value)
    elif kind in ("line", "linestrip"):
        canvas.line(
            corners(points, canvas.size, what, number=2 if kind == "line" else None, least=2), _LINE_WIDTH, value
        )
    elif kind == "mask":
        (left, top), _ = np.asarray(corners(points, canvas.size, what, number=2)).astype(int).tolist()
        canvas.stamp(decode_base64_png(shape.get("mask"), what), left, top, value, what)
    else:
        raise InputError(f"{what} is of the type {kind!r}, which is not read. Draw it as a polygon, or remove it.")
