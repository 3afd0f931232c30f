"""COCO JSON, as COCO itself, Roboflow, CVAT and Label Studio export it. pycocotools fills its polygons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from PIL import Image as PILImage
from pycocotools import mask as coco_mask

from ...errors import InputError
from ..layouts import Record
from .drawing import Canvas, Sizes, corners
from .found import Annotated
from .images import ImageIndex, to_records
from .json_files import LargeFile, Span, read_spans

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class _Image(msgspec.Struct):
    id: int
    file_name: str
    width: int
    height: int


class _Category(msgspec.Struct):
    id: int
    name: str
    supercategory: str | None = None


class _File(msgspec.Struct):
    """A file whose annotations are not decoded: as Python objects they would need many times its size."""

    images: list[_Image]
    categories: list[_Category]
    annotations: list[msgspec.Raw]


class _Owner(msgspec.Struct):
    image_id: int
    category_id: int
    id: int | str | None = None


class _Annotation(msgspec.Struct):
    category_id: int
    id: int | str | None = None
    segmentation: Any = None


class _Labels(msgspec.Struct):
    """What is kept for each image."""

    file: str
    width: int
    height: int
    annotations: list[Span]


@dataclass(frozen=True)
class Coco:
    """Draws the annotations of an image.

    Attributes:
        values: category id to the value in the mask.
    """

    values: Mapping[int, int]

    def draw(self, content: bytes, sizes: Sizes) -> Picture:
        """Draw the annotations of an image, in the order of the file.

        Raises:
            InputError: a polygon or a mask in run-length encoding is damaged, or the image has another size.
        """
        labels = msgspec.json.decode(content, type=_Labels)
        size = Canvas(sizes, (labels.width, labels.height)).size
        mask = np.zeros(size[::-1], dtype=np.uint8)
        for raw in read_spans(labels.file, labels.annotations):
            try:
                annotation = msgspec.json.decode(raw, type=_Annotation)
            except msgspec.DecodeError as error:  # it was valid when the file was opened
                raise InputError(f"an annotation is not valid: {error}. Was the file changed?") from error
            shape = _shape_of(annotation.segmentation, size, f"annotation {annotation.id}")
            mask[shape] = self.values[annotation.category_id]
        return PILImage.fromarray(mask)


def read(root: Path, files: Mapping[str, list[Path]]) -> Annotated:
    """Read the COCO files of the splits.

    Categories are numbered by their id. A category that is only the supercategory of others, as Roboflow adds one, is
    left out.

    Raises:
        InputError: a file is no COCO JSON, names an image that is missing, or has an unknown category; or two files
            number the categories differently.
    """
    images = ImageIndex(root)
    names: dict[int, str] = {}
    named_by: Path | None = None
    splits, notes, used, parents = {}, [], set(), set()
    for split, (path,) in files.items():
        file = LargeFile(path, _File, "Export COCO's JSON for instances again.")
        content = file.content
        found = {category.id: category.name for category in content.categories}
        if len(found) < len(content.categories):
            raise InputError(f"{path} has two categories of one id. Give each category an id of its own.")
        if named_by is not None and found != names:
            raise InputError(f"{named_by} and {path} have other categories. Export all splits with the same ones.")
        names, named_by = found, path
        parents |= {category.supercategory for category in content.categories}
        splits[split] = _records(file, path, split, images, used)
    unused = {id for id, name in names.items() if id not in used and name in parents}
    if unused and len(names) > len(unused):
        shown = ", ".join(repr(names[id]) for id in sorted(unused))
        notes.append(f"the category {shown} is only the parent of others, and no class")
        names = {id: name for id, name in names.items() if id not in unused}
    ids = sorted(names)
    values = {id: value for value, id in enumerate(ids, start=1)}
    return Annotated("COCO", splits, tuple(names[id] for id in ids), Coco(values), tuple(notes), named_by)


def _records(file: LargeFile[_File], path: Path, split: str, images: ImageIndex, used: set[int]) -> list[Record]:
    """Group the annotations by their images, and note the categories that occur."""
    content = file.content
    if not content.images:
        raise InputError(f"{path} is an empty export: it names no images")
    if not content.annotations and split != "test":
        raise InputError(f"{path} is an empty export: it has no annotations")
    if len({image.id for image in content.images}) < len(content.images):
        raise InputError(f"{path} has two images of one id. Give each image an id of its own.")
    known = {category.id for category in content.categories}
    by_image: dict[int, list[Span]] = defaultdict(list)
    for number, raw in enumerate(content.annotations):
        try:
            owner = msgspec.json.decode(raw, type=_Owner)
        except msgspec.DecodeError as error:
            raise InputError(f"{path}: annotation number {number} is not valid: {error}") from error
        if owner.category_id not in known:
            raise InputError(
                f"{path}: annotation {owner.id} has the category {owner.category_id}, which is not among the "
                f"categories ({', '.join(map(str, sorted(known))) or 'there are none'}). Add it to them, or remove "
                "the annotation."
            )
        used.add(owner.category_id)
        by_image[owner.image_id].append(file.span_of(raw))
    strangers = by_image.keys() - {image.id for image in content.images}
    if strangers:
        raise InputError(
            f"{path}: an annotation belongs to the image {min(strangers)}, which is not among the images. Add it to "
            "them, or remove the annotation."
        )
    pairs = []
    for image in content.images:
        labels = _Labels(str(path), image.width, image.height, by_image[image.id])
        row = {"bytes": msgspec.json.encode(labels), "path": f"{path} ({image.file_name})"}
        pairs.append((images.find(image.file_name, path, split), row))
    return to_records(pairs, path)


def _shape_of(segmentation: Any, size: tuple[int, int], what: str) -> np.ndarray:
    """Return the pixels of an annotation, bool `(H, W)`: of its polygons, or of its run-length encoding."""
    width, height = size
    if isinstance(segmentation, dict):
        return _decode_runs(segmentation, size, what)
    if not isinstance(segmentation, list) or not segmentation:
        raise InputError(
            f"{what} has no segmentation, only a box. Export polygons or masks, or remove the annotation."
        )
    flat = []
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) % 2:
            raise InputError(f"{what} has a polygon that is no list of x and y. Draw it again, or remove it.")
        pairs = corners([polygon[at : at + 2] for at in range(0, len(polygon), 2)], size, what)
        flat.append([coordinate for pair in pairs for coordinate in pair])
    runs = coco_mask.merge(coco_mask.frPyObjects(flat, height, width))
    return coco_mask.decode(runs).view(bool)


def _decode_runs(encoded: dict[str, Any], size: tuple[int, int], what: str) -> np.ndarray:
    """Decode runs of 0 and 1 in turn, column by column. pycocotools does so too, but does not see what is missing."""
    width, height = size
    counts = encoded.get("counts")
    if encoded.get("size") != [height, width]:
        raise InputError(f"{what} is a mask of the size {encoded.get('size')}, but the image has {[height, width]}.")
    if isinstance(counts, str):
        counts = _decompress(counts)
    is_valid = isinstance(counts, list) and all(isinstance(run, int) and run >= 0 for run in counts)
    if not is_valid or sum(counts) != width * height:
        raise InputError(
            f"{what} has a run-length encoding that is damaged: its runs do not add up to {width * height} pixels. "
            "Export it again."
        )
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def _decompress(text: str) -> list[int]:
    """Read the run lengths in COCO's compressed string: 5 bits a character, differences to the run before the last."""
    counts, value, shift = [], 0, 0
    for character in text:
        code = ord(character) - 48
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value, shift = 0, 0
    return counts
