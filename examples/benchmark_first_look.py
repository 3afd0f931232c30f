#!/usr/bin/env python
"""Measure the first look at exports of annotation tools: time and memory for a small and a large export.

    pip install -e ".[annotations]"
    python examples/benchmark_first_look.py --images 2500 10000

Each measurement is a process of its own. It lists the export, checks all images and draws all masks, and does the same
again from the cache. Times are CPU seconds of a process. Memory is the peak of what the process has allocated, without
files that the system maps. The ratio of the memory of both sizes says how much it grows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE, REGIONS, CORNERS = 64, 10, 20  # pixels of a side, regions of an image, corners of a polygon
FORMATS = ("coco", "labelme")


def write_export(root: Path, kind: str, count: int) -> None:
    """Write images with random polygons of two classes."""
    random, turn = np.random.default_rng(0), np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    images, annotations = [], []
    (root / "train").mkdir(parents=True)
    for index in range(count):
        pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        name = f"{index:06d}"
        Image.fromarray(pixels).resize((SIZE, SIZE)).save(root / "train" / f"{name}.jpg")
        polygons = [
            (random.random(2) * SIZE + (5 + 10 * random.random()) * circle).clip(0, SIZE).round(2)
            for _ in range(REGIONS)
        ]
        if kind == "labelme":
            shapes = [
                {"label": "ab"[number % 2], "points": points.tolist(), "shape_type": "polygon"}
                for number, points in enumerate(polygons)
            ]
            about = {"imagePath": f"{name}.jpg", "imageHeight": SIZE, "imageWidth": SIZE, "shapes": shapes}
            (root / "train" / f"{name}.json").write_text(json.dumps(about))
        images.append({"id": index, "file_name": f"{name}.jpg", "width": SIZE, "height": SIZE})
        annotations += [
            {"id": len(annotations) + number, "image_id": index, "category_id": 1 + number % 2}
            | {"segmentation": [points.ravel().tolist()]}
            for number, points in enumerate(polygons)
        ]
    if kind == "coco":
        categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
        content = {"images": images, "categories": categories, "annotations": annotations}
        (root / "train" / "_annotations.coco.json").write_text(json.dumps(content))


def measure(root: Path, results: Any) -> None:
    """Load an export twice, and put the CPU seconds of both and the peak of memory in MB into a queue."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = root / "cache"
    datasets.disable_progress_bars()
    from pals_hf import load_segmentation_dataset

    before, peak, is_done = allocated(), [0.0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.02):
            peak[0] = max(peak[0], allocated())

    threading.Thread(target=watch, daemon=True).start()
    seconds = [cpu_seconds(lambda: load_segmentation_dataset(dataset_dir=root)) for _ in range(2)]
    is_done.set()
    results.put({"first_s": seconds[0], "second_s": seconds[1], "peak_mb": peak[0], "imports_mb": before})


def cpu_seconds(act: Callable[[], object]) -> float:
    begin = time.process_time()
    act()
    return time.process_time() - begin


def allocated() -> float:
    """Return the memory of this process in MB, without mapped files. Needs Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs=2, default=[2500, 10000], help="Images of both exports.")
    counts = parser.parse_args(argv).images
    processes = multiprocessing.get_context("spawn")
    print(f"{'format':<10}{'images':>8}{'first look':>12}{'second':>9}{'peak memory':>13}")
    for kind in FORMATS:
        peaks = []
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder) / "export"
                write_export(root, kind, count)
                results = processes.Queue()
                process = processes.Process(target=measure, args=(root, results))
                process.start()
                found = results.get()
                process.join()
            peaks.append(found["peak_mb"])
            times = f"{found['first_s']:>10.1f} s{found['second_s']:>7.1f} s"
            print(f"{kind:<10}{count:>8}{times}{found['peak_mb']:>10.0f} MB", flush=True)
        print(f"{kind:<10}memory: {peaks[1] / peaks[0]:.2f} times for {counts[1] / counts[0]:.2f} times the images")


if __name__ == "__main__":
    main()
