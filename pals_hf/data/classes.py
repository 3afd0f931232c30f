"""Meaning of the values or colours of a mask: class names, void values, and the mapping to class indices."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

IGNORE_INDEX = 255
MAX_CLASSES = 255  # masks are stored with 8 bits, and 255 means no label

_MAX_VALUE = 2**16 - 1
_MAX_COLOR = 2**24 - 1
_VOID_NAMES = {"void", "ignore", "unlabeled", "unlabelled"}  # in a palette file
_INDEX_MODES = {"1", "L", "P", "I", "I;16"}  # PIL modes whose values are class indices
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
        """Read the classes from `{raw value: name}`, a JSON file with this mapping, or a JSON list of names.

        Values may have gaps: class indices follow the order of the values. Values in `void_labels` are left out,
        because a network would have an output for them that is never right.

        Raises:
            InputError: `names` is not a mapping or file of this kind, has duplicate names, fewer than 2 or more than
                255 classes, or a value that no class can have. The value 255 always means no label.
        """
        source = "id2label" if isinstance(names, Mapping) else str(names)
        names = names if isinstance(names, Mapping) else _read_json(Path(names))
        if isinstance(names, list):
            names = dict(enumerate(names))
        try:
            by_value = dict(sorted((int(value), str(name)) for value, name in names.items()))
        except (AttributeError, ValueError, TypeError) as error:
            raise InputError(f"{source} must map class indices to names, like {{'0': 'sky', '1': 'road'}}.") from error
        void_labels = tuple(void_labels)
        by_value = {value: name for value, name in by_value.items() if value not in void_labels}
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

        The file is JSON, `{"sky": [128, 128, 128], "road": "#804080"}`, or has text lines, `128 128 128 sky`. Classes
        are numbered in the order of the file. Colours named `void`, `ignore` or `unlabeled` mean no label.

        Raises:
            InputError: the file cannot be read, or has an invalid colour, a colour of two classes, fewer than 2 or
                more than 255 classes.
        """
        path = Path(path)
        entries = _read_json(path) if path.suffix.lower() == ".json" else _read_color_lines(path)
        if not isinstance(entries, Mapping):
            raise InputError(f"{path} must map class names to colours, like {{'sky': [128, 128, 128]}}.")
        try:
            palette = {str(name): _parse_color(color) for name, color in entries.items()}
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: {error}") from error
        named = {name: color for name, color in palette.items() if name.lower() not in _VOID_NAMES}
        _check_names(named, path)
        codes: dict[int, int] = {}
        for name, color in palette.items():
            index = list(named).index(name) if name in named else IGNORE_INDEX
            if codes.setdefault(_code(color), index) != index:
                raise InputError(f"{path}: {name!r} has the colour {color} of another class. Colours must be unique.")
        return cls(tuple(named), codes, by_color=True, colors=tuple(named.values()))

    @property
    def id2label(self) -> dict[int, str]:
        """Return class index to name, as in a model's config."""
        return dict(enumerate(self.names))

    @cached_property
    def _table(self) -> np.ndarray:
        """Map codes to class indices or 255, and unknown codes to -1. The last entry is -1, for the code -1."""
        table = np.full((_MAX_COLOR if self.by_color else _MAX_VALUE) + 2, -1, dtype=np.int16)
        table[list(self.codes)] = list(self.codes.values())
        return table

    def encode(self, mask: Picture) -> np.ndarray:
        """Return a mask as class indices and 255, uint8 `(H, W)`.

        Raises:
            InputError: the mask is a JPEG, has a mode that cannot hold class indices, or holds an unknown value or
                colour.
        """
        if mask.format == "JPEG":
            raise InputError("a mask must not be a JPEG, because that format changes its values. Save it as PNG.")
        if self.by_color:
            rgb = np.asarray(mask.convert("RGB"), dtype=np.int32)
            codes = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
        else:
            if mask.mode not in _INDEX_MODES:
                raise InputError(
                    f"a mask must hold one class index per pixel, but this mask has mode {mask.mode}. If it holds "
                    "colours, give a palette file."
                )
            codes = _stored_values(mask)
            codes = np.where((codes >= 0) & (codes <= _MAX_VALUE), codes, -1)
        labels = self._table[codes]
        if labels.min(initial=0) < 0:
            row, column = np.argwhere(labels < 0)[0]
            raise InputError(self._unknown(mask, int(row), int(column)))
        return labels.astype(np.uint8)

    def _unknown(self, mask: Picture, row: int, column: int) -> str:
        if self.by_color:
            color = mask.convert("RGB").getpixel((column, row))
            return f"colour {color} is not in the palette file. Add it as a class or as void."
        values = sorted(value for value, index in self.codes.items() if index != IGNORE_INDEX)
        contiguous = values == list(range(len(values)))
        allowed = f"0..{values[-1]}" if contiguous else ", ".join(map(str, values))
        return (
            f"value {int(_stored_values(mask)[row, column])} is not a class ({allowed}). Add it to void_labels, or "
            "name it in id2label."
        )


def _stored_values(mask: Picture) -> np.ndarray:
    """Return the values in the file. PIL scales grey PNGs of 2 and 4 bits to 0..255, which is undone here."""
    values = np.asarray(mask).astype(np.int32)
    bits = mask.info.get("grey_bits")
    return values // (255 // (2**bits - 1)) if bits in (2, 4) else values


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
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing. It must name the classes, like {{'0': 'sky', '1': 'road'}}.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error


def _read_color_lines(path: Path) -> dict[str, Color]:
    """Read lines `red green blue name`, as in CamVid's `label_colors.txt`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable palette file: {error}") from error
    entries: dict[str, Color] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\S.*)", line.strip())
        if match is None:
            raise InputError(f"{path}, line {number}: expected `red green blue name`, got {line.strip()!r}")
        entries[match[4].strip()] = tuple(map(int, match.groups()[:3]))
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


def _code(color: Color) -> int:
    red, green, blue = color
    return red << 16 | green << 8 | blue
