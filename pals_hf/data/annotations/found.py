"""What the reader of a format returns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..layouts import Record
from .drawing import Sizes

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class Annotations(Protocol):
    """A format. Its `repr` names all its settings, because results are cached under it."""

    def draw(self, content: bytes, sizes: Sizes) -> Picture:
        """Draw the annotations of one image. Pixels outside of all regions have the value 0."""
        ...


class Annotated(NamedTuple):
    """A folder whose labels are annotations, not masks."""

    format: str
    """Name of the format."""
    splits: dict[str, list[Record]]
    """The records of `train`, and if available of `validation` and `test`."""
    labels: tuple[str, ...]
    """Names of the classes. The mask value of the first is 1."""
    annotations: Annotations
    """Draws the masks."""
    notes: tuple[str, ...]
    """Sentences about what is not used."""
    source: Path
    """The file that names the classes, for messages."""
