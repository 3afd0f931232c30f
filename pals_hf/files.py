"""Atomic writes of text files, and the check that a folder can be written to."""

import os
from pathlib import Path

from .errors import InputError


def refuse_unwritable(folder: Path) -> None:
    """Check that an output folder can be created or written to, without creating it.

    Raises:
        InputError: it is a file or in a file, or permissions forbid it.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        which = f"output_dir {folder}" + ("" if place == folder else f": {place}")
        raise InputError(f"{which} is a file, use another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"output_dir {folder}: you have no permission to write to {place}")


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, atomically: the text goes to a temporary file, which then takes the name."""
    temporary = path.with_name(f"_{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
