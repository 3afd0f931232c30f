"""Load a segmentation data set - built-in, folder, saved or from the Hub - into one shape, checked before training."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from PIL import Image as PILImage
from PIL import ImageOps

from ..errors import InputError, first_line
from . import synthetic
from .fractions import draw_ids

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

IGNORE_INDEX = 255
MAX_CLASSES = 255  # masks are stored with 8 bits, and 255 is void

_MAX_RAW_VALUE = 2**16 - 1
_IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_IMAGE_COLUMNS = ("image", "img", "pixel_values")
_LABEL_COLUMNS = ("labels", "label", "mask", "annotation", "segmentation", "semantic_mask")
_INDEX_MODES = {"1", "L", "P", "I", "I;16"}  # PIL modes whose values are class indices
_FEATURES = Features({"id": Value("string"), "image": Image(), "labels": Image()})


@dataclass(frozen=True)
class SegmentationData:
    """A data set ready for training.

    Attributes:
        train, validation: data sets with the columns `id` (unique string), `image` (a picture) and `labels` (a picture
            of mode L with the size of the image: class indices, 255 where void).
        id2label: class index to name, 0 to C - 1.
        name: what it was loaded from.
    """

    train: Dataset
    validation: Dataset
    id2label: dict[int, str]
    name: str


def load_segmentation_dataset(
    dataset_name: str | None = None,
    *,
    dataset_dir: str | Path | None = None,
    dataset_config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    id2label: str | Path | dict[int, str] | None = None,
    void_labels: Iterable[int] = (),
    validation_share: float = 0.2,
    validation_seed: int = 0,
) -> SegmentationData:
    """Load images and masks, map void values to 255 and check every pair.

    Without a name or folder: the built-in generated street scenes.

    Args:
        dataset_name: a data set on the Hub, or a folder written by `save_to_disk`.
        dataset_dir: a folder `train/images/NAME.jpg`, `train/masks/NAME.png`, the same for `val`, and
            `id2label.json`.
        dataset_config: configuration name of a Hub data set.
        image_column, label_column: names of the columns in a Hub or saved data set; usual names are found.
        id2label: class names, `{0: "sky", ...}` or a JSON file of it; by default `id2label.json` of the folder or of
            the Hub repository.
        void_labels: raw mask values that mean "no label". They become 255 here, once; 255 itself always does.
        validation_share: share of the training images that is cut off where there is no validation split.
        validation_seed: seed of that cut.

    Raises:
        InputError: something is missing or wrong: the message names file, value and remedy. Nothing is trained on
            data that was not checked: every image is decoded, every mask has its image's size and known values.
    """
    void_labels = tuple(void_labels)
    if dataset_name is not None and dataset_dir is not None:
        raise InputError("give dataset_name or dataset_dir, not both")
    if dataset_dir is not None:
        splits, names = _read_folder(Path(dataset_dir)), id2label or Path(dataset_dir) / "id2label.json"
        name = Path(dataset_dir).resolve().name
    elif dataset_name is not None:
        splits = _read_columns(_open_splits(dataset_name, dataset_config), image_column, label_column)
        names, name = id2label or _find_names(dataset_name), dataset_name
    else:
        splits, names = _generate(), dict(enumerate(synthetic.CLASSES))
        name = "built-in street scenes"
    classes = _parse_names(names)
    splits = {split: _check(pairs, len(classes), void_labels) for split, pairs in splits.items()}
    train, validation = splits["train"], splits.get("validation")
    if validation is None:
        train, validation = _cut_validation(train, validation_share, validation_seed)
    return SegmentationData(train, validation, classes, name)


def _generate() -> dict[str, Dataset]:
    columns = {split: zip(*synthetic.generate_split(split), strict=True) for split in synthetic.NUM_IMAGES}
    return {
        split: Dataset.from_dict(dict(zip(_FEATURES, map(list, column), strict=True)), features=_FEATURES)
        for split, column in columns.items()
    }


def _read_folder(folder: Path) -> dict[str, Dataset]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    if not (folder / "train").is_dir():
        raise InputError(f"{folder} has no folder train/ with images/ and masks/ in it")
    splits = {"train": _read_pairs(folder / "train")}
    if (folder / "val").is_dir():
        splits["validation"] = _read_pairs(folder / "val")
    return splits


def _read_pairs(folder: Path) -> Dataset:
    images, masks = (_list_pictures(folder / kind) for kind in ("images", "masks"))
    if not images:
        raise InputError(f"{folder / 'images'} has no images")
    for stem, path in images.items():
        if stem not in masks:
            raise InputError(f"{path} has no mask: {folder / 'masks' / stem}.png is missing")
    for stem, path in masks.items():
        if path.suffix.lower() != ".png":
            raise InputError(f"{path}: masks must be PNG, a lossy format changes their values")
        if stem not in images:
            raise InputError(f"{path} has no image in {folder / 'images'}")
    stems = sorted(images)
    columns = {
        "id": stems,
        "image": [str(images[stem]) for stem in stems],
        "labels": [str(masks[stem]) for stem in stems],
    }
    return Dataset.from_dict(columns, features=_FEATURES)


def _list_pictures(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    pictures: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith("."):
            if path.stem in pictures:
                raise InputError(f"{path} and {pictures[path.stem]} share a name: which one is meant?")
            pictures[path.stem] = path
    return pictures


def _open_splits(dataset_name: str, config: str | None) -> DatasetDict:
    try:
        loaded = load_from_disk(dataset_name) if Path(dataset_name).is_dir() else load_dataset(dataset_name, config)
    except Exception as error:  # datasets raises many types; all of them mean that it cannot be loaded
        raise InputError(f"cannot load the data set {dataset_name!r}: {first_line(error)}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


def _read_columns(splits: DatasetDict, image_column: str | None, label_column: str | None) -> dict[str, Dataset]:
    if "train" not in splits:
        raise InputError(f"the data set has no split 'train', only {sorted(splits)}")
    image_column = _find_column("image_column", image_column, _IMAGE_COLUMNS, splits["train"].features)
    label_column = _find_column("label_column", label_column, _LABEL_COLUMNS, splits["train"].features)
    chosen = {"train": splits["train"]}
    validation = next((name for name in ("validation", "val") if name in splits), None)
    if validation is not None:
        chosen["validation"] = splits[validation]
        for option, column in (("image_column", image_column), ("label_column", label_column)):
            _find_column(option, column, (), splits[validation].features)
    return {name: _rename(split, name, image_column, label_column) for name, split in chosen.items()}


def _find_column(option: str, wanted: str | None, usual: tuple[str, ...], features: Features) -> str:
    candidates = (wanted,) if wanted else usual
    found = [name for name in candidates if isinstance(features.get(name), Image)]
    if not found:
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        raise InputError(f"{option}: no column {' or '.join(map(repr, candidates))} holds images; there are {kinds}")
    return found[0]


def _rename(split: Dataset, name: str, image_column: str, label_column: str) -> Dataset:
    ids = split["id"] if "id" in split.column_names else [f"{name}-{index:06d}" for index in range(len(split))]
    split = split.select_columns([image_column, label_column])
    split = split.rename_columns({image_column: "image", label_column: "labels"})
    return split.add_column("id", [str(identifier) for identifier in ids]).select_columns(list(_FEATURES))


def _find_names(dataset_name: str) -> Path:
    """The class names that travel with a data set: `id2label.json` in its folder or Hub repository."""
    if Path(dataset_name).is_dir():
        return Path(dataset_name) / "id2label.json"
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(dataset_name, "id2label.json", repo_type="dataset"))
    except Exception as error:
        raise InputError(f"{dataset_name} has no id2label.json: give the class names by id2label") from error


def _parse_names(names: str | Path | dict) -> dict[int, str]:
    """Class names as `{0: name, ...}`, from a mapping, or a JSON file of a mapping or a list."""
    source = "id2label" if isinstance(names, dict) else str(names)
    if not isinstance(names, dict):
        try:
            names = json.loads(Path(names).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{source} is missing: it names the classes, like {{'0': 'sky', '1': 'road'}}") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{source} is not readable JSON: {error}") from error
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        classes = {int(key): str(names[key]) for key in names}
    except (TypeError, ValueError):
        raise InputError(f"{source} must map class indices to names, like {{'0': 'sky', '1': 'road'}}") from None
    if sorted(classes) != list(range(len(classes))) or not 2 <= len(classes) <= MAX_CLASSES:
        raise InputError(
            f"{source} must number 2 to {MAX_CLASSES} classes from 0 without a gap, got {sorted(classes)}"
        )
    return dict(sorted(classes.items()))


def _cut_validation(train: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    if not 0.0 < share < 1.0:
        raise InputError(f"validation_share must lie between 0 and 1, got {share}")
    if len(train) < 2:
        raise InputError("there is no validation split, and one training image is too few to cut one off")
    held_out = set(draw_ids(train["id"], share, seed=f"validation/{seed}"))
    inside = [identifier in held_out for identifier in train["id"]]
    if all(inside):
        raise InputError(f"validation_share {share} leaves none of the {len(train)} images for training")
    return tuple(
        train.select([index for index, held in enumerate(inside) if held is wanted]) for wanted in (False, True)
    )


def _lookup_table(num_classes: int, void_labels: tuple[int, ...]) -> np.ndarray:
    """Raw mask value to class index or 255; -1 for values that must not occur, and in the last place."""
    table = np.full(_MAX_RAW_VALUE + 2, -1, dtype=np.int16)
    table[:num_classes] = np.arange(num_classes)
    for value in (*void_labels, IGNORE_INDEX):
        if not 0 <= value <= _MAX_RAW_VALUE:
            raise InputError(f"void_labels: {value} is not a value a mask can have (0..{_MAX_RAW_VALUE})")
        table[value] = IGNORE_INDEX
    return table


def _check(split: Dataset, num_classes: int, void_labels: tuple[int, ...]) -> Dataset:
    """Decode every picture once, and store the masks as class indices."""
    if len(split) == 0:
        raise InputError("a split of the data set is empty")
    lookup = _lookup_table(num_classes, void_labels)
    raw = split.cast_column("image", Image(decode=False)).cast_column("labels", Image(decode=False))
    labels = raw.map(
        lambda example: {"labels": _check_pair(example, lookup, num_classes)},
        features=Features({"labels": Image(decode=False)}),
        remove_columns=raw.column_names,
        keep_in_memory=True,  # nothing is written into the user's folder
        desc="Checking images and masks",
    )
    # The images stay where they are: only the masks are stored anew.
    labels = labels.cast_column("labels", Image())
    return concatenate_datasets([split.remove_columns("labels"), labels], axis=1).select_columns(list(_FEATURES))


def _check_pair(example: dict, lookup: np.ndarray, num_classes: int) -> dict:
    """The PNG bytes of a mask of class indices, after checking that image and mask fit each other."""
    image, image_name = _decode(example, "image")
    mask, mask_name = _decode(example, "labels")
    if mask.mode not in _INDEX_MODES:
        raise InputError(f"{mask_name}: a mask must hold one class index per pixel, this one has mode {mask.mode}")
    if mask.size != image.size:
        raise InputError(
            f"{mask_name}: the mask has {_size(mask)} pixels, its image {image_name} {_size(image)}: they must agree"
        )
    values = np.asarray(mask)
    possible = (values >= 0) & (values <= _MAX_RAW_VALUE)
    known = lookup[np.where(possible, values, -1)]
    if known.min(initial=0) < 0:
        unknown = int(values[known < 0].flat[0])
        raise InputError(
            f"{mask_name}: value {unknown} is not a class (0..{num_classes - 1}) and not void: "
            f"give it in void_labels, or name it in id2label"
        )
    buffer = io.BytesIO()
    PILImage.fromarray(known.astype(np.uint8)).save(buffer, format="png", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def _decode(example: dict, column: str) -> tuple[Picture, str]:
    encoded = example[column]
    name = encoded["path"] or f"{column} of {example['id']}"
    try:
        picture = PILImage.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else encoded["path"])
        picture.load()
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        raise InputError(f"{name} is not a readable image: {error}") from error
    return ImageOps.exif_transpose(picture), name


def _size(picture: Picture) -> str:
    return f"{picture.width}x{picture.height}"
