"""Check a data set before training, and show its class shares and fractions.

    pals-hf inspect --dataset_dir my_data --void_labels 11

The program prints the number and sizes of the images, the share of each class in the validation split and in each
training fraction, and the classes that a fraction misses. It also finds unreadable files, masks with unknown values,
nearly constant images, duplicate images, and training images that are also validation images. The report is written to
`inspection.json`, and some images with their masks to `inspection.png`. The exit code is 1 if `pals-hf train` would
reject the data without `--skip_bad_samples`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from ..data import FractionManifest, SegmentationData, scale_pictures
from ..data.pictures import to_tensor
from ..files import make_folder, refuse_unwritable, write_result
from ..options import IMAGES, RUN, option
from ..visualize import prediction_sheet
from .arguments import DataArguments, read_data
from .ending import one_line
from .parser import OptionParser

CONSTANT = 4  # difference of an image's extreme values (0 to 255) below which it counts as nearly constant
NUM_PICTURES = 6  # rows of inspection.png


@dataclass
class InspectionArguments(DataArguments):
    """The data set, the fractions to inspect, and the folder of the report."""

    fractions: list[float] = option([0.1, 0.3, 0.5, 1.0], IMAGES, "Fractions of the training images to inspect.")
    output_dir: str = option(".", RUN, "Folder for inspection.json and inspection.png. Default: the current folder.")


@one_line()
def main(argv: list[str] | None = None) -> None:
    """Run the program on a command line, by default that of this process."""
    (args,) = OptionParser(InspectionArguments, __doc__).parse(sys.argv[1:] if argv is None else argv)
    refuse_unwritable(args.output_dir)
    data = scale_pictures(read_data(args, skip_bad_samples=True))
    report = inspect(data, args)
    folder = make_folder(args.output_dir)
    write_result(folder / "inspection.json", json.dumps(report, indent=2, ensure_ascii=False))
    # The first images of a balanced draw cover as many classes as possible.
    chosen = FractionManifest.draw(data.train, count=min(NUM_PICTURES, len(data.train)), method="balanced")
    rows = [(row["image"], row["labels"]) for row in chosen.select(data.train)]
    prediction_sheet(rows, data.id2label, folder / "inspection.png", data.colors)
    print_report(report)
    print(f"\ninspection.json and inspection.png are in {folder}")
    sys.exit(1 if report["refused"] else 0)


def inspect(data: SegmentationData, args: InspectionArguments) -> dict[str, Any]:
    """Return the report, ready for JSON."""
    splits = {"train": data.train, "validation": data.validation}
    counts = {name: len(split) for name, split in splits.items()} | {"test": len(data.test) if data.test else 0}
    return {
        "name": data.name,
        "license": data.license,
        "images": counts,
        "sizes": {name: sizes(split) for name, split in splits.items()},
        "classes": {name: class_table(split, data.id2label) for name, split in splits.items()},
        "fractions": [inspect_fraction(data, fraction, args) for fraction in args.fractions],
        "notes": data.notes,
        "depth": None if data.scaling is None else str(data.scaling),
        "refused": data.skipped,
        "near_constant": {name: near_constant(split) for name, split in splits.items()},
        "duplicates": {name: duplicates(split) for name, split in splits.items()},
    }


def sizes(split: Dataset) -> dict[str, int]:
    """Count the images of each size, the most frequent size first."""
    counter = Counter(
        f"{mask.width}x{mask.height}" for mask in (row["labels"] for row in split.select_columns("labels"))
    )
    return dict(counter.most_common())


def class_table(split: Dataset, id2label: dict[int, str]) -> dict[str, dict[str, float]]:
    """Return for each class its share of the labelled pixels and the number of images that contain it.

    The share of `void` is that of unlabelled pixels among all pixels.
    """
    pixels = np.array(split["class_pixels"])
    labelled = max(1, pixels[:, :-1].sum())
    table = {
        name: {"share": float(pixels[:, index].sum() / labelled), "images": int((pixels[:, index] > 0).sum())}
        for index, name in id2label.items()
    }
    void = pixels[:, -1]
    return table | {"void": {"share": float(void.sum() / pixels.sum()), "images": int((void > 0).sum())}}


def inspect_fraction(data: SegmentationData, fraction: float, args: InspectionArguments) -> dict[str, Any]:
    """Draw a fraction as a training would, and return its classes and the classes that it misses."""
    manifest = FractionManifest.draw(
        data.train, fraction, args.fraction_seed, method=args.fraction_method, name=data.name, id2label=data.id2label
    )
    table = class_table(manifest.select(data.train), data.id2label)
    missed = [name for name in data.id2label.values() if table[name]["images"] == 0]
    return {"fraction": fraction, "images": len(manifest.ids), "classes": table, "missed": missed}


def near_constant(split: Dataset) -> list[str]:
    """Return the ids of the images whose values hardly vary in any channel. Dark images may be as good as others."""
    return [
        row["id"]
        for row in split.select_columns(["id", "image"])
        if np.ptp(to_tensor(row["image"]).numpy(), axis=(1, 2)).max() < CONSTANT
    ]


def duplicates(split: Dataset) -> list[list[str]]:
    """Return groups of images with identical contents, by their ids."""
    groups = defaultdict(list)
    for identifier, content in zip(split["id"], split["image_sha256"], strict=True):
        groups[content].append(identifier)
    return [ids for ids in groups.values() if len(ids) > 1]


def print_report(report: dict[str, Any]) -> None:
    images = ", ".join(f"{count} {split} images" for split, count in report["images"].items() if count)
    print(f"{report['name']}: {images}")
    if report["license"]:
        print(f"license: {report['license']}")
    for split, found in report["sizes"].items():
        shown = ", ".join(f"{size} ({count})" for size, count in list(found.items())[:4])
        print(f"sizes of the {split} images: {shown}{' ...' if len(found) > 4 else ''}")
    print(f"\nshare of labelled pixels (number of images)\n{'class':<20}{'validation':>16}", end="")
    for part in report["fractions"]:
        print(f"{part['fraction']:>10.0%} ({part['images']})".rjust(16), end="")
    for name, scored in report["classes"]["validation"].items():
        columns = [scored, *(part["classes"][name] for part in report["fractions"])]
        cells = "".join(f"{cell['share']:.2%} ({cell['images']})".rjust(16) for cell in columns)
        print(f"\n{name:<20}{cells}", end="")
    print("\n")
    for part in report["fractions"]:
        if part["missed"]:
            print(f"The {part['fraction']:.0%} fraction has no image of: {', '.join(part['missed'])}")
    if report["depth"]:
        print(report["depth"])
    for note in report["notes"]:
        print(f"note: {note}")
    for split in ("train", "validation"):
        for identifier in report["near_constant"][split]:
            print(f"{split}/{identifier} is nearly constant: its pixels hardly differ")
        for ids in report["duplicates"][split]:
            print(f"{split}: {', '.join(ids)} are identical images")
    for name, problem in report["refused"].items():
        print(f"Training would reject {name}: {problem}")
