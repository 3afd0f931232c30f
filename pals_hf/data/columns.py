"""Data sets with columns - Hub, `save_to_disk` or Parquet - and their streams: open, find the columns, rename them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset, load_from_disk

from ..errors import InputError, first_line
from .checking import fingerprint_of_files
from .layouts import SPLITS

FEATURES = Features({"id": Value("string"), "image": Image(), "labels": Image()})

_IMAGE_COLUMNS = ("image", "img", "pixel_values")
_LABEL_COLUMNS = ("labels", "label", "mask", "annotation", "segmentation", "semantic_mask")
_SHARDS = 64  # of a stream from local files, for the workers to share


def open_splits(
    name: str, config: str | None, streaming: bool
) -> tuple[dict[str, Dataset | IterableDataset], tuple[str, ...]]:
    """Open the `train` split and, if available, the `validation` split, with known features.

    Returns:
        The splits, and sentences about splits that are not used.

    Raises:
        InputError: the data set cannot be loaded, or has no `train` split.
    """
    path = Path(name)
    try:
        if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
            loaded = load_from_disk(name)
        elif path.is_file():
            loaded = load_dataset("parquet", data_files={"train": name}, streaming=streaming)
        else:
            loaded = load_dataset(name, config, streaming=streaming)
    except Exception as error:  # datasets raises many types, and all of them mean that loading failed
        raise InputError(f"the data set {name!r} cannot be loaded: {first_line(error)}") from error
    if not isinstance(loaded, dict):
        return {"train": _with_features(loaded)}, ()
    chosen = {
        split: next((found for usual in SPLITS[split] for found in loaded if found.lower() == usual), None)
        for split in ("train", "validation")
    }
    if chosen["train"] is None:
        raise InputError(f"the data set {name!r} has no split 'train'. Its splits are {sorted(loaded)}.")
    notes = tuple(
        f"the split {split!r} of {name} is not used. Images are scored on the split 'validation' (or 'val', 'valid', "
        "'dev', 'eval')."
        for split in loaded
        if split not in chosen.values()
    )
    splits = {split: _with_features(loaded[found]) for split, found in chosen.items() if found is not None}
    return splits, notes


def _with_features(split: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Read the first rows of a stream whose features are unknown."""
    return split if split.features is not None else split._resolve_features()


def find_columns(
    splits: dict[str, Dataset | IterableDataset], image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Return the names of the image and the mask column, which every split must have.

    Raises:
        InputError: a split lacks the column, or the column does not hold images.
    """
    features = splits["train"].features
    columns = {
        "image_column": _find_column("image_column", image_column, _IMAGE_COLUMNS, features),
        "label_column": _find_column("label_column", label_column, _LABEL_COLUMNS, features),
    }
    if "validation" in splits:
        for option, column in columns.items():
            _find_column(option, column, (), splits["validation"].features)
    return columns["image_column"], columns["label_column"]


def _find_column(option: str, wanted: str | None, usual: tuple[str, ...], features: Features) -> str:
    candidates = (wanted,) if wanted else usual
    found = [name for name in candidates if _holds_images(features.get(name))]
    if not found:
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        names = " or ".join(map(repr, candidates))
        raise InputError(f"{option}: no column named {names} holds images. Choose an image column from {kinds}.")
    return found[0]


def _holds_images(feature: object) -> bool:
    """Recognise an `Image`, or its form in Parquet files of other writers: encoded bytes, alone or beside a path."""
    if isinstance(feature, Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature)


def fingerprint_of_split(split: Dataset) -> str:
    """Return a string that changes when a split or one of its cache files changes.

    The fingerprint of `datasets` alone is not enough: it may cover only the paths of the images.
    """
    return f"{split._fingerprint} {fingerprint_of_files([file['filename'] for file in split.cache_files])}"


def rename_columns(split: Dataset | IterableDataset, name: str, image_column: str, label_column: str):
    """Return the split with the columns `id`, `image` and `labels` only.

    Ids that a split lacks are made from `name` and the row number, or in a stream from the image's contents.
    """
    if isinstance(split, IterableDataset):
        return _rename_columns_of_stream(split, name, image_column, label_column)
    ids = split["id"] if "id" in split.column_names else [f"{name}-{index:06d}" for index in range(len(split))]
    split = split.select_columns([image_column, label_column])
    split = split.rename_columns({image_column: "image", label_column: "labels"})
    split = split.cast_column("image", Image()).cast_column("labels", Image())
    return split.add_column("id", [str(identifier) for identifier in ids]).select_columns(list(FEATURES))


def _rename_columns_of_stream(
    split: IterableDataset, name: str, image_column: str, label_column: str
) -> IterableDataset:
    split = _without_decoding(split, image_column, label_column)

    def rename(row: dict) -> dict:
        picture = row[image_column]
        # The row number would differ between workers, the contents do not.
        content = picture["bytes"] if picture["bytes"] is not None else picture["path"].encode()
        identifier = str(row["id"]) if "id" in row else f"{name}-{hashlib.sha256(content).hexdigest()[:16]}"
        return {"id": identifier, "image": row[image_column], "labels": row[label_column]}

    encoded = Features({"id": Value("string"), "image": Image(decode=False), "labels": Image(decode=False)})
    surplus = [column for column in split.features if column not in encoded]
    return split.map(rename, remove_columns=surplus, features=encoded)


def to_stream(split: Dataset | IterableDataset) -> IterableDataset:
    """Return a split as a stream of encoded images and masks."""
    if not isinstance(split, Dataset):
        return split
    return _without_decoding(split, "image", "labels").to_iterable_dataset(num_shards=min(len(split), _SHARDS))


def _without_decoding(split, image_column: str, label_column: str):
    return split.cast_column(image_column, Image(decode=False)).cast_column(label_column, Image(decode=False))
