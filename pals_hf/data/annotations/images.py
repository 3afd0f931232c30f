"""Find the images that an annotation file names. The paths in such files are often those of another machine."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ...errors import InputError
from ..layouts import Record, images_below, split_of


class ImageIndex:
    """The images in a folder and its subfolders, by name."""

    def __init__(self, root: Path):
        self.root = root
        self._by_path: dict[str, Path] = {}
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in images_below(root):
            place = self._place_of(path)
            self._by_path[place] = path
            self._by_name[PurePosixPath(place).name].append(path)
            self._by_stem[str(PurePosixPath(place).with_suffix(""))].append(path)

    def _place_of(self, path: Path) -> str:
        return _composed(path.relative_to(self.root).as_posix())

    def knows(self, name: str) -> bool:
        """Tell whether an image has the last part of this name."""
        return _composed(name.rpartition("/")[2]) in self._by_name

    def beside(self, path: Path) -> Path | None:
        """Return the only image that has the name of a file, up to the suffix, and is in its folder."""
        found = self._by_stem.get(self._place_of(path.with_suffix("")), [])
        return found[0] if len(found) == 1 else None

    def find(self, name: object, source: Path, split: str) -> Path:
        """Return the image of a name in an annotation file.

        The name is looked up in the folder of the annotation file and in those above it, with as much of its path as
        possible, and then anywhere. Among several, an image in a folder of the file's split is preferred.

        Args:
            name: path or name of the image.
            source: the annotation file.
            split: split of the annotation file.

        Raises:
            InputError: there is no such image, or several.
        """
        if not isinstance(name, str) or not name:
            raise InputError(f"{source}: the name of an image must be text, got {name!r}")
        every = PurePosixPath(_composed(name.replace("\\", "/"))).parts
        parts = [part for part in every if part not in ("..", ".", "/")]
        folders = [folder for folder in source.parents if folder.is_relative_to(self.root)]
        for start in range(len(parts)):
            for folder in folders:
                path = self._by_path.get(self._place_of(folder.joinpath(*parts[start:])))
                if path is not None:
                    return path
        found = self._by_name.get(parts[-1], []) if parts else []
        if len(found) > 1:
            found = [path for path in found if split_of(path.relative_to(self.root)) == split] or found
        if not found:
            raise InputError(
                f"{source} names the image {name!r}, which is not in {self.root}. Add the image, or remove it from "
                "the file."
            )
        if len(found) > 1:
            raise InputError(
                f"{source} names the image {name!r}, which may be {found[0]} or {found[1]}. Rename or remove one of "
                "them."
            )
        return found[0]


def to_records(pairs: Iterable[tuple[Path, Path | dict]], source: Path) -> list[Record]:
    """Return records of images and their labels. Ids are the paths below the folder that all images have in common.

    Args:
        pairs: images and their labels.
        source: the file or folder that names them, for messages.

    Raises:
        InputError: two images have the same name, up to the suffix.
    """
    pairs = list(pairs)
    folder = os.path.commonpath([image.parent for image, _ in pairs]) if pairs else ""
    records: dict[str, Record] = {}
    for image, labels in pairs:
        id = _composed(image.relative_to(folder).with_suffix("").as_posix())
        if id in records:
            if records[id].image == image:
                raise InputError(f"{source} has annotations of the image {image} twice. Remove one of them.")
            raise InputError(f"{records[id].image} and {image} have the same name. Rename or remove one of them.")
        records[id] = Record(id, image, labels)
    return [records[id] for id in sorted(records)]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
