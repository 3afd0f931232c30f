"""Large JSON files: only their outline is decoded, and the rest is read from the file when it is drawn."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import numpy as np

from ...errors import InputError, first_line

T = TypeVar("T")
Span = tuple[int, int]


class LargeFile(Generic[T]):
    """A JSON file as a type of msgspec.

    Args:
        path: the file.
        kind: the type. Parts of the type `msgspec.Raw` stay in the file.
        advice: a sentence on how to export such a file.

    Raises:
        InputError: the file cannot be read, is not JSON, or has another structure.
    """

    def __init__(self, path: Path, kind: type[T], advice: str):
        try:
            with open(path, "rb") as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._start = _address_of(view)
            self.content: T = msgspec.json.decode(view[3:] if view[:3] == b"\xef\xbb\xbf" else view, type=kind)
        except (OSError, ValueError, msgspec.DecodeError) as error:  # a ValueError if the file is empty
            raise InputError(f"{path} cannot be read: {first_line(error)}. {advice}") from error

    def span_of(self, raw: msgspec.Raw) -> Span:
        """Return where a part is in the file: its first byte, and the one behind its last."""
        start = _address_of(raw) - self._start
        return start, start + len(memoryview(raw))


def read_spans(path: str, spans: Iterable[Span]) -> list[bytes]:
    """Read parts of a file, see [`LargeFile.span_of`].

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return [_read_span(file, *span) for span in spans]
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror}") from error


def _read_span(file, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _address_of(content) -> int:
    return np.frombuffer(content, dtype=np.uint8).ctypes.data
