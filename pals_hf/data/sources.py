"""Load a segmentation data set - built-in, folder, saved, Parquet or from the Hub - into one shape, checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import (
    Dataset,
    Features,
    Image,
    IterableDataset,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from httpx2 import HTTPError

from ..errors import InputError, first_line
from . import synthetic
from .checking import check_split, fingerprint_of_files
from .classes import Classes, Color
from .fractions import draw_ids, order_ids
from .layouts import read_layout, to_columns

_IMAGE_COLUMNS = ("image", "img", "pixel_values")
_LABEL_COLUMNS = ("labels", "label", "mask", "annotation", "segmentation", "semantic_mask")
_SHARDS = 64  # of a stream from local files: what workers can share
_FEATURES = Features({"id": Value("string"), "image": Image(), "labels": Image()})


@dataclass(frozen=True)
class SegmentationData:
    """A data set ready for training.

    Attributes:
        train, validation: data sets with the columns `id` (unique string), `image` (a picture), `labels` (a picture
            of mode L with the size of the image: class indices, 255 where void), `class_pixels` (its pixels of each
            class, void last), `image_sha256` and `labels_sha256`.
        id2label: class index to name, 0 to C - 1.
        name: what it was loaded from.
        test: images without masks, to predict: columns `id` and `image`; None where there are none.
        colors: the data set's own colour of each class, or None.
        license: its terms, where known.
        revision: the commit of the Hub's repository `name` that it was loaded from; None for what is not on the Hub.
        skipped: what was wrong with the images that `skip_bad_samples` left out, by id.
    """

    train: Dataset
    validation: Dataset
    id2label: dict[int, str]
    name: str
    test: Dataset | None = None
    colors: tuple[Color, ...] | None = None
    license: str | None = None
    revision: str | None = None
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source:
    """What a data set is before its masks are looked at. `fingerprints` stand for the contents of its splits.

    `has_ids`: its images have names of their own, not only places.
    """

    name: str
    splits: dict[str, Dataset]
    classes: Classes
    fingerprints: dict[str, str] = field(default_factory=dict)
    revision: str | None = None
    has_ids: bool = True


def load_segmentation_dataset(
    dataset_name: str | None = None,
    *,
    dataset_dir: str | Path | None = None,
    dataset_config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    id2label: str | Path | dict[int, str] | None = None,
    palette: str | Path | None = None,
    void_labels: Iterable[int] = (),
    validation_share: float = 0.2,
    validation_seed: int = 0,
    num_folds: int | None = None,
    fold: int = 0,
    skip_bad_samples: bool = False,
    num_proc: int | None = None,
) -> SegmentationData:
    """Load images and masks, map void values to 255 and check every pair.

    Without a name or folder: the built-in generated street scenes.

    Args:
        dataset_name: a data set on the Hub, a folder written by `save_to_disk`, a Parquet file or a folder of them.
        dataset_dir: a folder: Cityscapes, Pascal VOC2012, ADE20K or CamVid as downloaded, or images and masks of
            matching names and `id2label.json`, see [`layouts.read_folder`].
        dataset_config: configuration name of a Hub data set.
        image_column, label_column: names of the columns in a Hub, saved or Parquet data set; usual names are found.
        id2label: class names, `{0: "sky", ...}` or a JSON file of it; by default `id2label.json` of the folder or of
            the Hub repository, else those of the known data set.
        palette: a file of class names and colours, for masks that hold colours; see [`Classes.from_palette`].
            By default `palette.json` of the folder, if there is one.
        void_labels: raw mask values that mean "no label". They become 255 here, once; 255 itself always does.
        validation_share: share of the training images that is cut off where there is no validation split.
        validation_seed: seed of that cut, and of the folds.
        num_folds: cross-validation: all images with masks but those of a test split are cut into so many folds, of
            which `fold` is the validation split. Where both splits have an id, all begin with `train/` or
            `validation/`.
        fold: 0 to `num_folds - 1`.
        skip_bad_samples: leave out what is wrong and list it in `skipped`, instead of raising.
        num_proc: processes that check.

    Raises:
        InputError: something is missing or wrong: the message names file, value and remedy. Nothing is trained on
            data that was not checked: every image is decoded, every mask has its image's size and known values, no
            validation image is also a training image, and the training images have labels of two classes at least.
    """
    names = (id2label, palette, tuple(void_labels))
    source = _find_source(dataset_name, dataset_dir, dataset_config, (image_column, label_column), names)
    test = source.splits.get("test")
    splits, problems = {}, {}
    for split in ("train", "validation"):
        if split in source.splits:
            splits[split], found = check_split(
                source.splits[split],
                source.classes,
                fingerprint=source.fingerprints.get(split),
                num_proc=num_proc,
            )
            problems |= {f"{split}/{id}": problem for id, problem in found.items()}
    if not skip_bad_samples:
        _raise_first(problems)
    train, validation = splits["train"], splits.get("validation")
    if num_folds is not None:
        train, validation = _cut_fold(train, validation, num_folds, fold, validation_seed)
    elif validation is None:
        train, validation = cut_validation(train, validation_share, validation_seed)
    train, leaked = _without_leaks(train, validation)
    if not skip_bad_samples:
        _raise_first(leaked)
    _check_labels(train, source.classes)
    if len(validation) == 0:
        raise InputError("the validation split is empty")
    return SegmentationData(
        train,
        validation,
        source.classes.id2label,
        source.name,
        test=None if test is None else test.select_columns(["id", "image"]),
        colors=source.classes.colors,
        license=source.classes.license,
        revision=source.revision,
        skipped=problems | leaked,
    )


@dataclass(frozen=True)
class SegmentationStream:
    """A data set that is read as it comes, for [`StreamedDataset`].

    Attributes:
        train, validation: streams of the columns `id`, and `image` and `labels`, encoded and not looked at yet.
        classes: what the masks mean.
        name: where it comes from.
        revision: as in [`SegmentationData`].
        has_ids: whether the images have ids of their own, that the data set has too when it is not streamed.
    """

    train: IterableDataset
    validation: IterableDataset
    classes: Classes
    name: str
    revision: str | None = None
    has_ids: bool = True

    @property
    def id2label(self) -> dict[int, str]:
        return self.classes.id2label

    @property
    def colors(self) -> tuple[Color, ...] | None:
        return self.classes.colors

    @property
    def license(self) -> str | None:
        return self.classes.license


def stream_segmentation_dataset(
    dataset_name: str | None = None,
    *,
    dataset_dir: str | Path | None = None,
    dataset_config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    id2label: str | Path | dict[int, str] | None = None,
    palette: str | Path | None = None,
    void_labels: Iterable[int] = (),
) -> SegmentationStream:
    """Open a data set that does not fit on the disk, or is too large to look at beforehand.

    Args:
        dataset_name, ...: as in [`load_segmentation_dataset`].

    Raises:
        InputError: something is missing; or there is no validation split, which cannot be cut off a stream.
    """
    names = (id2label, palette, tuple(void_labels))
    columns = (image_column, label_column)
    source = _find_source(dataset_name, dataset_dir, dataset_config, columns, names, streaming=True)
    if "validation" not in source.splits:
        raise InputError(f"{source.name} has no validation split, and none can be cut off a stream")
    streams = {split: _as_stream(source.splits[split]) for split in ("train", "validation")}
    return SegmentationStream(
        **streams,
        classes=source.classes,
        name=source.name,
        revision=source.revision,
        has_ids=source.has_ids,
    )


def _as_stream(split: Dataset | IterableDataset) -> IterableDataset:
    if not isinstance(split, Dataset):
        return split
    return _encoded(split).to_iterable_dataset(num_shards=min(len(split), _SHARDS))


# ---- Where it comes from ----


def _find_source(dataset_name, dataset_dir, dataset_config, columns, names, streaming: bool = False) -> _Source:
    if dataset_name is not None and dataset_dir is not None:
        raise InputError("give dataset_name or dataset_dir, not both")
    if dataset_dir is not None:
        return _read_folder(Path(dataset_dir), *names)
    if dataset_name is not None:
        return _read_columns(dataset_name, dataset_config, columns, *names, streaming=streaming)
    id2label, _, void_labels = names
    classes = Classes.from_names(id2label or dict(enumerate(synthetic.CLASSES)), void_labels)
    return _Source("built-in street scenes", _generate(), classes)


def _generate() -> dict[str, Dataset]:
    columns = {split: zip(*synthetic.generate_split(split), strict=True) for split in synthetic.NUM_IMAGES}
    return {
        split: Dataset.from_dict(dict(zip(_FEATURES, map(list, column), strict=True)), features=_FEATURES)
        for split, column in columns.items()
    }


def _read_folder(folder: Path, id2label, palette, void_labels: tuple[int, ...]) -> _Source:
    layout = read_layout(folder)
    splits, fingerprints = {}, {}
    for split, records in layout.splits.items():
        columns = to_columns(records)
        splits[split] = Dataset.from_dict(columns, features=_FEATURES)
        if split != "test":
            fingerprints[split] = fingerprint_of_files([*columns["image"], *columns["labels"]])
    # Other data is often kept in the structure of a known data set, and then names its classes.
    is_own = any((folder / name).is_file() for name in ("palette.json", "id2label.json"))
    if palette is None and id2label is None and layout.catalog_name is not None and not is_own:
        classes = Classes.known(layout.catalog_name, void_labels)
    else:
        classes = _classes(id2label, palette, folder, void_labels)
    return _Source(folder.resolve().name if is_own else layout.name, splits, classes, fingerprints)


def _classes(id2label, palette, folder: Path, void_labels: tuple[int, ...]) -> Classes:
    """From what was given, else from the files that lie in the folder."""
    if palette is None and id2label is None and (folder / "palette.json").is_file():
        palette = folder / "palette.json"
    if palette is None:
        return Classes.from_names(id2label or folder / "id2label.json", void_labels)
    if id2label is not None or void_labels:
        raise InputError(
            "a palette file names the classes and the void colour: give it without id2label or void_labels"
        )
    return Classes.from_palette(palette)


def _read_columns(
    name: str, config: str | None, columns: tuple[str | None, str | None], id2label, palette, void_labels, streaming
) -> _Source:
    loaded = _open_splits(name, config, streaming)
    if "train" not in loaded:
        raise InputError(f"the data set has no split 'train', only {sorted(loaded)}")
    features = _features_of(loaded["train"])
    image_column = _find_column("image_column", columns[0], _IMAGE_COLUMNS, features)
    label_column = _find_column("label_column", columns[1], _LABEL_COLUMNS, features)
    chosen = {"train": loaded["train"]}
    validation = next((split for split in ("validation", "val") if split in loaded), None)
    if validation is not None:
        chosen["validation"] = loaded[validation]
        for option, column in (("image_column", image_column), ("label_column", label_column)):
            _find_column(option, column, (), _features_of(loaded[validation]))
    is_folder = Path(name).is_dir()
    folder = Path(name) if is_folder else Path(name).parent if Path(name).is_file() else None
    license, revision = loaded["train"].info.license or None, None
    if folder is None:
        license, revision = license or _license_on_hub(name), _revision_on_hub(name, loaded["train"])
        if id2label is None and palette is None:
            id2label = _names_on_hub(name)
    return _Source(
        name if folder is None else Path(name).resolve().name,  # the way there is nobody's business
        {split: _rename(dataset, split, image_column, label_column) for split, dataset in chosen.items()},
        replace(_classes(id2label, palette, folder or Path(), void_labels), license=license),
        {} if streaming else {s: f"{_fingerprint(part)} {image_column} {label_column}" for s, part in chosen.items()},
        revision,
        has_ids="id" in features,
    )


def _fingerprint(split: Dataset) -> str:
    """What `datasets` knows of it, which for pictures may be their paths only, and the state of the files it is in."""
    return f"{split._fingerprint} {fingerprint_of_files([file['filename'] for file in split.cache_files])}"


def _open_splits(name: str, config: str | None, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    path = Path(name)
    try:
        if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
            loaded = load_from_disk(name)
        elif path.is_file():
            loaded = load_dataset("parquet", data_files={"train": name}, streaming=streaming)
        else:
            loaded = load_dataset(name, config, streaming=streaming)
    except Exception as error:  # datasets raises many types; all of them mean that it cannot be loaded
        raise InputError(f"cannot load the data set {name!r}: {first_line(error)}") from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _find_column(option: str, wanted: str | None, usual: tuple[str, ...], features: Features) -> str:
    candidates = (wanted,) if wanted else usual
    found = [name for name in candidates if _holds_pictures(features.get(name))]
    if not found:
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        raise InputError(f"{option}: no column {' or '.join(map(repr, candidates))} holds images; there are {kinds}")
    return found[0]


def _holds_pictures(feature: object) -> bool:
    """An `Image`, or what one is in a Parquet file of another writer: encoded bytes, alone or beside a path."""
    if isinstance(feature, Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature)


def _encoded(split, image_column: str = "image", label_column: str = "labels"):
    """The split with pictures as bytes or paths, not decoded."""
    return split.cast_column(image_column, Image(decode=False)).cast_column(label_column, Image(decode=False))


def _features_of(split: Dataset | IterableDataset) -> Features:
    return split.features if split.features is not None else split._resolve_features().features


def _rename(split: Dataset | IterableDataset, name: str, image_column: str, label_column: str):
    if isinstance(split, IterableDataset):
        return _rename_stream(split, name, image_column, label_column)
    ids = split["id"] if "id" in split.column_names else [f"{name}-{index:06d}" for index in range(len(split))]
    split = split.select_columns([image_column, label_column])
    split = split.rename_columns({image_column: "image", label_column: "labels"})
    split = split.cast_column("image", Image()).cast_column("labels", Image())
    return split.add_column("id", [str(identifier) for identifier in ids]).select_columns(list(_FEATURES))


def _rename_stream(split: IterableDataset, name: str, image_column: str, label_column: str) -> IterableDataset:
    split = _encoded(split, image_column, label_column)

    def rename(row: dict) -> dict:
        picture = row[image_column]
        # A place in the stream would be another one in each worker; contents are not.
        content = picture["bytes"] if picture["bytes"] is not None else picture["path"].encode()
        identifier = str(row["id"]) if "id" in row else f"{name}-{hashlib.sha256(content).hexdigest()[:16]}"
        return {"id": identifier, "image": row[image_column], "labels": row[label_column]}

    encoded = Features({"id": Value("string"), "image": Image(decode=False), "labels": Image(decode=False)})
    surplus = [column for column in _features_of(split) if column not in encoded]
    return split.map(rename, remove_columns=surplus, features=encoded)


def _names_on_hub(dataset_name: str) -> Path:
    """The class names that travel with a data set on the Hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(dataset_name, "id2label.json", repo_type="dataset"))
    except Exception as error:  # the client has no base of its own for them
        is_missing = isinstance(error, RemoteEntryNotFoundError)
        why = "has no id2label.json" if is_missing else f"gives no id2label.json ({first_line(error)})"
        raise InputError(f"{dataset_name} {why}: give the class names by id2label") from error


def _license_on_hub(dataset_name: str) -> str | None:
    """The licence that a data set's card on the Hub names."""
    from huggingface_hub import DatasetCard

    try:
        return DatasetCard.load(dataset_name).data.get("license")
    except (OSError, ValueError):  # no card, or not to be had offline
        return None


def _revision_on_hub(dataset_name: str, split: Dataset | IterableDataset) -> str | None:
    """The commit that was loaded: in the cache it names the folder of the data set; of a stream it is the newest."""
    from huggingface_hub import HfApi

    if isinstance(split, IterableDataset):
        try:
            return HfApi().dataset_info(dataset_name).sha
        except (HTTPError, OSError):  # the data came, but the Hub does not say which
            return None
    folders = [Path(file["filename"]).parent.name for file in split.cache_files]
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), None)


# ---- What is cut off and refused ----


def _raise_first(problems: dict[str, str]) -> None:
    if problems:
        first, *others = problems.values()
        more = f" (and {len(others)} more)" if others else ""
        raise InputError(f"{first}{more}; skip_bad_samples leaves such images out")


def _without_leaks(train: Dataset, validation: Dataset) -> tuple[Dataset, dict[str, str]]:
    """The training images that are not in the validation split too, by their contents, and a word on the others."""
    scored = dict(zip(validation["image_sha256"], validation["id"], strict=True))
    leaked = {
        f"train/{id}": f"training image {id!r} is also validation image {scored[content]!r}: its score would be memory"
        for id, content in zip(train["id"], train["image_sha256"], strict=True)
        if content in scored
    }
    if leaked:
        train = train.select([index for index, id in enumerate(train["id"]) if f"train/{id}" not in leaked])
    return train, leaked


def cut_validation(train: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """What is left for training, and a share of the images to score, drawn by seed."""
    if not 0.0 < share < 1.0:
        raise InputError(f"the share to hold out must lie between 0 and 1, got {share}")
    if len(train) < 2:
        raise InputError("one training image is too few to hold some out for validation")
    held_out = set(draw_ids(train["id"], share, seed=f"validation/{seed}"))
    if len(held_out) == len(train):
        raise InputError(f"holding out {share} leaves none of the {len(train)} images for training")
    return _part(train, held_out)


def cut_matching(train: Dataset, pattern: str) -> tuple[Dataset, Dataset]:
    """What is left for training, and the images to score: those whose id has a match of a regular expression."""
    try:
        held_out = {id for id in train["id"] if re.search(pattern, id)}
    except re.error as error:
        raise InputError(f"{pattern!r} is no regular expression: {error}") from error
    if not 0 < len(held_out) < len(train):
        raise InputError(
            f"{pattern!r} matches {len(held_out)} of the {len(train)} training images, whose ids are like "
            f"{train['id'][0]!r}: some must be held out, and some must be left"
        )
    return _part(train, held_out)


def _cut_fold(train: Dataset, validation: Dataset | None, num_folds: int, fold: int, seed: int):
    if validation is not None:
        if not set(train["id"]).isdisjoint(validation["id"]):
            train, validation = _prefix_ids(train, "train"), _prefix_ids(validation, "validation")
        train = concatenate_datasets([train, validation])
    if not 2 <= num_folds <= len(train):
        raise InputError(f"num_folds must lie between 2 and the {len(train)} images, got {num_folds}")
    if not 0 <= fold < num_folds:
        raise InputError(f"fold must lie between 0 and {num_folds - 1}, got {fold}")
    return _part(train, set(order_ids(train["id"], f"folds/{seed}")[fold::num_folds]))


def _prefix_ids(split: Dataset, name: str) -> Dataset:
    """The split with ids that no other split has: those from folders are paths below it."""
    ids = Dataset.from_dict({"id": [f"{name}/{id}" for id in split["id"]]})
    return concatenate_datasets([ids, split.remove_columns("id")], axis=1)


def hold_out(
    data: SegmentationData,
    *,
    share: float | None = None,
    pattern: str | None = None,
    seed: int = 0,
    skip_bad_samples: bool = False,
) -> SegmentationData:
    """The data with some of its training images in the place of the validation split, to choose settings by.

    Args:
        data: as [`load_segmentation_dataset`] gives it.
        share, pattern: give one: the share of the images, or a regular expression that their ids match.
        seed: of the share.
        skip_bad_samples: leave out training images that are also held out, instead of raising.

    Raises:
        InputError: none would be held out, or none left, or an image is on both sides.
    """
    train, held_out = cut_validation(data.train, share, seed) if pattern is None else cut_matching(data.train, pattern)
    train, leaked = _without_leaks(train, held_out)
    if not skip_bad_samples:
        _raise_first(leaked)
    return replace(data, train=train, validation=held_out, skipped=data.skipped | leaked)


def _part(dataset: Dataset, held_out: set[str]) -> tuple[Dataset, Dataset]:
    """What is not held out, and what is."""
    return tuple(
        dataset.select([index for index, id in enumerate(dataset["id"]) if (id in held_out) is wanted])
        for wanted in (False, True)
    )


def _check_labels(train: Dataset, classes: Classes) -> None:
    """A network learns nothing from one class."""
    if len(train) == 0:
        raise InputError("the training split is empty")
    *pixels, void = np.sum(train["class_pixels"], axis=0)
    present = [name for name, count in zip(classes.names, pixels, strict=True) if count]
    if len(present) < 2:
        what = f"every labelled pixel is {present[0]!r}" if present else "no pixel is labelled"
        hint = "is void_labels right?"
        if void and not classes.by_color:
            hint += (
                " 255 is always void: where it is a class, give a palette file, which names values by their colours"
            )
        raise InputError(f"{what} in the {len(train)} training images: {hint}")
