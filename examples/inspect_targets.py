#!/usr/bin/env python
"""Show whether the average over similar pixels is better than the network's own prediction, without training.

    python examples/inspect_targets.py --model runs/mine --dataset_dir my_data --validation

PALS trains on the prediction averaged over similar pixels, q. For a trained network and every setting of the affinity,
this program prints how often the most likely class of q is right at labelled pixels, the mean IoU, the negative
log-likelihood and the entropy of q, and the same figures of the prediction itself (self-distillation). Where q is not
better than the prediction, comparing pixels cannot help. The figures are written to `targets.json`, and `targets.png`
shows image, labels, prediction, q and the entropy of q. The network is in evaluation mode.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from pals_hf.cli.arguments import DataArguments, read_data
from pals_hf.cli.ending import ends_at_ctrl_c, fail
from pals_hf.cli.parser import OptionParser
from pals_hf.cli.report import load_finished
from pals_hf.data import FractionManifest
from pals_hf.data.splitting import hold_out
from pals_hf.errors import InputError
from pals_hf.files import write_result
from pals_hf.functional import SOURCES, Affinity, entropy, upsample
from pals_hf.losses import PALSLoss
from pals_hf.metrics import SegmentationMetrics
from pals_hf.models import build_image_processor
from pals_hf.options import EVALUATION, IMAGES, MODEL, RUN, option
from pals_hf.tap import ClassifierTap, read_network
from pals_hf.visualize import heat_map, palette

NUM_PICTURES = 4


@dataclass
class TargetArguments(DataArguments):
    """Which network, images and settings to look at."""

    model: str = option("", MODEL, "Trained checkpoint: a folder or a name on the Hub.")
    image_size: list[int] | None = option(
        None, IMAGES, "Height and width that images are resized to. Default: as the checkpoint's image processor does."
    )
    validation: bool = option(False, IMAGES, "Use the validation images instead of the training images.")
    train_fraction: float | None = option(None, IMAGES, "Share of the images to use. Default: all of them.")
    train_count: int | None = option(None, IMAGES, "Number of images to use, instead of a share.")
    tuning_share: float | None = option(None, IMAGES, "Hold out this share of the training images as --validation.")
    tuning_ids: str | None = option(None, IMAGES, "Hold out the training images whose id matches as --validation.")
    taus: list[float] = option([0.03, 0.1], EVALUATION, "Temperatures of the affinity.")
    keys: list[int] = option([256], EVALUATION, "Numbers of keys that a position is compared with; 0 for all pairs.")
    sources: list[str] = option(
        ["classifier_input"],
        EVALUATION,
        "Features that are compared.",
        choices=[source for source in SOURCES if source != "before_dropout"],
    )
    without_self: bool = option(False, EVALUATION, "Also try each setting without comparing a position with itself.")
    output_dir: str = option(".", RUN, "Folder for targets.json and targets.png.")


@dataclass
class Score:
    """Counts and sums over labelled pixels."""

    metrics: SegmentationMetrics
    nll: float = 0.0
    entropy: float = 0.0

    def add(self, q: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a distribution `(C, H, W)` at the labels `(H, W)`."""
        labelled = labels != 255
        self.metrics.update(q.argmax(dim=0), labels)
        picked = q.gather(0, labels.where(labelled, 0)[None])[0][labelled]
        self.nll -= float(picked.clamp(min=1e-12).log().double().sum())
        self.entropy += float(entropy(q[None])[0][labelled].double().sum())

    def means(self) -> dict[str, float]:
        metrics, pixels = self.metrics.compute(), int(self.metrics.counts.sum())
        means = {"accuracy": metrics["overall_accuracy"], "mean_iou": metrics["mean_iou"]}
        return means | {"nll": self.nll / pixels, "entropy": self.entropy / pixels}


@ends_at_ctrl_c
def main(argv: list[str] | None = None) -> None:
    parser = OptionParser(TargetArguments, description=__doc__)
    try:
        (args,) = parser.parse(sys.argv[1:] if argv is None else argv)
        results = inspect(args)
        write_result(Path(args.output_dir) / "targets.json", json.dumps(results, indent=2))
    except InputError as error:
        fail(error)
    except ValueError as error:  # of the affinity: a tau that is not positive
        fail(InputError(str(error)))
    print_table(results)
    print(f"\nwritten to {args.output_dir}: targets.json, targets.png")


def affinities(args: TargetArguments) -> list[Affinity]:
    """Return all settings to look at, first self-distillation, which compares no positions."""
    with_self = (True, False) if args.without_self else (True,)
    combinations = itertools.product(args.sources, args.taus, args.keys, with_self)
    return [
        Affinity(weight=0.0),
        *(Affinity(tau, keys or None, source=source, include_self=own) for source, tau, keys, own in combinations),
    ]


def inspect(args: TargetArguments) -> list[dict[str, Any]]:
    """Score every setting, and draw the picture on the way."""
    if not args.model:
        raise InputError("model is missing: name a trained checkpoint")
    images, id2label = read_images(args)
    model, processor = load_finished(args.model, id2label, None)
    if args.image_size is not None:
        processor = build_image_processor(args.model, args.image_size)
    settings, num_labels = affinities(args), model.config.num_labels
    scores, rows = {affinity: Score(SegmentationMetrics(num_labels)) for affinity in settings}, []
    for row in tqdm(images, desc="images", disable=not sys.stderr.isatty()):
        labels = torch.from_numpy(np.asarray(row["labels"], dtype=np.int64))
        readings = {source: read(model, processor, row["image"], source) for source in args.sources}
        shown = []
        for affinity, score in scores.items():
            reading = readings.get(affinity.source) or next(iter(readings.values()))
            q = PALSLoss(affinity=affinity).aggregate(reading.logits, reading.features)
            q = upsample(q, labels.shape)[0].cpu()
            score.add(q, labels)
            if len(rows) < NUM_PICTURES and len(shown) < 2:
                shown.append(q)
        if shown:
            rows.append((row["image"], labels, *shown))
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    draw(rows, num_labels, Path(args.output_dir) / "targets.png")
    return [asdict(affinity) | score.means() for affinity, score in scores.items()]


def read_images(args: TargetArguments) -> tuple[Dataset, dict[int, str]]:
    """Return the images to look at, and the classes of their labels."""
    data = read_data(args, args.skip_bad_samples)
    if data.depth is not None:
        raise InputError(f"this program reads images of 8 bits and 3 channels, but the images have {data.depth}")
    if args.tuning_ids is not None or args.tuning_share is not None:
        data = hold_out(
            data,
            share=args.tuning_share,
            pattern=args.tuning_ids,
            seed=args.validation_seed,
            skip_bad_samples=args.skip_bad_samples,
        )
    images = data.validation if args.validation else data.train
    if args.train_fraction is None and args.train_count is None:
        return images, data.id2label
    manifest = FractionManifest.draw(
        images, args.train_fraction, args.fraction_seed, count=args.train_count, method=args.fraction_method
    )
    return manifest.select(images), data.id2label


@torch.no_grad()
def read(model, processor, image: Image.Image, source: str):
    """Read logits and the features of a source, on the classifier's grid."""
    pixel_values = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    inputs = {"pixel_values": pixel_values.to(model.device, model.dtype)}
    return read_network(model, ClassifierTap(model), inputs, Affinity(source=source))[0]


def draw(rows: list[tuple], num_labels: int, path: Path) -> None:
    """Draw image | labels | prediction | q | entropy of q, a row for each image."""
    colors, pictures = palette(num_labels), []
    for image, labels, own, q in rows:
        masks = [colors[mask.numpy().astype(np.uint8)] for mask in (labels, own.argmax(dim=0), q.argmax(dim=0))]
        unsure = heat_map(entropy(q[None])[0] / np.log(num_labels))
        pictures.append([image.convert("RGB"), *map(Image.fromarray, masks), unsure])
    widths = [max(row[column].width for row in pictures) for column in range(5)]
    heights = [max(picture.height for picture in row) for row in pictures]
    sheet = Image.new("RGB", (sum(widths), sum(heights)), "white")
    for number, row in enumerate(pictures):
        for column, picture in enumerate(row):
            sheet.paste(picture, (sum(widths[:column]), sum(heights[:number])))
    write_result(path, sheet)


def print_table(results: list[dict[str, Any]]) -> None:
    print(f"{'compared':<18}{'tau':>6}{'keys':>6}{'self':>6}{'accuracy, %':>13}{'mIoU, %':>9}{'NLL':>8}{'entropy':>9}")
    for row in results:
        name, tau, keys, own = "self-distillation", "", "", ""
        if row["weight"]:
            name, tau, keys = row["source"], f"{row['tau']:g}", str(row["keys"] or "all")
            own = "yes" if row["include_self"] else "no"
        line = f"{name:<18}{tau:>6}{keys:>6}{own:>6}{100 * row['accuracy']:>13.2f}{100 * row['mean_iou']:>9.2f}"
        print(f"{line}{row['nll']:>8.4f}{row['entropy']:>9.3f}")


if __name__ == "__main__":
    main()
