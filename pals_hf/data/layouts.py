"""Folders of images and masks: recognise the layout of a folder, and list its pairs as (id, image, mask)."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import read_lines, walk

_IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm")
_IMAGE_SUFFIXES += (".tif", ".tiff", ".webp")
# Pictures and arrays that are not read. Other files, like lists and notes, are no part of the data.
_OTHER_SUFFIXES = (".avif", ".czi", ".dcm", ".dng", ".eps", ".exr", ".h5", ".hdr", ".heic", ".heif", ".ico", ".jp2")
_OTHER_SUFFIXES += (".jxl", ".lif", ".mat", ".mha", ".mrc", ".nd2", ".nii", ".npy", ".npz", ".nrrd", ".pdf", ".psd")
_OTHER_SUFFIXES += (".raw", ".svg", ".svs", ".tga", ".vsi", ".xcf", ".zarr")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
_IMAGE_FOLDERS = ("images", "imgs", "image", "img")
_MASK_FOLDERS = ("masks", "labels", "annotations", "mask")
_MASK_ENDINGS = ("", "_mask", "_masks", "_label", "_labels", "_gt", "_L", "_cp_masks")  # after the image's name


class Record(NamedTuple):
    """One image of a data set.

    `labels` is a file, or the `bytes` of what a file on many images says of this one with a `path` that names both, or
    None in a test split.
    """

    id: str
    image: Path
    labels: Path | dict[str, bytes | str | None] | None


@dataclass(frozen=True)
class Layout:
    """The contents of a folder.

    Attributes:
        name: name of the data set.
        root: the folder, which may be inside the one that was given.
        splits: the records of `train`, and if available of `validation` and `test` (which has no masks).
        catalog_name: catalog entry with the class names, or None.
        notes: sentences about images in the folder that are not used.
    """

    name: str
    root: Path
    splits: dict[str, list[Record]]
    catalog_name: str | None = None
    notes: tuple[str, ...] = ()


def read_layout(root: str | Path) -> Layout:
    """Recognise the layout of a folder and list its images.

    Known layouts are Cityscapes, Pascal VOC2012, ADE20K and CamVid (in SegNet's split) as downloaded. Images of other
    names are other data, with classes of their own. Any other folder must hold images and masks of matching names, see
    [`read_folder`].

    Raises:
        InputError: the folder does not exist, or an image, a mask or a list is missing or does not match.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder")
    for read, places, signature, names in _KNOWN:
        for place in places:
            if all((root / place / part).is_dir() for part in signature):
                layout = read(root / place)
                is_known = all(
                    re.fullmatch(names, PurePosixPath(record.id).name)
                    for split in ("train", "validation")
                    for record in layout.splits.get(split, ())
                )
                return layout if is_known else replace(layout, name=root.resolve().name, catalog_name=None)
    return read_folder(root)


# ---- Known data sets ----


def read_cityscapes(root: Path) -> Layout:
    """Read `leftImg8bit/SPLIT/CITY/*_leftImg8bit.png` and `gtFine/SPLIT/CITY/*_gtFine_labelIds.png`."""
    splits, notes = {}, []
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        folder = root / "leftImg8bit" / name
        if not folder.is_dir():
            continue
        records = []
        for city_and_stem, image in _named_files(folder, ("_leftImg8bit.png",)).items():
            stem = city_and_stem.removesuffix("_leftImg8bit")
            mask = root / "gtFine" / name / f"{stem}_gtFine_labelIds.png"
            records.append(Record(stem, image, None if split == "test" else _existing(mask, image)))
        splits[split] = records
        if split != "test":
            masks = _named_files(root / "gtFine" / name, ("_gtFine_labelIds.png",))
            notes += _without_image(root / "gtFine" / name, len(masks) - len(records))
    splits = _with_train(splits, root / "leftImg8bit" / "train")
    return Layout("Cityscapes", root, splits, "cityscapes", tuple(notes))


def read_voc2012(root: Path) -> Layout:
    """Read `JPEGImages/ID.jpg`, `SegmentationClass/ID.png`, `ImageSets/Segmentation/{train,val,test}.txt`.

    If the SBD-augmented `trainaug.txt` and `SegmentationClassAug` exist, they are the training split. CVAT calls the
    list of a task without subsets `default.txt`. labelme writes no lists, and may keep its PNGs in
    `SegmentationClassPNG`.
    """
    lists, name = root / "ImageSets" / "Segmentation", "Pascal VOC2012"
    masks, augmented = root / "SegmentationClass", root / "SegmentationClassAug"
    if (root / "SegmentationClassPNG").is_dir():
        masks = root / "SegmentationClassPNG"
    if not lists.is_dir():
        return Layout(name, root, {"train": _pair(root / "JPEGImages", masks)}, "voc2012")
    chosen = _lists_of_splits(lists)
    if (lists / "trainaug.txt").is_file() and augmented.is_dir():
        chosen["train"], name = lists / "trainaug.txt", f"{name} (trainaug)"
    splits, images = {}, _named_files(root / "JPEGImages")
    for split, path in chosen.items():
        records = []
        for identifier in _read_ids(path):
            image = images.get(unicodedata.normalize("NFC", identifier))
            image = image or _existing(_below(root / "JPEGImages", f"{identifier}.jpg", path), path)
            mask = _below(masks, f"{identifier}.png", path)
            if split == "train" and chosen["train"].name == "trainaug.txt":
                with_sbd = _below(augmented, f"{identifier}.png", path)
                mask = with_sbd if with_sbd.is_file() else mask
            records.append(Record(identifier, image, None if split == "test" else _existing(mask, image)))
        splits[split] = records
    listed = {record.id for records in splits.values() for record in records}
    notes = _without_image(masks, sum(name not in listed for name in _named_files(masks)), "that are in no list")
    return Layout(name, root, _with_train(splits, lists / "train.txt"), "voc2012", tuple(notes))


def _lists_of_splits(folder: Path) -> dict[str, Path]:
    """Return the list of each split. CVAT keeps the names of subsets as they were typed."""
    by_name = {path.stem.lower(): path for path in sorted(folder.glob("*.txt"))}
    chosen = {}
    for split, names in SPLITS.items():
        found = _only(f"names of the {split} split", [by_name[name] for name in names if name in by_name])
        found = by_name.get("default") if found is None and split == "train" else found
        if found is not None:
            chosen[split] = found
    return chosen


def read_ade20k(root: Path) -> Layout:
    """Read `images/{training,validation}/*.jpg` and `annotations/{training,validation}/*.png`."""
    layout = read_folder(root)
    return replace(layout, name="ADE20K", catalog_name="ade20k")


def read_camvid(root: Path) -> Layout:
    """Read `train/*.png` and `trainannot/*.png`, and the same for `val` and `test`: CamVid in SegNet's split."""
    splits = {}
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        if (root / name).is_dir():
            masks = None if split == "test" else root / f"{name}annot"
            splits[split] = _pair(root / name, masks)
    return Layout("CamVid", root, splits, "camvid")


# The function that reads a layout, where it may be in the folder, its subfolders, and the names of its images.
_KNOWN: list[tuple[Callable[[Path], Layout], tuple[str, ...], tuple[str, ...], str]] = [
    (read_cityscapes, (".",), ("leftImg8bit", "gtFine"), r"[\w-]+_\d{6}_\d{6}"),
    (
        read_voc2012,
        (".", "VOC2012", "VOCdevkit/VOC2012"),
        ("JPEGImages", "SegmentationClass"),
        r"(19|20)\d\d_\d{6}",
    ),
    (
        read_ade20k,
        (".", "ADEChallengeData2016"),
        ("images/training", "annotations/training"),
        r"ADE_(train|val)_\d{8}",
    ),
    (read_camvid, (".", "CamVid"), ("train", "trainannot"), r"(0001TP|0006R0|0016E5|Seq05VD)_f?\d+"),
]


# ---- Any folder ----


def read_folder(root: Path) -> Layout:
    """Read images and masks of matching names.

    The folders are `SPLIT/images` and `SPLIT/masks`, or `images/SPLIT` and `masks/SPLIT`, or `SPLIT` and
    `SPLIT_masks`, or `images` and `masks` without splits, or one folder for both. Other common names (`labels`,
    `annotations`, `imgs`, `valid`, `testing`, ...) work, too. Folders may be nested. A mask has the path and name of
    its image, optionally followed by `_mask`, `_masks`, `_label`, `_labels`, `_gt`, `_L` or `_cp_masks`, and any
    suffix. In one folder for both, the ending is required. Masks of a `test` split are not read.
    """
    splits = _find_splits(root)
    if "train" not in splits:
        there = next(images_below(root), None)
        has = "has no images" if there is None else f"has images, like {there}, but not in a layout that is known"
        raise InputError(f"{root} {has}. {_advice(root)}")
    return Layout(root.resolve().name, root, splits, notes=unused(root, splits))


def _find_splits(root: Path) -> dict[str, list[Record]]:
    splits = {}
    for split, names in SPLITS.items():
        found = _find_pair(root, split, names)
        if found is not None:
            splits[split] = _pair(found[0], None if split == "test" else found[1])
        elif (place := _find_mixed(root, split, names)) is not None:
            splits[split] = _pair_mixed(place, split == "test")
    if "train" not in splits:
        flat, place = _find_pair(root, "train", ("",)), _find_mixed(root, "train", ("",))
        if flat is not None:
            splits["train"] = _pair(*flat)
        elif place is not None:
            splits["train"] = _pair_mixed(place, False)
    return splits


def _advice(root: Path) -> str:
    if (root / "SegmentationClass").is_dir():
        return f"{root / 'JPEGImages'} is missing. Export the data set with its images, or copy them there."
    return "It must contain train/images and train/masks, images/train and masks/train, or images and masks."


def masks_in(root: Path) -> Path | None:
    """Return a mask in a folder that has a layout of images and masks, or None if it has no such layout."""
    for _, places, signature, _ in _KNOWN:
        for place in places:
            if all((root / place / part).is_dir() for part in signature):
                return root / place / signature[1]
    for split, names in (*SPLITS.items(), ("train", ("",))):
        found = _find_pair(root, split, names)
        there = found and found[1].is_dir() and next(images_below(found[1]), None)
        there = there or _find_mixed(root, split, names)
        if there:
            return there
    return None


def _find_mixed(root: Path, split: str, names: tuple[str, ...]) -> Path | None:
    """Return the folder that holds both the images and the masks of a split."""
    places = [root / name for name in names if (root / name).is_dir()]
    return _only(f"images of the {split} split", [place for place in places if _masks_among(_all_names(place))])


def _all_names(folder: Path) -> set[str]:
    return {path.relative_to(folder).with_suffix("").as_posix() for path in images_below(folder)}


def _masks_among(names: Iterable[str]) -> set[str]:
    """Return the names that are those of other images followed by the ending of a mask."""
    names = set(names)
    return {name + ending for name in names for ending in _MASK_ENDINGS[1:] if name + ending in names}


def _pair_mixed(folder: Path, is_test: bool) -> list[Record]:
    pictures = _named_files(folder)
    masks = {name: pictures.pop(name) for name in sorted(_masks_among(pictures))}
    return _without_masks(pictures) if is_test else _match(pictures, masks, folder, folder)


def _find_pair(root: Path, split: str, names: tuple[str, ...]) -> tuple[Path, Path] | None:
    """Return the folders of a split's images and masks. The folder of masks may not exist.

    Raises:
        InputError: several folders may be the one.
    """
    found = {}
    for name in names:
        for images in _IMAGE_FOLDERS:
            found[root / name / images] = [root / name / masks for masks in _MASK_FOLDERS]
            found.setdefault(root / images / name, [root / masks / name for masks in _MASK_FOLDERS])
        beside = [root / f"{name}_{masks}" for masks in _MASK_FOLDERS]
        if name and any(folder.is_dir() for folder in beside):
            found[root / name] = beside
    images = _only(f"images of the {split} split", [folder for folder in found if folder.is_dir()])
    if images is None:
        return None
    masks = [folder for folder in found[images] if folder.is_dir()]
    if len(masks) > 1:
        masks = [folder for folder in masks if any(images_below(folder))] or masks[:1]
    return images, _only(f"masks of {images}", masks) or found[images][0]


def _only(what: str, folders: list[Path]) -> Path | None:
    if len(folders) > 1:
        raise InputError(f"{folders[0]} and {folders[1]} may both hold the {what}. Rename or remove one of them.")
    return folders[0] if folders else None


def unused(root: Path, splits: dict[str, list[Record]]) -> tuple[str, ...]:
    """Say which folders below `root` have images that no split uses."""
    files = (path for records in splits.values() for record in records for path in (record.image, record.labels))
    used = {path for path in files if isinstance(path, Path)}
    counts = Counter(path.parent for path in images_below(root) if path not in used)
    return tuple(f"{folder} has {number} images that are not used" for folder, number in sorted(counts.items()))


def _pair(images: Path, masks: Path | None) -> list[Record]:
    """Match the images and masks of two folders. Every image must have a mask, and every mask an image."""
    pictures = _named_files(images)
    if not pictures:
        raise InputError(f"{images} has no images")
    if masks is None:
        return _without_masks(pictures)
    if not masks.is_dir():
        raise InputError(f"{masks} is not a folder. It must contain the masks of {images}.")
    return _match(pictures, _named_files(masks), images, masks)


def _without_masks(pictures: dict[str, Path]) -> list[Record]:
    return [Record(name, path, None) for name, path in pictures.items()]


def _match(pictures: dict[str, Path], candidates: dict[str, Path], images: Path, masks: Path) -> list[Record]:
    """Match images and masks by their names. `candidates` is emptied."""
    records = []
    for name, image in pictures.items():
        mask = next((candidates.pop(name + ending) for ending in _MASK_ENDINGS if name + ending in candidates), None)
        records.append(Record(name, image, mask))
    missing = next((record for record in records if record.labels is None), None)
    if missing is not None:
        is_alone = any(record.labels for record in records) or not candidates
        hint = "" if is_alone else f" The masks there have other names, like {next(iter(candidates.values()))}."
        raise InputError(f"{missing.image} has no mask. Add {masks / missing.id}.png.{hint}")
    for path in candidates.values():
        raise InputError(f"{path} has no image in {images}. Add the image, or remove the mask.")
    for record in records:
        if record.labels.suffix.lower() in (".jpg", ".jpeg"):
            raise InputError(
                f"{record.labels}: a mask must not be a JPEG, because that format changes its values. Save it as PNG."
            )
    return records


def _named_files(folder: Path, endings: tuple[str, ...] = _IMAGE_SUFFIXES) -> dict[str, Path]:
    """List the images in a folder and its subfolders by their path without suffix, sorted.

    Names are composed (NFC), because macOS decomposes the letters of file names.

    Raises:
        InputError: two images have the same name, or a picture has a format that is not read.
    """
    found: dict[str, Path] = {}
    for path in files_below(folder):
        if path.name.lower().endswith(_OTHER_SUFFIXES):
            raise InputError(
                f"{path}: pictures of this format are not read. Save it in one of the formats "
                f"{', '.join(ending[1:] for ending in _IMAGE_SUFFIXES)}, or remove it."
            )
        if not path.name.lower().endswith(tuple(ending.lower() for ending in endings)):
            continue
        key = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
        if key in found:
            raise InputError(f"{found[key]} and {path} have the same name. Rename or remove one of them.")
        found[key] = path
    return dict(sorted(found.items()))


def images_below(folder: Path) -> Iterator[Path]:
    return (path for path in files_below(folder) if path.name.lower().endswith(_IMAGE_SUFFIXES))


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders, without hidden ones.

    Raises:
        InputError: a folder cannot be read, or a name is not UTF-8.
    """
    for place, files in walk(folder, onerror=_unreadable):
        for name in sorted(files):
            path = Path(place, name)
            try:
                str(path).encode()
            except UnicodeEncodeError as error:
                shown = str(path).encode(errors="backslashreplace").decode()
                raise InputError(f"{shown}: the name is not UTF-8. Rename the file.") from error
            if not name.startswith("."):
                yield path


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def _read_ids(path: Path) -> list[str]:
    return [re.sub(r"\s+-?[01]$", "", line) for line in read_lines(path)]  # VOC's lists of one class have a flag


def _below(folder: Path, name: str, source: Path) -> Path:
    """Return the path of a name that a list file contains, which must be inside the folder."""
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise InputError(f"{source}: {name!r} is outside of {folder}. Remove the line.")
    forms = (Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
    return next((form for form in (path, *forms) if form.exists()), path)


def _without_image(folder: Path, number: int, why: str = "without an image") -> list[str]:
    return [f"{folder} has {number} masks {why}, which are not used"] if number else []


def _existing(path: Path, wanted_by: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path} is missing, but {wanted_by} needs it")
    return path


def _with_train(splits: dict[str, list[Record]], place: Path) -> dict[str, list[Record]]:
    if not splits.get("train"):
        raise InputError(f"{place} is missing or empty, so there are no training images")
    return {name: records for name, records in splits.items() if records}


def split_of(path: PurePath) -> str | None:
    """Return the split that the first word of its name in a relative path means, like `train2017`, or None."""
    for part in path.parts:
        for word in re.findall(r"[a-z]+", part.lower()):
            for split, names in SPLITS.items():
                if word in names:
                    return split
    return None


def to_columns(records: Iterable[Record]) -> dict[str, list[Any]]:
    """Return records as the columns `id`, `image` and `labels`, with a path or the bytes of labels in a file."""
    ids, images, labels = zip(*records, strict=True)
    return {
        "id": list(ids),
        "image": [str(path) for path in images],
        "labels": [str(label) if isinstance(label, Path) else label for label in labels],
    }
