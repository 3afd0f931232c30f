"""YOLO segmentation: `data.yaml`, and for each image a text file of polygons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ...errors import InputError, first_line
from ...files import has_type, read_bytes, read_lines
from ..layouts import SPLITS, images_below
from .drawing import Canvas, Sizes, to_pixels
from .found import Annotated
from .images import ImageIndex, to_records

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


@dataclass(frozen=True)
class Yolo:
    """Draws the polygons of an image.

    Attributes:
        values: number of a class to the value in the mask.
    """

    values: Mapping[int, int]

    def draw(self, content: bytes, sizes: Sizes) -> Picture:
        """Draw the lines `CLASS X1 Y1 X2 Y2 X3 Y3 ...` of a file, with coordinates as shares of the image's size.

        Raises:
            InputError: a line has a box instead of a polygon, an unknown class, or no numbers.
        """
        canvas = Canvas(sizes)
        width, height = canvas.size
        for number, line in enumerate(content.decode("utf-8-sig", errors="replace").splitlines(), start=1):
            if not line.strip():
                continue
            what = f"the polygon in line {number}"
            try:
                name, *numbers = line.split()
                index, shares = int(name), list(map(float, numbers))
            except ValueError as error:
                raise InputError(f"line {number} must be a class and coordinates, got {line[:40]!r}") from error
            if len(shares) == 4:
                raise InputError(f"line {number} has a box, not a polygon. Export the data set for segmentation.")
            if len(shares) % 2:
                raise InputError(f"{what} has {len(shares)} coordinates, which are not pairs. Draw it again.")
            if index not in self.values:
                known = ", ".join(map(str, self.values))
                raise InputError(f"{what} has the class {index}, which data.yaml does not name ({known}).")
            pairs = zip(shares[::2], shares[1::2], strict=True)
            points = [[to_pixels(x, width), to_pixels(y, height)] for x, y in pairs]
            canvas.polygon(points, self.values[index], what)
        return canvas.mask


def read(root: Path, files: Mapping[str, list[Path]]) -> Annotated:
    """Read a data set of Ultralytics. Images without a text file have no polygons, as for Ultralytics.

    Raises:
        InputError: `data.yaml` names no classes, or a folder or a list that is missing.
    """
    ((source,),) = files.values()
    content = _read_yaml(source)
    names = content["names"]
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not has_type(names, dict[int, str]) or content.get("nc", len(names)) != len(names):
        number = f"{content['nc']} " if "nc" in content else ""
        raise InputError(f"{source}: `names` must name the {number}classes, got {content['names']!r}.")
    splits, notes = {}, []
    index = ImageIndex(root)
    for split, usual in SPLITS.items():
        places = next((content[name] for name in usual if content.get(name)), None)
        if places is None:
            continue
        paths = [path for place in _as_list(places) for path in _images(place, source, index, split)]
        texts = [_text_of(path) for path in paths]
        missing = sum(not text.is_file() for text in texts)
        if missing == len(texts) and split != "test":
            raise InputError(f"{source}: no image of the {split} split has a text file, like {texts[0]}. Add them.")
        if missing and split != "test":
            notes.append(f"{missing} images of the {split} split have no text file, so they show none of the classes")
        rows = (text if text.is_file() else {"bytes": b"", "path": str(text)} for text in texts)
        splits[split] = to_records(zip(paths, rows, strict=True), source)
    if "train" not in splits:
        raise InputError(f"{source} names no images for the train split. Add them, like `train: images/train`.")
    numbers = sorted(names)
    values = {number: value for value, number in enumerate(numbers, start=1)}
    return Annotated("YOLO", splits, tuple(names[number] for number in numbers), Yolo(values), tuple(notes), source)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_bytes(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not readable YAML: {first_line(error)}") from error
    if not isinstance(content, dict) or "names" not in content:
        raise InputError(f"{path} does not name the classes. Add them, like `names: [road, car]`.")
    return content


def _as_list(places: Any) -> list[Any]:
    return places if isinstance(places, list) else [places]


def _images(place: Any, source: Path, index: ImageIndex, split: str) -> list[Path]:
    """List the images of a folder or a text file that `data.yaml` names.

    Exports name it by an absolute path or one of another folder, so the end of the path counts.
    """
    parts = Path(str(place).replace("\\", "/")).parts
    for start in range(len(parts)):
        found = source.parent.joinpath(*(part for part in parts[start:] if part not in ("..", ".", "/")))
        if found.is_dir():
            return list(images_below(found))
        if found.is_file():
            return [index.find(line, found, split) for line in read_lines(found)]
    raise InputError(f"{source}: the {split} images are in {place}, which is not below {source.parent}. Correct it.")


def _text_of(image: Path) -> Path:
    """Return the text file of an image: `labels` takes the place of the last `images` in its path."""
    parts = list(image.parts)
    places = [number for number, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")
