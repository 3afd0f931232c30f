"""Files of others are read, and results are written, in one place each."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file as UTF-8, with or without a byte order mark.

    Raises:
        InputError: the file cannot be read, or is not JSON. The error's cause is a `FileNotFoundError` if it is
            missing.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait forever
            raise ValueError("it is not a file")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise InputError(f"{path} is not readable JSON: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {first_line(error)}") from error


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


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, see [`atomic_write_bytes`]."""
    atomic_write_bytes(path, text.encode())


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
