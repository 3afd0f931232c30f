#!/usr/bin/env python
"""Look at a data set before training on it.

    python examples/inspect_dataset.py --dataset_dir my_data --void_labels 11

prints how many images there are and how large they are, the share of each class overall and in each fraction, the
classes that a fraction misses, and what is wrong: unreadable files, masks with unknown values, near-constant images,
images that occur twice, training images that are in the validation split too. All of it is written to
`inspection.json`, and some images with their masks to `inspection.png`. The flags of the data are those of
run_seg_pals.py. Ends with exit code 1 if run_seg_pals.py would refuse the data without `--skip_bad_samples`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from run_seg_pals import DataArguments, OneLineParser, fail, read_data

from pals_hf.data import FractionManifest, SegmentationData
from pals_hf.errors import InputError
from pals_hf.visualize import prediction_sheet

CONSTANT = 4.0  # standard deviation of grey values (0 to 255) below which an image shows next to nothing
NUM_PICTURES = 6  # rows of inspection.png


@dataclass
class InspectionArguments(DataArguments):
    """What to look at, and where to write it."""

    fractions: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 1.0], metadata={"help": "Fractions to look into."}
    )
    output_dir: str = field(default=".", metadata={"help": "Folder for inspection.json and inspection.png."})


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(
        InspectionArguments, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    try:
        (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        data = read_data(args, skip_bad_samples=True)
        report = inspect(data, args)
    except InputError as error:
        fail(error)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "inspection.json").write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    # The beginning of a balanced draw shows every class that few pictures can show.
    chosen = FractionManifest.draw(data.train, count=min(NUM_PICTURES, len(data.train)), method="balanced")
    rows = [(row["image"], row["labels"]) for row in chosen.select(data.train)]
    prediction_sheet(rows, data.id2label, folder / "inspection.png", data.colors)
    print_report(report)
    print(f"\nwritten to {folder}: inspection.json, inspection.png")
    sys.exit(1 if report["refused"] else 0)


def inspect(data: SegmentationData, args: InspectionArguments) -> dict[str, Any]:
    """Everything there is to say, as JSON."""
    splits = {"train": data.train, "validation": data.validation}
    counts = {name: len(split) for name, split in splits.items()} | {"test": len(data.test) if data.test else 0}
    return {
        "name": data.name,
        "license": data.license,
        "images": counts,
        "sizes": {name: sizes(split) for name, split in splits.items()},
        "classes": {name: class_table(split, data.id2label) for name, split in splits.items()},
        "fractions": [look_into(data, fraction, args) for fraction in args.fractions],
        "refused": data.skipped,
        "near_constant": {name: near_constant(split) for name, split in splits.items()},
        "duplicates": {name: duplicates(split) for name, split in splits.items()},
    }


def sizes(split: Dataset) -> dict[str, int]:
    """How many images have which size, the most frequent first."""
    counter = Counter(
        f"{mask.width}x{mask.height}" for mask in (row["labels"] for row in split.select_columns("labels"))
    )
    return dict(counter.most_common())


def class_table(split: Dataset, id2label: dict[int, str]) -> dict[str, dict[str, float]]:
    """For each class its share of the labelled pixels and the number of images that show it; `void` of all pixels."""
    pixels = np.array(split["class_pixels"])
    labelled = max(1, pixels[:, :-1].sum())
    table = {
        name: {"share": float(pixels[:, index].sum() / labelled), "images": int((pixels[:, index] > 0).sum())}
        for index, name in id2label.items()
    }
    void = pixels[:, -1]
    return table | {"void": {"share": float(void.sum() / pixels.sum()), "images": int((void > 0).sum())}}


def look_into(data: SegmentationData, fraction: float, args: InspectionArguments) -> dict[str, Any]:
    manifest = FractionManifest.draw(
        data.train, fraction, args.split_seed, method=args.split_method, name=data.name, id2label=data.id2label
    )
    table = class_table(manifest.select(data.train), data.id2label)
    missed = [name for name in data.id2label.values() if table[name]["images"] == 0]
    return {"fraction": fraction, "images": len(manifest.ids), "classes": table, "missed": missed}


def near_constant(split: Dataset) -> list[str]:
    return [
        row["id"]
        for row in split.select_columns(["id", "image"])
        if np.asarray(row["image"].convert("L"), dtype=np.float32).std() < CONSTANT
    ]


def duplicates(split: Dataset) -> list[list[str]]:
    """Groups of images of the same contents."""
    groups = defaultdict(list)
    for identifier, content in zip(split["id"], split["image_sha256"], strict=True):
        groups[content].append(identifier)
    return [ids for ids in groups.values() if len(ids) > 1]


def print_report(report: dict[str, Any]) -> None:
    images = ", ".join(f"{count} {split}" for split, count in report["images"].items() if count)
    print(f"{report['name']}: {images} images")
    if report["license"]:
        print(f"terms: {report['license']}")
    for split, found in report["sizes"].items():
        shown = ", ".join(f"{size} ({count})" for size, count in list(found.items())[:4])
        print(f"sizes, {split}: {shown}{' ...' if len(found) > 4 else ''}")
    print(f"\nshare of labelled pixels (images that show it)\n{'class':<20}{'validation':>16}", end="")
    for part in report["fractions"]:
        print(f"{part['fraction']:>10.0%} ({part['images']})".rjust(16), end="")
    for name, scored in report["classes"]["validation"].items():
        columns = [scored, *(part["classes"][name] for part in report["fractions"])]
        cells = "".join(f"{cell['share']:.2%} ({cell['images']})".rjust(16) for cell in columns)
        print(f"\n{name:<20}{cells}", end="")
    print("\n")
    for part in report["fractions"]:
        if part["missed"]:
            print(f"{part['fraction']:.0%} of the training images miss: {', '.join(part['missed'])}")
    for split in ("train", "validation"):
        for identifier in report["near_constant"][split]:
            print(f"{split}/{identifier} shows next to nothing: all its pixels are alike")
        for ids in report["duplicates"][split]:
            print(f"{split}: {', '.join(ids)} are the same image")
    for name, problem in report["refused"].items():
        print(f"training would refuse {name}: {problem}")


if __name__ == "__main__":
    main()
