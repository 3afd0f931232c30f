"""Find a data set - built-in, in a folder, or with columns - and describe it as a `Source` of unchecked pairs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset, IterableDataset

from ..errors import InputError
from . import synthetic
from .checking import fingerprint_of_files
from .classes import Classes
from .columns import FEATURES, find_columns, fingerprint_of_split, open_splits, rename_columns
from .hub_facts import license_on_hub, names_on_hub, revision_on_hub
from .layouts import read_layout, to_columns

_PALETTES = ("palette.json", "labelmap.txt")
_READ = ("id2label.json", *_PALETTES)
# Files in which a folder names its classes: those that are read, then those of other programs.
_NAMES_OF_CLASSES = (*_READ, "class_names.txt", "classes.txt", "labels.txt", "obj.names", "_classes.csv")
_NAMES_OF_CLASSES += ("class_dict.csv", "data.yaml")


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


def find_source(dataset_name, dataset_dir, dataset_config, columns, names, streaming: bool = False) -> Source:
    """Find the data set that the arguments of [`load_segmentation_dataset`] name.

    Args:
        dataset_name, dataset_dir, dataset_config: as in [`load_segmentation_dataset`].
        columns: `(image_column, label_column)`.
        names: `(id2label, palette, void_labels)`.
        streaming: open a Hub or Parquet data set as a stream.

    Raises:
        InputError: the data set, a column or the class names are missing or invalid.
    """
    if dataset_name is not None and dataset_dir is not None:
        raise InputError("dataset_name and dataset_dir exclude each other. Give only one of them.")
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


def _read_folder(folder: Path, id2label, palette, void_labels: tuple[int, ...]) -> Source:
    layout = read_layout(folder)
    splits, fingerprints = {}, {}
    for split, records in layout.splits.items():
        columns = to_columns(records)
        splits[split] = Dataset.from_dict(columns, features=FEATURES)
        if split != "test":
            fingerprints[split] = fingerprint_of_files([*columns["image"], *columns["labels"]])
    # Other data is often kept in the structure of a known data set, with class names of its own.
    home = next((place for place in (layout.root, folder) if _names_classes(place)), layout.root)
    is_own = layout.catalog_name is None or _names_classes(home)
    if is_own or palette is not None or id2label is not None:
        classes = _read_classes(id2label, palette, home, void_labels)
    else:
        classes = Classes.known(layout.catalog_name, void_labels)
    name = folder.resolve().name if is_own else layout.name
    return Source(name, splits, classes, fingerprints, notes=layout.notes)


def _names_classes(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _NAMES_OF_CLASSES)


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
        found = [folder / name for name in _NAMES_OF_CLASSES if (folder / name).is_file()]
        if len(found) > 1 and found[1].name in _READ:
            raise InputError(
                f"{found[0]} and {found[1]} both name the classes. Keep the one that says how to read the masks."
            )
        id2label = found[0] if found else folder / "id2label.json"
        if id2label.name in _PALETTES:
            id2label, palette = None, id2label
        elif id2label.name not in _READ:
            raise InputError(f"{id2label} is not read. Name the classes in {folder / 'id2label.json'} instead.")
    if palette is None:
        return Classes.from_names(id2label, void_labels)
    if id2label is not None or void_labels:
        raise InputError(
            f"{palette}: a palette file cannot be combined with id2label or void_labels, because it names the classes "
            "and the void colours itself. Remove id2label and void_labels."
        )
    return Classes.from_palette(palette)
