"""Text files that are complete or not there."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file as UTF-8, complete or not at all: it gets its name when all of it is written."""
    temporary = path.with_name(f"_{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
