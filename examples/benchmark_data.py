#!/usr/bin/env python
"""How many images a second the input pipeline gives, side by side with that of transformers' example.

    pip install -e ".[benchmark]"
    python examples/benchmark_data.py                      # street scenes of 768 x 1024, crops of 512 x 512
    python examples/benchmark_data.py --dataset_dir camvid --void_labels 11 --image_size 180 240 --crop_size 180 240

Decode, joint transform and collate, through a DataLoader. The example script of transformers crops and flips, with
albumentations; so does the first of ours, the others also scale and jitter, which is how PALS trains. Medians of
rounds in which the variants take turns; ratios to the first. A last line says what the first look at all files costs,
and what it costs when they have been looked at before.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import albumentations
import datasets
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from benchmark_loss import time_side_by_side
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pals_hf import load_segmentation_dataset
from pals_hf.data import TrainTransform, TransformedDataset, collate, synthetic
from pals_hf.data.resizing import cache_resized
from pals_hf.models import build_image_processor

COUNT, ENLARGED = 96, 8


def write_scenes(root: Path) -> Path:
    """Built-in scenes, enlarged to the size of photographs, as files."""
    for index in range(COUNT):
        image, mask = synthetic.generate_scene((0, 0, index))
        size = (image.width * ENLARGED, image.height * ENLARGED)
        for kind, picture, method in (("images", image, Image.BICUBIC), ("masks", mask, Image.NEAREST)):
            path = root / "train" / kind / f"{index:04d}.{'jpg' if kind == 'images' else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.resize(size, method).save(path)
    (root / "id2label.json").write_text(json.dumps(synthetic.CLASSES))
    return root


def as_transformers_does(data: datasets.Dataset, processor, crop: tuple[int, int], image_size) -> Dataset:
    """What transformers' example for semantic segmentation does to an image; resized first if ours are."""
    resize = [albumentations.Resize(*image_size)] if image_size else []
    transform = albumentations.Compose(
        [
            *resize,
            albumentations.PadIfNeeded(min_height=crop[0], min_width=crop[1], border_mode=0, fill_mask=255),
            albumentations.RandomCrop(*crop),
            albumentations.HorizontalFlip(p=0.5),
            albumentations.Normalize(mean=processor.image_mean, std=processor.image_std),
            ToTensorV2(),
        ]
    )

    def preprocess(batch: dict) -> dict:
        pairs = [
            transform(image=np.array(image.convert("RGB")), mask=np.array(mask))
            for image, mask in zip(batch["image"], batch["labels"], strict=True)
        ]
        return {
            "pixel_values": torch.stack([pair["image"] for pair in pairs]).float(),
            "labels": torch.stack([pair["mask"] for pair in pairs]).long(),
        }

    return data.select_columns(["image", "labels"]).with_transform(preprocess)


def one_pass(dataset: Dataset, workers: int, batch_size: int = 8) -> Callable[[], None]:
    def run() -> None:
        for _ in DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate, shuffle=True):
            pass

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", help="Folder of images and masks. Default: generated street scenes.")
    parser.add_argument("--void_labels", type=int, nargs="*", default=[])
    parser.add_argument("--image_size", type=int, nargs=2)
    parser.add_argument("--crop_size", type=int, nargs=2, default=[512, 512])
    parser.add_argument("--images", type=int, default=96, help="Images of a pass.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output_dir", default="runs/benchmark_data")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker; the network needs the cores
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(args.dataset_dir or write_scenes(Path(folder))))
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "benchmark_data.json").write_text(json.dumps(rows, indent=2))
    print(f"results: {output}")


def measure(args: argparse.Namespace, folder: Path) -> list[dict]:
    looks = []
    with tempfile.TemporaryDirectory() as empty_cache:
        before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, empty_cache
        for _ in range(2):
            begin = time.perf_counter()
            data = load_segmentation_dataset(dataset_dir=folder, void_labels=args.void_labels)
            looks.append(time.perf_counter() - begin)
        rows = time_variants(args, data.train.select(range(min(args.images, len(data.train)))))
        datasets.config.HF_DATASETS_CACHE = before
    print(f"looking at {len(data.train) + len(data.validation)} images: {looks[0]:.2f} s, again: {looks[1]:.2f} s")
    return [*rows, {"variant": "first look", "seconds": looks[0]}, {"variant": "later look", "seconds": looks[1]}]


def time_variants(args: argparse.Namespace, train: datasets.Dataset) -> list[dict]:
    processor = build_image_processor(None, args.image_size)
    crop, plain = tuple(args.crop_size), {"scale_range": (1.0, 1.0), "color_jitter": 0.0}
    sets = {
        "transformers' example: crop, flip": as_transformers_does(train, processor, crop, args.image_size),
        "pals_hf: crop, flip": TransformedDataset(train, TrainTransform(processor, crop, **plain)),
        "pals_hf: scale, crop, flip, jitter": TransformedDataset(train, TrainTransform(processor, crop)),
    }
    if args.image_size:
        cached = cache_resized(train, processor)
        sets["the same from resized images"] = TransformedDataset(cached, TrainTransform(processor, crop))
    print(f"{os.cpu_count()} cores, {len(train)} images a pass, crops of {crop[0]} x {crop[1]}")
    rows = []
    for workers in args.workers:
        variants = {name: one_pass(dataset, workers) for name, dataset in sets.items()}
        seconds = time_side_by_side(variants, "cpu", args.rounds)
        first = next(iter(seconds.values()))
        for name, value in seconds.items():
            row = {
                "variant": name,
                "workers": workers,
                "images_per_second": len(train) / value,
                "ratio": first / value,
            }
            print(f"{workers} workers  {name:38}{row['images_per_second']:8.1f} images/s {row['ratio']:6.2f} x")
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
