"""Meaning of the values or colours of a mask: class names, void values, and the mapping to class indices."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..files import read_bytes, read_json
from .pictures import is_inverted

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

IGNORE_INDEX = 255
MAX_CLASSES = 255  # masks are stored with 8 bits, and 255 means no label

_MAX_VALUE = 2**16 - 1
_TRANSPARENT = 2**24  # the code of transparent pixels, after those of all colours
_VOID_NAMES = {"void", "ignore", "unlabeled", "unlabelled"}  # in a palette file
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
    """

    names: tuple[str, ...]
    codes: Mapping[int, int]
    by_color: bool = False
    colors: tuple[Color, ...] | None = None
    license: str | None = None

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
        has them, work as well. Values may have gaps: class indices follow the order of the values. Values in
        `void_labels` are left out, because a network would have an output for them that is never right.

        Raises:
            InputError: `names` is not a mapping or file of this kind, has a name that is not text, equal names or
                values, fewer than 2 or more than 255 classes, or a value that no class can have. The value 255 always
                means no label.
        """
        source = "id2label" if isinstance(names, Mapping) else str(names)
        names = names if isinstance(names, Mapping) else _read_json(Path(names))
        void_labels, by_value = tuple(void_labels), {}
        for value, name in _pairs_of(names, source):
            if by_value.setdefault(value, name) != name:
                raise InputError(f"{source} names the value {value} twice: {by_value[value]!r} and {name!r}")
        by_value = {value: by_value[value] for value in sorted(by_value) if value not in void_labels}
        _check_names(by_value.values(), source)
        for value in by_value:
            if not 0 <= value <= _MAX_VALUE:
                raise InputError(f"{source}: {value} is not a possible mask value (0..{_MAX_VALUE})")
        if IGNORE_INDEX in by_value:
            name = by_value[IGNORE_INDEX]
            raise InputError(
                f"{source}: {name!r} has the value 255, which always means no label. Leave {name!r} out, or if it is "
                f"a class, give a palette file, which names colours, like {{{name!r}: [255, 255, 255]}}."
            )
        values = {value: index for index, value in enumerate(by_value)}
        return cls(tuple(by_value.values()), _with_void(values, void_labels))

    @classmethod
    def from_palette(cls, path: str | Path) -> Classes:
        """Read the classes from a palette file, for masks that hold colours.

        The file is JSON, `{"sky": [128, 128, 128], "road": "#804080"}`, or has text lines, `128 128 128 sky` or
        `sky:128,128,128::` as CVAT writes them. Classes are numbered in the order of the file. Colours named `void`,
        `ignore` or `unlabeled` mean no label. In JSON the colour "transparent" names the pixels without opacity.

        Raises:
            InputError: the file cannot be read, or has an invalid colour, a colour of two classes, a class of two
                colours, fewer than 2 or more than 255 classes.
        """
        path = Path(path)
        entries = _read_json(path) if path.suffix.lower() == ".json" else _read_color_lines(path)
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


def _pairs_of(names: object, source: str) -> Iterator[tuple[int, str]]:
    """Yield the values and names of a mapping, a list of names or a list of records with `id` and `name`."""
    if isinstance(names, list):
        is_records = all(isinstance(entry, dict) and {"id", "name"} <= entry.keys() for entry in names)
        names = [(entry["id"], entry["name"]) for entry in names] if is_records else enumerate(names)
    elif isinstance(names, Mapping):
        names = names.items()
    else:
        raise InputError(f"{source} must map class indices to names, like {{'0': 'sky', '1': 'road'}}.")
    for value, name in names:
        is_number = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_number and not (isinstance(value, str) and re.fullmatch(r"-?[0-9]+", value)):
            raise InputError(
                f"{source} must map class indices to names, like {{'0': 'sky', '1': 'road'}}, but names {value!r}."
            )
        yield int(value), _as_name(name, source)


def _as_name(name: object, source: str | Path) -> str:
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{source}: the name of a class must be text, got {name!r}")
    return unicodedata.normalize("NFC", name.strip())


def _stored_values(mask: Picture) -> np.ndarray:
    """Return the values in the file. PIL scales grey of 2 and 4 bits to 0..255, which is undone here."""
    if mask.mode not in _INDEX_MODES:
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


def _read_json(path: Path) -> object:
    try:
        return read_json(path)
    except InputError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise InputError(f"{path} is missing. It must name the classes, like {{'0': 'sky', '1': 'road'}}.") from error


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
