"""Meaning of the values or colours of a mask: class names, void values, and the mapping to class indices."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..files import read_bytes, read_json, read_lines
from .pictures import is_inverted

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from .annotations import Annotations

IGNORE_INDEX = 255
UNLABELLED = ("background", "void")  # what pixels outside of all annotations may be
MAX_CLASSES = 255  # masks are stored with 8 bits, and 255 means no label

_MAX_VALUE = 2**16 - 1
_TRANSPARENT = 2**24  # the code of transparent pixels, after those of all colours
_VOID_NAMES = {"void", "ignore", "unlabeled", "unlabelled", "__ignore__"}  # in a palette file and in annotations
_BACKGROUND_NAMES = {"background", "_background_"}  # in annotations
_INDEX_MODES = {"1", "L", "P", "I", "I;16", "I;16B"}  # PIL modes whose values are class indices
_CATALOG = Path(__file__).with_name("catalog.json")

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, and their values or colours in its masks.

    Attributes:
        names: class names in the order of the class indices, 0 to C - 1.
        codes: raw mask value, or colour as `red << 16 | green << 8 | blue`, to class index, or 255 for no label.
        by_color: whether `codes` are colours.
        colors: the data set's own colour of each class, for drawing, or None.
        license: licence of the data set, or None if it is unknown.
        annotations: draws the masks of a data set that has annotations instead of masks, or None.
        are_numbered: whether the values were given with the names, and do not just follow from their order.
    """

    names: tuple[str, ...]
    codes: Mapping[int, int]
    by_color: bool = False
    colors: tuple[Color, ...] | None = None
    license: str | None = None
    annotations: Annotations | None = None
    are_numbered: bool = True

    @classmethod
    def known(cls, name: str, void_labels: Iterable[int] = ()) -> Classes:
        """Return the classes of a data set in the catalog: `cityscapes`, `voc2012`, `ade20k` or `camvid`.

        Classes whose value is in `void_labels` are left out, as in [`from_names`].
        """
        entry, void_labels = json.loads(_CATALOG.read_text(encoding="utf-8"))[name], tuple(void_labels)
        wanted = [place for place, value in enumerate(entry["raw_values"]) if value not in void_labels]
        names, colors = zip(*(entry["classes"][place] for place in wanted), strict=True)
        values = {entry["raw_values"][place]: index for index, place in enumerate(wanted)}
        codes = _with_void(values, [*entry["void_values"], *void_labels])
        return cls(names, codes, colors=tuple(map(_parse_color, colors)), license=entry["license"])

    @classmethod
    def from_names(cls, names: str | Path | Mapping, void_labels: Iterable[int] = ()) -> Classes:
        """Read the classes from `{raw value: name}`.

        A JSON file with this mapping, a JSON list of names, and a JSON list of records with `id` and `name`, as COCO
        has them, work as well. So do a CSV file `value, name`, as Roboflow writes it, and a text file of one name in
        each line. Values may have gaps: class indices follow the order of the values. Values in `void_labels` are left
        out, because a network would have an output for them that is never right.

        A range of values, like `{"0": "background", "1-65535": "cell"}`, is for masks that number the objects of a
        class. The value 255 always means no label, unless it is in a range, or 0 and 255 are the only two classes, or
        there are two names without values, see [`of_black_and_white`].

        Raises:
            InputError: `names` is not a mapping or file of this kind, has a name that is not text, equal names or
                values, fewer than 2 or more than 255 classes, or a value that no class can have.
        """
        source = "id2label" if isinstance(names, Mapping) else str(names)
        names = names if isinstance(names, Mapping) else _read_names(Path(names))
        void_labels, by_values = tuple(void_labels), {}
        for values, name in _pairs_of(names, source):
            if by_values.setdefault(values, name) != name:
                raise InputError(f"{source} names the value {values[0]} twice: {by_values[values]!r} and {name!r}")
        in_order = sorted(by_values, key=lambda values: values[0])
        by_values = {values: by_values[values] for values in in_order if values[0] not in void_labels}
        _check_names(by_values.values(), source)
        for values in by_values:
            if not 0 <= values[0] <= values[-1] <= _MAX_VALUE:
                raise InputError(f"{source}: {values[-1]} is not a possible mask value (0..{_MAX_VALUE})")
        for one, two in pairwise(by_values):
            if one[-1] >= two[0]:
                raise InputError(f"{source} names the value {two[0]} twice: {by_values[one]!r} and {by_values[two]!r}")
        indices = {value: index for index, values in enumerate(by_values) for value in values}
        codes = {value: index for value, index in indices.items() if value not in void_labels}
        name = by_values.get(range(IGNORE_INDEX, IGNORE_INDEX + 1))
        if name is not None and list(codes) != [0, IGNORE_INDEX]:
            raise InputError(
                f"{source}: {name!r} has the value 255, which always means no label. Leave {name!r} out, or if it is "
                f"a class, give a palette file, which names colours, like {{{name!r}: [255, 255, 255]}}."
            )
        codes = {**_with_void({}, void_labels), **codes}
        is_list = isinstance(names, list) and not _are_records(names)
        return cls(tuple(by_values.values()), codes, are_numbered=not is_list)

    @classmethod
    def from_annotations(
        cls, labels: Sequence[str], unlabelled: str, source: str | Path, annotations: Annotations
    ) -> Classes:
        """Return the classes of annotations. In the masks that are drawn, the first label has the value 1.

        Labels named `void`, `ignore`, `unlabeled` or `__ignore__` mean no label.

        Args:
            labels: names of the classes in their order.
            unlabelled: what the pixels outside of all regions are, one of [`UNLABELLED`]. "background" is the class of
                the label `background` or `_background_`, or else a further class before all others.
            source: the file that names the labels, for messages.
            annotations: draws the masks.

        Raises:
            InputError: a label is not text, two are equal, or there are fewer than 2 or more than 255 classes.
        """
        labels = [_as_name(label, source) for label in labels]
        names = [label for label in labels if label.lower() not in _VOID_NAMES]
        outside = next((name for name in names if name.lower() in _BACKGROUND_NAMES), None)
        if unlabelled == "background" and outside is None:
            outside = "background"
            names = [outside, *names]
        _check_names(names, source)
        codes = {
            value: names.index(label) if label in names else IGNORE_INDEX
            for value, label in enumerate(labels, start=1)
        }
        codes[0] = names.index(outside) if unlabelled == "background" else IGNORE_INDEX
        return cls(tuple(names), codes, annotations=annotations)

    def of_black_and_white(self) -> Classes | None:
        """Return the classes of masks that hold 0 and 255 instead of 0 and 1, or None if these are other classes.

        Two names in a list may stand for 0 and 255 as well as for 0 and 1. If the values were given, they stand.
        """
        is_binary = self.codes == {0: 0, 1: 1, IGNORE_INDEX: IGNORE_INDEX} and not self.by_color
        return replace(self, codes={0: 0, IGNORE_INDEX: 1}) if is_binary and not self.are_numbered else None

    @property
    def has_raw_values(self) -> bool:
        """Whether the masks hold values, of which one may be void without being named so."""
        return not self.by_color and self.annotations is None

    @classmethod
    def from_palette(cls, path: str | Path) -> Classes:
        """Read the classes from a palette file, for masks that hold colours.

        The file is JSON, `{"sky": [128, 128, 128], "road": "#804080"}`, or has text lines, `128 128 128 sky` or
        `sky:128,128,128::` as CVAT writes them, or is a CSV file of `name,r,g,b`. Classes are numbered in the order of
        the file. Colours named `void`, `ignore` or `unlabeled` mean no label. In JSON the colour "transparent" names
        the pixels without opacity.

        Raises:
            InputError: the file cannot be read, or has an invalid colour, a colour of two classes, a class of two
                colours, fewer than 2 or more than 255 classes.
        """
        path = Path(path)
        readers = {".json": _read_json, ".csv": _read_color_table}
        entries = readers.get(path.suffix.lower(), _read_color_lines)(path)
        if isinstance(entries, Mapping):
            entries = list(entries.items())
        elif path.suffix.lower() == ".json":
            raise InputError(f"{path} must map class names to colours, like {{'sky': [128, 128, 128]}}.")
        try:
            palette = [(_as_name(name, path), color, _code_of(color)) for name, color in entries]
        except (ValueError, TypeError) as error:
            raise error if isinstance(error, InputError) else InputError(f"{path}: {error}") from error
        named = [(name, color) for name, color, _ in palette if name.lower() not in _VOID_NAMES]
        names = [name for name, _ in named]
        _check_names(names, path)
        codes: dict[int, int] = {}
        for name, color, code in palette:
            index = names.index(name) if name in names else IGNORE_INDEX
            if codes.setdefault(code, index) != index:
                shown = color if isinstance(color, str) else tuple(color)
                raise InputError(f"{path}: {name!r} has the colour {shown} of another class. Colours must be unique.")
        colors = tuple((0, 0, 0) if color == "transparent" else _parse_color(color) for _, color in named)
        return cls(tuple(names), codes, by_color=True, colors=colors)

    @property
    def id2label(self) -> dict[int, str]:
        """Return class index to name, as in a model's config."""
        return dict(enumerate(self.names))

    @cached_property
    def _table(self) -> np.ndarray:
        """Map codes to class indices or 255, and unknown codes to -1. The last entry is -1, for the code -1."""
        table = np.full((_TRANSPARENT if self.by_color else _MAX_VALUE) + 2, -1, dtype=np.int16)
        table[list(self.codes)] = list(self.codes.values())
        return table

    def encode(self, mask: Picture) -> np.ndarray:
        """Return a mask as class indices and 255, uint8 `(H, W)`.

        Raises:
            InputError: the mask is a JPEG, has a mode that cannot hold class indices, is half transparent, stores
                white as zero, or holds an unknown value or colour.
        """
        if mask.format == "JPEG":
            raise InputError("a mask must not be a JPEG, because that format changes its values. Save it as PNG.")
        if is_inverted(mask):
            raise InputError(
                "this TIFF stores white as zero (an inverting lookup table), so its values can be read in two ways. "
                "Save the mask with a normal lookup table, or as PNG."
            )
        codes = _stored_colors(mask) if self.by_color else self._values(mask)
        labels = self._table[np.where((codes >= 0) & (codes < len(self._table)), codes, -1)]
        if labels.min(initial=0) < 0:
            row, column = np.argwhere(labels < 0)[0].tolist()
            raise InputError(self._unknown(mask, int(codes[row, column]), row, column))
        return labels.astype(np.uint8)

    def _values(self, mask: Picture) -> np.ndarray:
        """Return the values of a mask. Programs that save grey pictures with a palette number the greys anew.

        Raises:
            InputError: both the values in the file and the greys in its palette may be class indices.
        """
        values, palette = _stored_values(mask), _palette_of(mask)
        if not palette:
            return values
        if not all(len(set(palette[value])) == 1 for value in np.unique(values).tolist() if value in palette):
            return values
        greys = np.arange(max(values.max(initial=0) + 1, 256))
        for value, (grey, *_) in palette.items():
            greys[value] = grey
        shown = greys[values]
        is_black_and_white = np.isin(shown, (0, 255)).all()
        if is_black_and_white or (shown == values).all() or not self._knows(shown):
            return values
        if mask.format == "GIF" or not self._knows(values):
            return shown
        differing = values != shown
        raise InputError(
            f"it stores the value {values[differing][0]} where it shows the grey {shown[differing][0]}, and both may "
            "be class indices. Save the mask in grey, without a palette."
        )

    def _knows(self, values: np.ndarray) -> bool:
        return bool((self._table[np.where((values >= 0) & (values <= _MAX_VALUE), values, -1)] >= 0).all())

    def _unknown(self, mask: Picture, code: int, row: int, column: int) -> str:
        if code == _TRANSPARENT and self.by_color:
            return (
                f"the pixel in row {row}, column {column} is transparent. Paint such pixels in the colour of their "
                'class, or name them in the palette file, like {"void": "transparent"}.'
            )
        if self.by_color:
            color = mask.convert("RGB").getpixel((column, row))
            return f"colour {color} is not in the palette file. Add it as a class or as void."
        values = sorted(value for value, index in self.codes.items() if index != IGNORE_INDEX)
        contiguous = values == list(range(len(values)))
        allowed = f"0..{values[-1]}" if contiguous else ", ".join(map(str, values))
        return f"value {code} is not a class ({allowed}). Add it to void_labels, or name it in id2label."

    def colors_of(self, mask: Picture) -> dict[int, Color]:
        """Return the colours in which a palette mask shows its values.

        Masks that hold colours or greys and masks without a palette have none.
        """
        values, palette = np.asarray(mask), _palette_of(mask)
        if self.by_color or not palette or (self._values(mask) != values).any():
            return {}
        shown = {value: palette[value] for value in np.unique(values).tolist() if value in palette}
        return {} if all(color == (value,) * 3 for value, color in shown.items()) else shown


class Palettes:
    """Make sure that all masks show a value in the same colour: otherwise the value means something else in each.

    Some programs give every file a palette of its own, in the order in which the colours occur.
    """

    def __init__(self):
        self._seen: dict[int, tuple[Color, str]] = {}

    def add(self, name: str, colors: Mapping[int, Color]) -> None:
        """Compare the colours of a mask, see [`Classes.colors_of`], with those of the masks before.

        Raises:
            InputError: another mask shows a value in another colour.
        """
        for value, color in colors.items():
            seen, where = self._seen.setdefault(value, (color, name))
            if seen != color:
                raise InputError(
                    f"{name} shows the value {value} in the colour {color}, but {where} in {seen}, so the value may "
                    "mean two classes. If the colours are right, give a palette file. If the values are right, save "
                    "the masks in grey, without a palette."
                )


def _pairs_of(names: object, source: str) -> Iterator[tuple[range, str]]:
    """Yield the values and names of a mapping, a list of names or a list of records with `id` and `name`."""
    if isinstance(names, list):
        names = [(entry["id"], entry["name"]) for entry in names] if _are_records(names) else enumerate(names)
    elif isinstance(names, Mapping):
        names = names.items()
    else:
        raise InputError(f"{source} must map class indices to names, like {{'0': 'sky', '1': 'road'}}.")
    for value, name in names:
        is_number = isinstance(value, Integral) and not isinstance(value, bool)
        found = re.fullmatch(r"(-?[0-9]+)(?:-([0-9]+))?", str(value)) if is_number or isinstance(value, str) else None
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise InputError(
                f"{source} must map class indices to names, like {{'0': 'sky', '1': 'road'}}, but names {value!r}."
            )
        yield range(int(found[1]), int(found[2] or found[1]) + 1), _as_name(name, source)


def _are_records(names: list[Any]) -> bool:
    return all(isinstance(entry, dict) and {"id", "name"} <= entry.keys() for entry in names)


def _as_name(name: object, source: str | Path) -> str:
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{source}: the name of a class must be text, got {name!r}")
    return unicodedata.normalize("NFC", name.strip())


def _stored_values(mask: Picture) -> np.ndarray:
    """Return the values in the file. PIL scales grey of 2 and 4 bits to 0..255, which is undone here."""
    is_whole = mask.mode == "F" and bool((np.asarray(mask) % 1 == 0).all())  # as ImageJ numbers many objects
    if mask.mode not in _INDEX_MODES and not is_whole:
        hint = "Save whole numbers." if mask.mode == "F" else "If it holds colours, give a palette file."
        raise InputError(f"a mask must hold one class index per pixel, but this mask has mode {mask.mode}. {hint}")
    values, bits = np.asarray(mask).astype(np.int32), mask.info.get("bits")
    return values // (255 // (2**bits - 1)) if mask.mode == "L" and bits in (2, 4) else values


def _palette_of(mask: Picture) -> dict[int, Color]:
    flat = mask.getpalette("RGB") or [] if mask.mode == "P" else []
    return {start // 3: tuple(flat[start : start + 3]) for start in range(0, len(flat), 3)}


def _stored_colors(mask: Picture) -> np.ndarray:
    """Return colours as codes, with the code of transparency where nothing is shown."""
    if mask.info.get("bits", 8) > 8 or mask.mode.startswith(("I", "F")):
        raise InputError("colours in a mask must have 8 bits per channel. Save the mask with 8 bits.")
    rgba = np.asarray(mask.convert("RGBA"), dtype=np.int32)
    alpha = rgba[..., 3]
    if ((alpha > 0) & (alpha < 255)).any():
        row, column = np.argwhere((alpha > 0) & (alpha < 255))[0].tolist()
        raise InputError(
            f"the pixel in row {row}, column {column} is half transparent, so its class is not certain. Save the mask "
            "without transparency and without smoothed edges."
        )
    return np.where(alpha == 0, _TRANSPARENT, rgba[..., 0] << 16 | rgba[..., 1] << 8 | rgba[..., 2])


def _with_void(values: dict[int, int], void_labels: Iterable[int]) -> dict[int, int]:
    void_labels = tuple(void_labels)
    for value in void_labels:
        if not 0 <= value <= _MAX_VALUE:
            raise InputError(f"void_labels: {value} is not a possible mask value (0..{_MAX_VALUE})")
    return {**values, **dict.fromkeys((*void_labels, IGNORE_INDEX), IGNORE_INDEX)}


def _check_names(names: Iterable[str], source: str | Path) -> None:
    names = list(names)
    if not 2 <= len(names) <= MAX_CLASSES:
        raise InputError(f"{source} must name 2 to {MAX_CLASSES} classes, but it names {len(names)}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{source} names {twice!r} twice. Class names must be unique.")


def _read_names(path: Path) -> object:
    """Read the names of classes from JSON, from a CSV file `value, name`, or from a text file of names."""
    if path.suffix.lower() == ".csv":
        rows = _read_table(path, 2)
        twice = next((row for row, count in Counter(value for value, _ in rows).items() if count > 1), None)
        if twice is not None:
            raise InputError(f"{path} names the value {twice} twice")
        return dict(rows)
    if path.suffix.lower() == ".txt":
        lines = read_lines(path)
        return lines[1:] if lines[:1] == ["__ignore__"] else lines  # which labelme writes as 255
    return _read_json(path)


def _read_json(path: Path) -> object:
    try:
        return read_json(path)
    except InputError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise InputError(f"{path} is missing. It must name the classes, like {{'0': 'sky', '1': 'road'}}.") from error


def _read_table(path: Path, columns: int) -> list[list[str]]:
    """Read the rows of a CSV file below its header."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(read_lines(path))]
    for number, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise InputError(f"{path}, row {number}: expected {columns} columns, got {row}")
    return rows[1:]


def _read_color_table(path: Path) -> list[tuple[str, Color]]:
    """Read rows `name,r,g,b`, as Kaggle's `class_dict.csv` has them."""
    rows = _read_table(path, 4)
    wrong = next((row for row in rows if not all(cell.isdecimal() for cell in row[1:])), None)
    if wrong is not None:
        raise InputError(f"{path}: expected a name and red, green, blue, got {wrong}")
    return [(name, tuple(map(int, color))) for name, *color in rows]


def _read_color_lines(path: Path) -> list[tuple[str, Color]]:
    """Read lines `red green blue name`, as in CamVid's `label_colors.txt`, or `name:red,green,blue::` of CVAT."""
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable palette file: {error}") from error
    entries = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        numbers_first = re.fullmatch(r"([0-9]+)[\s,]+([0-9]+)[\s,]+([0-9]+)[\s,]+(\S.*)", line)
        name_first = re.fullmatch(r"([^:]+):([0-9]+),([0-9]+),([0-9]+):.*", line)
        if numbers_first is not None:
            *color, name = numbers_first.groups()
        elif name_first is not None:
            name, *color = name_first.groups()
        else:
            raise InputError(f"{path}, line {number}: expected `red green blue name`, got {line!r}")
        entries.append((name, tuple(map(int, color))))
    return entries


def _parse_color(color: object) -> Color:
    """Read a colour that is written as `"#804080"` or `[128, 64, 128]`."""
    if isinstance(color, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", color):
        return tuple(bytes.fromhex(color[1:]))
    if (
        isinstance(color, list | tuple)
        and len(color) == 3
        and all(isinstance(v, int) and 0 <= v <= 255 for v in color)
    ):
        return tuple(color)
    raise ValueError(f"{color!r} is not a colour. Give [red, green, blue] from 0 to 255, or '#rrggbb'.")


def _code_of(color: object) -> int:
    if color == "transparent":
        return _TRANSPARENT
    red, green, blue = _parse_color(color)
    return red << 16 | green << 8 | blue
