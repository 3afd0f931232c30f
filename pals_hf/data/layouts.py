"""Folders of images and masks: recognise the layout of a folder, and list its pairs as (id, image, mask)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError

_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_SPLITS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
_IMAGE_FOLDERS = ("images", "imgs", "image", "img")
_MASK_FOLDERS = ("masks", "labels", "annotations", "mask")
_MASK_ENDINGS = ("", "_mask", "_label", "_labels", "_gt", "_L")  # after the image's name


class Record(NamedTuple):
    """One image of a data set; `labels` is None in a test split."""

    id: str
    image: Path
    labels: Path | None


@dataclass(frozen=True)
class Layout:
    """The contents of a folder.

    Attributes:
        name: name of the data set.
        splits: the records of `train`, and if available of `validation` and `test` (which has no masks).
        catalog_name: catalog entry with the class names, or None.
    """

    name: str
    splits: dict[str, list[Record]]
    catalog_name: str | None = None


def read_layout(root: str | Path) -> Layout:
    """Recognise the layout of a folder and list its images.

    Known layouts are Cityscapes, Pascal VOC2012, ADE20K and CamVid (in SegNet's split) as downloaded. Any other folder
    must hold images and masks of matching names, see [`read_folder`].

    Raises:
        InputError: the folder does not exist, or an image, a mask or a list is missing or does not match.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder")
    for read, places, signature in _KNOWN:
        for place in places:
            if all((root / place / part).is_dir() for part in signature):
                return read(root / place)
    return read_folder(root)


# ---- Known data sets ----


def read_cityscapes(root: Path) -> Layout:
    """Read `leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` and `gtFine/SPLIT/CITY/*_gtFine_labelIds.png`."""
    splits = {}
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        folder = root / "leftImg8bit" / name
        if not folder.is_dir():
            continue
        records = []
        for city_and_stem, image in _files_below(folder, ("_leftImg8bit.png",)).items():
            stem = city_and_stem.removesuffix("_leftImg8bit")
            mask = root / "gtFine" / name / f"{stem}_gtFine_labelIds.png"
            records.append(Record(stem, image, None if split == "test" else _existing(mask, image)))
        splits[split] = records
    return Layout("Cityscapes", _with_train(splits, root / "leftImg8bit" / "train"), "cityscapes")


def read_voc2012(root: Path) -> Layout:
    """Read `JPEGImages/ID.jpg`, `SegmentationClass/ID.png`, `ImageSets/Segmentation/{train,val,test}.txt`.

    If the SBD-augmented `trainaug.txt` and `SegmentationClassAug` exist, they are the training split.
    """
    lists, name = root / "ImageSets" / "Segmentation", "Pascal VOC2012"
    masks, augmented = root / "SegmentationClass", root / "SegmentationClassAug"
    chosen = {"train": lists / "train.txt", "validation": lists / "val.txt", "test": lists / "test.txt"}
    if (lists / "trainaug.txt").is_file() and augmented.is_dir():
        chosen["train"], name = lists / "trainaug.txt", f"{name} (trainaug)"
    splits = {}
    for split, path in chosen.items():
        if not path.is_file():
            continue
        records = []
        for identifier in _read_ids(path):
            image = _existing(_below(root / "JPEGImages", f"{identifier}.jpg", path), path)
            mask = _below(masks, f"{identifier}.png", path)
            if split == "train" and chosen["train"].name == "trainaug.txt":
                with_sbd = _below(augmented, f"{identifier}.png", path)
                mask = with_sbd if with_sbd.is_file() else mask
            records.append(Record(identifier, image, None if split == "test" else _existing(mask, image)))
        splits[split] = records
    return Layout(name, _with_train(splits, lists / "train.txt"), "voc2012")


def read_ade20k(root: Path) -> Layout:
    """Read `images/{training,validation}/*.jpg` and `annotations/{training,validation}/*.png`."""
    layout = read_folder(root)
    return Layout("ADE20K", layout.splits, "ade20k")


def read_camvid(root: Path) -> Layout:
    """Read `train/*.png` and `trainannot/*.png`, and the same for `val` and `test`: CamVid in SegNet's split."""
    splits = {}
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        if (root / name).is_dir():
            masks = None if split == "test" else root / f"{name}annot"
            splits[split] = _pair(root / name, masks)
    return Layout("CamVid", splits, "camvid")


_KNOWN: list[tuple[Callable[[Path], Layout], tuple[str, ...], tuple[str, ...]]] = [
    (read_cityscapes, (".",), ("leftImg8bit", "gtFine")),
    (read_voc2012, (".", "VOC2012", "VOCdevkit/VOC2012"), ("JPEGImages", "SegmentationClass")),
    (read_ade20k, (".", "ADEChallengeData2016"), ("images/training", "annotations/training")),
    (read_camvid, (".", "CamVid"), ("train", "trainannot")),
]


# ---- Any folder ----


def read_folder(root: Path) -> Layout:
    """Read images and masks of matching names.

    The folders are `SPLIT/images` and `SPLIT/masks`, or `images/SPLIT` and `masks/SPLIT`, or `images` and `masks`
    without splits. Other common names (`labels`, `annotations`, `imgs`, `valid`, `testing`, ...) work, too. Folders
    may be nested. A mask has the path and name of its image, optionally followed by `_mask`, `_label`, `_labels`,
    `_gt` or `_L`, and any suffix. Masks of a `test` split are not read.
    """
    splits = {}
    for split, names in _SPLITS.items():
        found = next((pair for name in names if (pair := _find_pair(root, name)) is not None), None)
        if found is not None:
            splits[split] = _pair(found[0], None if split == "test" else found[1])
    if "train" not in splits and (flat := _find_pair(root, "")) is not None:
        splits["train"] = _pair(*flat)
    if "train" not in splits:
        raise InputError(
            f"{root} has no images. It must contain train/images and train/masks, images/train and masks/train, or "
            "images and masks."
        )
    return Layout(root.resolve().name, splits)


def _find_pair(root: Path, split: str) -> tuple[Path, Path] | None:
    """Return the folders of a split's images and masks. The folder of masks may not exist."""
    for images in _IMAGE_FOLDERS:
        for folder, other in (((root / split / images), (root / split)), (root / images / split, None)):
            if folder.is_dir():
                places = [(other / m) if other is not None else (root / m / split) for m in _MASK_FOLDERS]
                return folder, next((place for place in places if place.is_dir()), places[0])
    return None


def _pair(images: Path, masks: Path | None) -> list[Record]:
    """Match the images and masks of two folders. Every image must have a mask, and every mask an image."""
    pictures = _files_below(images)
    if not pictures:
        raise InputError(f"{images} has no images")
    if masks is None:
        return [Record(name, path, None) for name, path in pictures.items()]
    if not masks.is_dir():
        raise InputError(f"{masks} is not a folder. It must contain the masks of {images}.")
    candidates = _files_below(masks)
    records = []
    for name, image in pictures.items():
        found = next((name + ending for ending in _MASK_ENDINGS if name + ending in candidates), None)
        if found is None:
            raise InputError(f"{image} has no mask. Add {masks / name}.png.")
        records.append(Record(name, image, candidates.pop(found)))
    for path in candidates.values():
        raise InputError(f"{path} has no image in {images}. Add the image, or remove the mask.")
    for record in records:
        if record.labels.suffix.lower() in (".jpg", ".jpeg"):
            raise InputError(
                f"{record.labels}: a mask must not be a JPEG, because that format changes its values. Save it as PNG."
            )
    return records


def _files_below(folder: Path, endings: tuple[str, ...] = _IMAGE_SUFFIXES) -> dict[str, Path]:
    """List the images in a folder and its subfolders by their path without suffix, sorted."""
    found: dict[str, Path] = {}
    for place, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(place, name)
            if name.startswith(".") or not name.lower().endswith(tuple(ending.lower() for ending in endings)):
                continue
            key = path.relative_to(folder).with_suffix("").as_posix()
            if key in found:
                raise InputError(f"{path} and {found[key]} have the same name. Rename or remove one of them.")
            found[key] = path
    return dict(sorted(found.items()))


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def _read_ids(path: Path) -> list[str]:
    try:
        return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _below(folder: Path, name: str, source: Path) -> Path:
    """Return the path of a name that a list file contains, which must be inside the folder."""
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise InputError(f"{source}: {name!r} is outside of {folder}. Remove the line.")
    return path


def _existing(path: Path, wanted_by: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path} is missing, but {wanted_by} needs it")
    return path


def _with_train(splits: dict[str, list[Record]], place: Path) -> dict[str, list[Record]]:
    if not splits.get("train"):
        raise InputError(f"{place} is missing or empty, so there are no training images")
    return {name: records for name, records in splits.items() if records}


def to_columns(records: Iterable[Record]) -> dict[str, list[str | None]]:
    """Return records as the columns `id`, `image` and `labels`, the latter two with paths."""
    ids, images, labels = zip(*records, strict=True)
    return {
        "id": list(ids),
        "image": [str(path) for path in images],
        "labels": [None if path is None else str(path) for path in labels],
    }
