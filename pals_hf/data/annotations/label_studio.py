"""Label Studio's JSON: brush masks, polygons and rectangles of all tasks in one file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from ...errors import InputError
from ...files import has_type
from .bitmaps import decode_brush
from .drawing import Canvas, Sizes, are_points, to_pixels
from .found import Annotated
from .images import ImageIndex, to_records
from .json_files import LargeFile, Span, read_spans

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_UPLOAD = re.compile(r"^[0-9a-f]{8}-")  # before the name of an image that was uploaded


class _Annotation(msgspec.Struct):
    """The work of one annotator on a task. Its regions are not decoded: brush masks are long lists of numbers."""

    result: list[msgspec.Raw]
    was_cancelled: bool = False
    ground_truth: bool = False


class _Task(msgspec.Struct):
    id: int | str
    data: dict[str, Any]
    annotations: list[_Annotation]


class _Labels(msgspec.Struct):
    """A region without its shape, or an answer on the whole image."""

    type: str = ""
    value: dict[str, msgspec.Raw] = {}


class _Region(msgspec.Struct):
    value: dict[str, Any]
    original_width: int
    original_height: int
    type: str = ""
    image_rotation: float = 0


class _Row(msgspec.Struct):
    """What is kept for each image."""

    file: str
    regions: list[Span]


@dataclass(frozen=True)
class LabelStudio:
    """Draws the regions of a task.

    Attributes:
        values: label to the value in the mask.
    """

    values: Mapping[str, int]

    def draw(self, content: bytes, sizes: Sizes) -> Picture:
        """Draw the regions of a task in their order.

        Raises:
            InputError: a region is damaged, has a type that is not read, or is of an image of another size.
        """
        row = msgspec.json.decode(content, type=_Row)
        canvas = None
        for number, raw in enumerate(read_spans(row.file, row.regions), start=1):
            what = f"region {number}"
            try:
                region = msgspec.json.decode(raw, type=_Region)
            except msgspec.DecodeError as error:
                raise InputError(f"{what} is not valid: {error}") from error
            if region.image_rotation:
                raise InputError(
                    f"{what} was drawn on an image turned by {region.image_rotation:g} degrees, which is not read. "
                    "Turn the image file instead."
                )
            of_region = Canvas(sizes, (region.original_width, region.original_height))
            canvas = canvas or of_region
            _draw(canvas, region, self.values[_label_of(raw)], what)
        return (canvas or Canvas(sizes)).mask


def read(root: Path, files: Mapping[str, list[Path]]) -> Annotated:
    """Read the tasks. The classes are the labels that occur, sorted by name.

    Tasks without an annotation are left out. Of several annotations of a task, the one that is marked as ground truth
    counts.

    Raises:
        InputError: a file is no export of Label Studio, an image is missing, a region has several labels, or a task
            has several annotations.
    """
    images, labels = ImageIndex(root), set()
    splits, notes = {}, []
    for split, (path,) in files.items():
        file = LargeFile(path, list[_Task], "Export the project as JSON, not as JSON-MIN.")
        tasks = file.content
        pairs = []
        for task in tasks:
            annotation = _annotation_of(task, path)
            if annotation is None:
                continue
            regions = [raw for raw in annotation.result if _label_of(raw) is not None]
            labels |= {_label_of(raw) for raw in regions}
            row = {
                "bytes": msgspec.json.encode(_Row(str(path), [file.span_of(raw) for raw in regions])),
                "path": f"{path} (task {task.id})",
            }
            pairs.append((images.find(_image_of(task, images, path), path, split), row))
        if not pairs:
            raise InputError(f"{path} is an empty export: it has no task with an annotation")
        if len(pairs) < len(tasks):
            notes.append(f"{path} has {len(tasks) - len(pairs)} tasks without an annotation, which are not used")
        splits[split] = to_records(pairs, path)
    values = {label: value for value, label in enumerate(sorted(labels), start=1)}
    source = next(path for (path,) in files.values())
    return Annotated("Label Studio", splits, tuple(values), LabelStudio(values), tuple(notes), source)


def _annotation_of(task: _Task, path: Path) -> _Annotation | None:
    found = [annotation for annotation in task.annotations if not annotation.was_cancelled]
    found = [annotation for annotation in found if annotation.ground_truth] or found
    if len(found) > 1:
        raise InputError(
            f"{path}: task {task.id} has {len(found)} annotations, and each of them may be the right one. Mark one as "
            "ground truth, or remove the others."
        )
    return found[0] if found else None


def _label_of(raw: msgspec.Raw | bytes) -> str | None:
    """Return the label of a region, or None for an answer on the whole image."""
    try:
        region = msgspec.json.decode(raw, type=_Labels)
        found = region.value.get(region.type, region.value.get("labels"))
        is_region = region.value.keys() & {"rle", "points", "width", "radiusX"}
        labels = msgspec.json.decode(found, type=list[str]) if found is not None and is_region else []
    except msgspec.DecodeError as error:
        raise InputError(f"a region is not valid: {error}") from error
    if len(labels) > 1:
        raise InputError(f"a region has the labels {' and '.join(map(repr, labels))}. Give it one of them.")
    return labels[0] if labels else None


def _image_of(task: _Task, images: ImageIndex, path: Path) -> str:
    """Return the name of a task's image, which is known by its address."""
    texts = {key: value for key, value in task.data.items() if isinstance(value, str)}
    names = [name for value in texts.values() for name in _names_in(value)]
    found = [name for name in names if images.knows(name)]
    if not found and not names:
        raise InputError(f"{path}: task {task.id} names no image in its data")
    return (found or names)[0]


def _names_in(address: str) -> Iterator[str]:
    """Yield the names that an image of this address may have: of an upload, with and without its prefix."""
    parts = urlsplit(address)
    place = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]
    folder, _, name = place.rpartition("/")
    for candidate in dict.fromkeys((name, _UPLOAD.sub("", name))):
        yield f"{folder}/{candidate}"


def _draw(canvas: Canvas, region: _Region, value: int, what: str) -> None:
    width, height = canvas.size
    shape = region.value
    if "rle" in shape:
        canvas.stamp(decode_brush(shape["rle"], canvas.size, what), 0, 0, value, what)
    elif "points" in shape:
        canvas.polygon(_in_pixels(shape["points"], canvas.size), value, what)
    elif "width" in shape:
        numbers = [shape.get(name) for name in ("x", "y", "width", "height")]
        turn = shape.get("rotation", 0)
        if not has_type([*numbers, turn], list[float]):
            raise InputError(f"{what} is a rectangle without position and size. Draw it again, or remove it.")
        x, y, w, h = (share * size / 100 for share, size in zip(numbers, (width, height) * 2, strict=True))
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        ends = ((0, 0), (w, 0), (w, h), (0, h))  # turned around the first of them
        canvas.polygon([[x + a * cos - b * sin, y + a * sin + b * cos] for a, b in ends], value, what)
    else:
        raise InputError(f"{what} is of the type {region.type!r}, which is not read. Draw a polygon or use the brush.")


def _in_pixels(points: Any, size: tuple[int, int]) -> Any:
    """Return points that are given as percentages. What is wrong with them is said when they are drawn."""
    if not are_points(points):
        return points
    return [[to_pixels(share / 100, length) for share, length in zip(point, size, strict=True)] for point in points]
