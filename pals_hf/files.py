"""Atomic writes of text files."""

from pathlib import Path


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, atomically: the text goes to a temporary file, which then takes the name."""
    temporary = path.with_name(f"_{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
