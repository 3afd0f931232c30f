"""Large JSON files: only their outline is decoded, and the rest stays text until it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from ...errors import InputError, first_line
from ...files import read_bytes

T = TypeVar("T")


def decode_file(path: Path, kind: type[T], advice: str) -> T:
    """Decode a JSON file as a type of msgspec.

    Args:
        path: the file.
        kind: the type.
        advice: a sentence on how to export such a file.

    Raises:
        InputError: the file cannot be read, is not JSON, or has another structure.
    """
    try:
        content = memoryview(read_bytes(path))
        return msgspec.json.decode(content[3:] if content[:3] == b"\xef\xbb\xbf" else content, type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}. {advice}") from error
