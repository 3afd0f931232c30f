"""Find a data set - built-in, in a folder, or with columns - and describe it as a `Source` of unchecked pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset, IterableDataset

from ..errors import InputError
from ..files import read_bytes
from . import synthetic
from .annotations import Annotated, find_annotations, read_annotations
from .checking import fingerprint_of_files
from .classes import UNLABELLED, Classes
from .columns import FEATURES, find_columns, fingerprint_of_split, open_splits, rename_columns
from .hub_facts import license_on_hub, names_on_hub, revision_on_hub
from .label_images import find_label_images
from .layouts import Record, masks_in, read_layout, to_columns, unused

# Files in which a folder names its classes: our own and CVAT's, those of exports, and those that are not read.
_OWN = ("id2label.json", "palette.json", "labelmap.txt")
_EXPORTED = ("_classes.csv", "class_dict.csv", "class_names.txt")
_NOT_READ = ("classes.txt", "labels.txt", "obj.names", "data.yaml")
_PALETTES = ("palette.json", "labelmap.txt", "class_dict.csv")


@dataclass(frozen=True)
class Source:
    """A data set whose masks have not been read yet.

    Attributes:
        name: name of the data set.
        splits: `train`, and if available `validation` and `test`, with the columns `id`, `image` and `labels`.
        classes: meaning of the mask values.
        fingerprints: for each split, a string that changes when the contents of the split change.
        revision: commit of the Hub repository, or None.
        has_ids: whether the images have names of their own, not only positions.
        notes: sentences about images that are there and not used.
    """

    name: str
    splits: dict[str, Dataset | IterableDataset]
    classes: Classes
    fingerprints: dict[str, str] = field(default_factory=dict)
    revision: str | None = None
    has_ids: bool = True
    notes: tuple[str, ...] = ()


def find_source(
    dataset_name, dataset_dir, dataset_config, columns, names, unlabelled: str | None = None, streaming: bool = False
) -> Source:
    """Find the data set that the arguments of [`load_segmentation_dataset`] name.

    Args:
        dataset_name, dataset_dir, dataset_config: as in [`load_segmentation_dataset`].
        columns: `(image_column, label_column)`.
        names: `(id2label, palette, void_labels)`.
        unlabelled: as in [`load_segmentation_dataset`].
        streaming: open a Hub or Parquet data set as a stream.

    Raises:
        InputError: the data set, a column or the class names are missing or invalid.
    """
    if dataset_name is not None and dataset_dir is not None:
        raise InputError("dataset_name and dataset_dir exclude each other. Give only one of them.")
    if unlabelled is not None and unlabelled not in UNLABELLED:
        raise InputError(f"unlabelled must be one of {', '.join(UNLABELLED)}, got {unlabelled!r}")
    found = None if dataset_dir is None else find_annotations(Path(dataset_dir))
    if found is not None:
        return _read_annotated(Path(dataset_dir), *found, names, unlabelled or "background")
    if unlabelled is not None:
        raise InputError(
            "unlabelled is for annotations, like polygons, but this data set has masks. Remove unlabelled, and name "
            "the values of unlabelled pixels by void_labels."
        )
    if dataset_dir is not None:
        return _read_folder(Path(dataset_dir), *names)
    if dataset_name is not None:
        return _read_columns(dataset_name, dataset_config, columns, *names, streaming=streaming)
    id2label, _, void_labels = names
    classes = Classes.from_names(id2label or dict(enumerate(synthetic.CLASSES)), void_labels)
    return Source("built-in street scenes", _generate(), classes)


def _generate() -> dict[str, Dataset]:
    columns = {split: zip(*synthetic.generate_split(split), strict=True) for split in synthetic.NUM_IMAGES}
    return {
        split: Dataset.from_dict(dict(zip(FEATURES, map(list, column), strict=True)), features=FEATURES)
        for split, column in columns.items()
    }


def _read_annotated(root: Path, format: str, files, names, unlabelled: str) -> Source:
    """Read a folder whose labels are annotations, not masks.

    Raises:
        InputError: there are masks, too, or the class names are given once more.
    """
    first = next(path for paths in files.values() for path in paths)
    mask = masks_in(root)
    if mask is not None:
        raise InputError(
            f"{root} has masks, like {mask}, and annotations of {format}, like {first}, and both may be the labels. "
            "Remove one of them, or move it out of the folder."
        )
    given = [name for name, value in zip(("id2label", "palette", "void_labels"), names, strict=True) if value]
    given += [str(root / name) for name in ("id2label.json", "palette.json") if (root / name).is_file()]
    if given:
        raise InputError(f"{first}: annotations of {format} name their classes themselves. Remove {given[0]}.")
    found: Annotated = read_annotations(root, format, files)
    classes = Classes.from_annotations(found.labels, unlabelled, found.source, found.annotations)
    if unlabelled == "background":
        name = classes.names[classes.codes[0]]
        outside = f"belong to the class {name!r}. Set unlabelled to void if they are not labelled."
    else:
        outside = "are not labelled"
    notes = (f"pixels outside of all annotations of {format} {outside}", *found.notes, *unused(root, found.splits))
    splits, fingerprints = _to_datasets(found.splits, [path for paths in files.values() for path in paths])
    return Source(root.resolve().name, splits, classes, fingerprints, notes=notes)


def _to_datasets(
    records: dict[str, list[Record]], sources: Iterable[Path] = ()
) -> tuple[dict[str, Dataset], dict[str, str]]:
    """Return the splits, and strings that change when their files or the sources of their labels change."""
    splits, fingerprints = {}, {}
    for split, found in records.items():
        columns = to_columns(found)
        if split == "test":
            columns["labels"] = [None] * len(found)
        else:
            labels = [label for label in columns["labels"] if isinstance(label, str)]
            fingerprints[split] = fingerprint_of_files([*columns["image"], *labels, *map(str, sources)])
        splits[split] = Dataset.from_dict(columns, features=FEATURES)
    return splits, fingerprints


def _read_folder(folder: Path, id2label, palette, void_labels: tuple[int, ...]) -> Source:
    layout = read_layout(folder)
    splits, fingerprints = _to_datasets(layout.splits)
    notes = layout.notes
    # Other data is often kept in the structure of a known data set, with class names of its own.
    homes = dict.fromkeys((layout.root, folder, *(found[0].image.parent for found in layout.splits.values() if found)))
    home = next((place for place in homes if _names_classes(place)), layout.root)
    is_own = layout.catalog_name is None or _names_classes(home)
    if is_own or palette is not None or id2label is not None:
        if id2label is None and palette is None and not _names_classes(home):
            id2label, label_notes = find_label_images(layout.splits["train"])
            notes += label_notes
        elif id2label is None and palette is None:
            _refuse_other_names([place for place in homes if _names_classes(place)])
        classes = _read_classes(id2label, palette, home, void_labels)
    else:
        classes = Classes.known(layout.catalog_name, void_labels)
    name = folder.resolve().name if is_own else layout.name
    return Source(name, splits, classes, fingerprints, notes=notes)


def _names_classes(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*_OWN, *_EXPORTED, *_NOT_READ))


def _refuse_other_names(homes: list[Path]) -> None:
    """Refuse lists of classes that differ between the splits. Roboflow writes one for each."""
    for name in _EXPORTED:
        found = [home / name for home in homes if (home / name).is_file()]
        other = next((path for path in found if read_bytes(path) != read_bytes(found[0])), None)
        if other is not None:
            raise InputError(f"{found[0]} and {other} name other classes. Export all splits with the same ones.")


def _read_columns(
    name: str, config: str | None, columns: tuple[str | None, str | None], id2label, palette, void_labels, streaming
) -> Source:
    loaded, notes = open_splits(name, config, streaming)
    image_column, label_column = find_columns(loaded, *columns)
    is_folder = Path(name).is_dir()
    folder = Path(name) if is_folder else Path(name).parent if Path(name).is_file() else None
    license, revision = loaded["train"].info.license or None, None
    if folder is None:
        license, revision = license or license_on_hub(name), revision_on_hub(name, loaded["train"])
        if id2label is None and palette is None:
            id2label = names_on_hub(name)
    fingerprints = {}
    if not streaming:
        fingerprints = {
            split: f"{fingerprint_of_split(part)} {image_column} {label_column}" for split, part in loaded.items()
        }
    return Source(
        name if folder is None else Path(name).resolve().name,  # never the path, which is private
        {split: rename_columns(part, split, image_column, label_column) for split, part in loaded.items()},
        replace(_read_classes(id2label, palette, folder or Path(), void_labels), license=license),
        fingerprints,
        revision,
        has_ids="id" in loaded["train"].features,
        notes=notes,
    )


def _read_classes(id2label, palette, folder: Path, void_labels: tuple[int, ...]) -> Classes:
    """Read the classes from the arguments, or else from the file in the folder that names them.

    Raises:
        InputError: the classes are not named, are named twice, or only in a file of another program.
    """
    if palette is None and id2label is None:
        own = [folder / name for name in _OWN if (folder / name).is_file()]
        exported = [folder / name for name in _EXPORTED if (folder / name).is_file()]
        found = own or exported
        if len(found) > 1:
            raise InputError(
                f"{found[0]} and {found[1]} both name the classes. Keep the one that says how to read the masks."
            )
        other = next((folder / name for name in _NOT_READ if (folder / name).is_file()), None)
        if not found and other is not None:
            raise InputError(f"{other} is not read. Name the classes in {folder / 'id2label.json'} instead.")
        id2label = found[0] if found else folder / "id2label.json"
        if id2label.name in _PALETTES:
            id2label, palette = None, id2label
    if palette is None:
        return Classes.from_names(id2label, void_labels)
    if id2label is not None or void_labels:
        raise InputError(
            f"{palette}: a palette file cannot be combined with id2label or void_labels, because it names the classes "
            "and the void colours itself. Remove id2label and void_labels."
        )
    return Classes.from_palette(palette)
