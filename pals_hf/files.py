"""Files of others are read, and results are written, in one place each."""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from .errors import InputError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image


def read_bytes(path: str | os.PathLike) -> bytes:
    """Read a file. Pipes and devices are refused, because reading them may never end.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path.name} is not a regular file")
    return path.read_bytes()


def read_lines(path: str | os.PathLike) -> list[str]:
    """Read the lines of a text file as UTF-8, with or without a byte order mark, without space at their ends.

    Empty lines are left out.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file as UTF-8, with or without a byte order mark.

    Raises:
        InputError: the file cannot be read, or is not JSON. The error's cause is a `FileNotFoundError` if it is
            missing.
    """
    try:
        return parse_json(read_bytes(path))
    except InputError as error:
        raise InputError(f"{path} is {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {first_line(error)}") from error


def parse_json(content: bytes) -> Any:
    """Parse the content of a JSON file as UTF-8, with or without a byte order mark.

    Raises:
        InputError: it is not JSON, or an object has two entries of one name.
    """
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise InputError("not readable JSON: it is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"not readable JSON: {first_line(error)}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build the object of a JSON file. Python would keep the last of several entries with one key."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"it has two entries {next(key for key in keys if keys.count(key) > 1)!r}")
    return dict(pairs)


def has_type(value: Any, hint: Any) -> bool:
    """Return whether a value read from JSON has the type of an annotation. An int is a float, a bool is neither."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, UnionType):
        return any(has_type(value, part) for part in parts)
    if is_typeddict(hint):
        hints = get_type_hints(hint)
        return isinstance(value, dict) and all(key in value and has_type(value[key], hints[key]) for key in hints)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not isinstance(value, kind):
        return False
    if kind is dict and parts:
        return all(has_type(key, parts[0]) and has_type(part, parts[1]) for key, part in value.items())
    return not parts or all(has_type(part, parts[0]) for part in value)  # a list, or a tuple of any length


def walk(root: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield `root` and each folder below it, with the names of the files in it. Hidden folders are left out.

    Links to folders are followed, but each folder is visited once, under its own name if that is below `root`: links
    in a circle would never end.
    """
    top = os.path.realpath(root)
    seen = {top}

    def is_new(path: str) -> bool:
        real = os.path.realpath(path)
        inside = Path(real).relative_to(top).parts if Path(real).is_relative_to(top) else (".",)
        if real in seen or (os.path.islink(path) and not any(part.startswith(".") for part in inside)):
            return False
        seen.add(real)
        return True

    for place, folders, files in os.walk(root, onerror=onerror, followlinks=True):
        yield place, files
        folders[:] = [name for name in sorted(folders) if name[0] != "." and is_new(os.path.join(place, name))]


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: the content goes to a temporary file, which then takes the name."""
    temporary = path.with_name(f"_{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # with "x" below, never writes through a link that somebody else has put there
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def refuse_unwritable(folder: str | os.PathLike) -> None:
    """Check that an output folder can be created or written to, without creating it.

    Raises:
        InputError: it is a file or in a file, or permissions forbid it.
    """
    folder = Path(folder)
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        which = f"output_dir {folder}" + ("" if place == folder else f": {place}")
        raise InputError(f"{which} is a file, use another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"output_dir {folder}: you have no permission to write to {place}")


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, see [`atomic_write_bytes`]."""
    atomic_write_bytes(path, text.encode())


def make_folder(folder: str | os.PathLike) -> Path:
    """Create a folder for results, unless it exists.

    Raises:
        InputError: it cannot be created.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be created: {error.strerror}") from error
    return Path(folder)


def write_result(path: str | os.PathLike, result: str | bytes | Image) -> None:
    """Write text, bytes or a picture (as PNG) atomically, for the user.

    Raises:
        InputError: the file cannot be written, for example because the disk is full. An earlier file of this name is
            kept.
    """
    path = Path(path)
    if isinstance(result, str):
        result = result.encode()
    elif not isinstance(result, bytes):
        buffer = io.BytesIO()
        result.save(buffer, format="png")
        result = buffer.getvalue()
    try:
        atomic_write_bytes(path, result)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
