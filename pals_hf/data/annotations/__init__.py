"""Annotations as tools export them: find out which format a folder has, and read it.

Each format is a module with a function `read(root, files)`, which returns [`Annotated`]. A mask is drawn when it is
checked, and then kept in the cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ...errors import InputError
from ..layouts import SPLITS, files_below, images_below, masks_in, split_of
from .found import Annotated, Annotations

__all__ = ["Annotated", "Annotations", "find_annotations", "read_annotations"]

_HEAD = 2**16  # bytes of a file in which it shows its format
_FOLDERS = ("annotations", "labels", "images", "image", "imgs", "img", "json", "jsons")
_OTHER_COCO = ("captions_", "person_keypoints_", "panoptic_", "image_info_")  # COCO's own files for other tasks

Files = dict[str, list[Path]]


def find_annotations(root: Path) -> tuple[str, Files] | None:
    """Return the format of the annotations in a folder and their files by split, or None if there are none.

    Raises:
        InputError: there are annotations of two formats, or two files for one split.
    """
    if not root.is_dir():
        return None
    found = {**_find_in_json(root), "Supervisely": _find_supervisely(root), "YOLO": _find_yolo(root)}
    found = {format: files for format, files in found.items() if files}
    if len(found) > 1:
        (one, first), (two, second), *_ = found.items()
        raise InputError(
            f"{root} has annotations of two formats: {one} ({_first(first)}) and {two} ({_first(second)}). Remove one "
            "of them, or move it out of the folder."
        )
    if not found and masks_in(root) is None:
        _refuse_brush_masks(root)
    return next(iter(found.items()), None)


def _refuse_brush_masks(root: Path) -> None:
    for path in images_below(root):
        if re.match(r"task-.+-annotation-", path.name):
            raise InputError(
                f"{path} is a brush mask of Label Studio, which does not name its image. Export the project as JSON, "
                "and put the file and the images into the folder."
            )


def read_annotations(root: Path, format: str, files: Files) -> Annotated:
    """Read the annotations that [`find_annotations`] found.

    Raises:
        InputError: an image is missing, the annotations are damaged, or a package is not installed.
    """
    if "train" not in files:
        files = {
            "train" if len(files) == 1 and "test" not in files else split: paths for split, paths in files.items()
        }
    if "train" not in files:
        raise InputError(f"{root} has annotations of {format} for {' and '.join(files)}, but not for the train split.")
    try:
        if format == "COCO":
            from .coco import read
        elif format == "Label Studio":
            from .label_studio import read
        elif format == "labelme":
            from .labelme import read
        elif format == "Supervisely":
            from .supervisely import read
        else:
            from .yolo import read
    except ImportError as error:
        raise InputError(
            f"{_first(files)}: annotations of {format} need {error.name}. Install it with: pip install "
            "'pals_hf[annotations]'"
        ) from error
    return read(root, files)


def _first(files: Files) -> Path:
    return next(path for paths in files.values() for path in paths)


def _find_in_json(root: Path) -> dict[str, Files]:
    """Look at the JSON files where tools put them, and return those of each format by split.

    Raises:
        InputError: two files may be those of one split.
    """
    found: dict[str, Files] = {}
    for path in _json_files(root):
        format = _format_of(path)
        if format is None:
            continue
        place = path.relative_to(root)
        split = split_of(place.parent if format == "labelme" else place) or "train"
        files = found.setdefault(format, {}).setdefault(split, [])
        if files and format != "labelme":
            raise InputError(
                f"{files[0]} and {path} may both hold the annotations of the {split} split. Remove one of them, or "
                "name their splits, like train.json and val.json."
            )
        files.append(path)
    return found


def _json_files(root: Path) -> Iterator[Path]:
    splits = [name for names in SPLITS.values() for name in names]
    outer = [root, *(root / name for name in splits)]
    folders = [*outer, *(place / name for place in outer for name in _FOLDERS)]
    folders += [root / name / split for name in _FOLDERS for split in splits]
    for folder in folders:
        if folder.is_dir():
            yield from sorted(path for path in folder.glob("*.json") if path.name[0] != "." and path.is_file())


def _format_of(path: Path) -> str | None:
    """Return the format of a JSON file, by how it begins."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if path.name.startswith(_OTHER_COCO):
        return None
    if path.name.endswith(".coco.json"):
        return "COCO"
    if head.startswith(b"["):
        is_project = head.strip() == b"[]" and path.name.startswith("project-")
        is_tasks = re.search(rb'"(annotations|annotation_id|completed_by)"\s*:', head)
        return "Label Studio" if is_tasks or is_project else None
    if re.search(rb'"(shapes"\s*:\s*\[|imagePath"\s*:)', head):
        return "labelme"
    return "COCO" if re.search(rb'"(images|annotations|categories)"\s*:\s*\[', head) else None


def _find_supervisely(root: Path) -> Files:
    """Find `meta.json` beside data sets, folders of `img` and `ann`, which are the splits if they are called so."""
    if not (root / "meta.json").is_file():
        return {}
    paths = [path for path in files_below(root) if path.suffix == ".json" and path.parent.name == "ann"]
    split_of_folder = {path.parent: split_of(path.parent.relative_to(root)) for path in paths}
    if not any(split_of_folder.values()):
        split_of_folder = dict.fromkeys(split_of_folder, "train")
    files: Files = {}
    for path in paths:
        if split_of_folder[path.parent] is not None:
            files.setdefault(split_of_folder[path.parent], []).append(path)
    return files


def _find_yolo(root: Path) -> Files:
    """Find `data.yaml`, and a text file that has the name of an image."""
    found = [path for name in ("data.yaml", "data.yml", "dataset.yaml") if (path := root / name).is_file()]
    if not found:
        return {}
    names = {path.stem for path in images_below(root)}
    if not any(path.stem in names for path in files_below(root) if path.suffix == ".txt"):
        return {}
    if len(found) > 1:
        raise InputError(f"{found[0]} and {found[1]} may both describe the data set. Remove one of them.")
    return {"train": found}
