#!/usr/bin/env python
"""Look at what PALS would learn from: is the average over similar pixels better than the network's own prediction?

    python examples/inspect_targets.py --model runs/mine --dataset_dir my_data

For a trained network, the training images (or with `--validation` those that are not trained on) and every setting of
the affinity, prints how often q is right at labelled pixels, its mean IoU, in which a small class counts as much as a
large one, its negative log-likelihood and its entropy, beside the same of the own prediction p at that temperature.
Where q is not better than p, comparing pixels cannot help. With `--label_clicks` or `--label_noise` also how often
each is right where there is no label any more, or a wrong one. Everything is written to `targets.json`, and
`targets.png` shows image, labels, p, q and the entropy of q. The network is in evaluation mode.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from run_seg_pals import DataArguments, OneLineParser, fail, read_data, worsen_labels
from tqdm import tqdm

from pals_hf.data import FractionManifest
from pals_hf.data.sources import cut_matching
from pals_hf.errors import InputError
from pals_hf.functional import POOLINGS, aggregate_probabilities, entropy, upsample
from pals_hf.inference import load_for_inference
from pals_hf.metrics import SegmentationMetrics
from pals_hf.models import AFFINITY_SOURCES, ClassifierTap, patch_size_of, read_network
from pals_hf.visualize import heat_map, palette

OWN = "own prediction"
NUM_PICTURES = 4


@dataclass
class TargetArguments(DataArguments):
    """What to look at."""

    model: str = field(default="", metadata={"help": "Trained checkpoint: folder or name on the Hub."})
    validation: bool = field(default=False, metadata={"help": "Look at validation images instead of training images."})
    train_fraction: float | None = field(default=None, metadata={"help": "Only at this fraction of the images."})
    train_count: int | None = field(default=None, metadata={"help": "Only at so many of the images."})
    tuning_ids: str | None = field(
        default=None, metadata={"help": "As in training: images held out, which --validation then means."}
    )
    label_clicks: int | None = field(default=None, metadata={"help": "Make labels sparse, as in training."})
    label_noise: float | None = field(default=None, metadata={"help": "Make labels wrong, as in training."})
    taus: list[float] = field(default_factory=lambda: [0.03, 0.1, 0.3], metadata={"help": "Of the affinity."})
    temperatures: list[float] = field(default_factory=lambda: [1.0, 4.0], metadata={"help": "Of the predictions."})
    anchor_weights: list[float] = field(
        default_factory=lambda: [0.0], metadata={"help": "What labelled pixels count, with their label; 0: as others."}
    )
    sources: list[str] = field(
        default_factory=lambda: ["classifier_input", "logits"],
        metadata={"help": "What is compared.", "choices": [s for s in AFFINITY_SOURCES if s != "before_dropout"]},
    )
    max_affinity_cells: int | None = field(
        default=None, metadata={"help": "Compare blocks, no more than this, as in training. Default: all cells."}
    )
    affinity_pooling: str = field(
        default="both",
        metadata={"help": "Whether cells are compared with blocks, or blocks with blocks.", "choices": POOLINGS},
    )
    output_dir: str = field(default=".", metadata={"help": "Folder for targets.json and targets.png."})


@dataclass
class Score:
    """Counts and sums over labelled pixels."""

    metrics: SegmentationMetrics
    nll: float = 0.0
    entropy: float = 0.0
    lost: int = 0  # pixels whose label was made wrong, or void
    truths: int = 0  # of these, where the truth is the most likely class

    def add(self, q: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor) -> None:
        """q `(C, H, W)`; labels, as they are learned from, and truth `(H, W)`."""
        labelled, best = truth != 255, q.argmax(dim=0)
        self.metrics.update(best, truth)
        picked = q.gather(0, truth.where(labelled, 0)[None])[0][labelled]
        self.nll -= float(picked.clamp(min=1e-12).log().double().sum())
        self.entropy += float(entropy(q[None])[0][labelled].double().sum())
        lost = labelled & (labels != truth)
        self.lost += int(lost.sum())
        self.truths += int((best == truth)[lost].sum())

    def means(self) -> dict[str, float]:
        metrics, pixels = self.metrics.compute(), int(self.metrics.counts.sum())
        means = {"hits": metrics["overall_accuracy"], "mean_iou": metrics["mean_iou"]}
        means |= {"nll": self.nll / pixels, "entropy": self.entropy / pixels}
        return means | ({"truths": self.truths / self.lost} if self.lost else {})


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(TargetArguments, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        results = inspect(args)
    except InputError as error:
        fail(error)
    except ValueError as error:  # of the affinity: a tau or a weight that is none
        fail(InputError(str(error)))
    (Path(args.output_dir) / "targets.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print_table(results)
    print(f"\nwritten to {args.output_dir}: targets.json, targets.png")


def inspect(args: TargetArguments) -> list[dict[str, Any]]:
    """The scores of every setting, and the picture on the way."""
    if not args.model:
        raise InputError("model is missing: a trained checkpoint to look at")
    model, processor = load_for_inference(args.model)
    pairs, id2label = list(read_pairs(args)), model.config.id2label
    settings = [(OWN, 0.0, temperature, 0.0) for temperature in args.temperatures]
    settings += itertools.product(args.sources, args.taus, args.temperatures, args.anchor_weights)
    blocks = {name: getattr(args, name) for name in ("max_affinity_cells", "affinity_pooling")}
    scores, rows = {setting: Score(SegmentationMetrics(len(id2label))) for setting in settings}, []
    for image, labels, truth in tqdm(pairs, desc="images", disable=not sys.stderr.isatty()):
        maps = read_maps(model, processor, image, args.sources)
        labels, truth = (torch.from_numpy(np.asarray(mask, dtype=np.int64)) for mask in (labels, truth))
        for setting, score in scores.items():
            q = target(maps, *setting, labels, **blocks)
            score.add(q, labels, truth)
            if setting == settings[0]:
                own = q
        if len(rows) < NUM_PICTURES:
            first = settings[len(args.temperatures)]
            rows.append((image, labels, own, target(maps, *first, labels, **blocks)))
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    draw(rows, len(id2label), Path(args.output_dir) / "targets.png")
    return [
        {"source": source, "tau": tau or None, "temperature": temperature, "anchor_weight": weight} | score.means()
        for (source, tau, temperature, weight), score in scores.items()
    ]


def read_pairs(args: TargetArguments) -> Iterator[tuple[Image.Image, Image.Image, Image.Image]]:
    """Images, the masks that are learned from, and the true masks."""
    data = read_data(args, args.skip_bad_samples)
    train, held_out = data.train, data.validation
    if args.tuning_ids is not None:
        train, held_out = cut_matching(train, args.tuning_ids)
    images = held_out if args.validation else train
    if args.train_fraction is not None or args.train_count is not None:
        manifest = FractionManifest.draw(
            images, args.train_fraction, args.split_seed, count=args.train_count, method=args.split_method
        )
        images = manifest.select(images)
    learned = worsen_labels(images, args)
    for row, worse in zip(images, learned, strict=True):
        yield row["image"], worse["labels"], row["labels"]


@torch.no_grad()
def read_maps(model, processor, image: Image.Image, sources: list[str]) -> dict[str, torch.Tensor]:
    """Logits and the features of each source, on the classifier's grid."""
    pixel_values = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    inputs = {"pixel_values": pixel_values.to(model.device, model.dtype)}
    maps = {}
    for source in sources:
        reading, _ = read_network(model, ClassifierTap(model), inputs, source, patch_size=patch_size_of(model.config))
        maps |= {source: reading.features, "logits": reading.logits}
    return maps


def target(
    maps: dict[str, torch.Tensor],
    source: str,
    tau: float,
    temperature: float,
    anchor_weight: float,
    labels: torch.Tensor,
    **blocks: Any,
) -> torch.Tensor:
    """p or q `(C, H, W)` at the size of the labels `(H, W)`, as it is mixed into them."""
    q = (maps["logits"].float() / temperature).softmax(dim=1)
    if source != OWN:
        labels = labels.to(q.device)[None]
        q = aggregate_probabilities(maps[source], q, tau=tau, labels=labels, anchor_weight=anchor_weight, **blocks)
    return upsample(q, labels.shape[-2:])[0].cpu()


def draw(rows: list[tuple], num_labels: int, path: Path) -> None:
    """A picture of image | labels | p | q | entropy of q, a row an image."""
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
    sheet.save(path)


def print_table(results: list[dict[str, Any]]) -> None:
    is_worse = "truths" in results[0]
    head = f"{'compared':<18}{'tau':>6}{'T':>6}{'anchors':>9}{'right, %':>10}{'mIoU, %':>9}{'NLL':>8}{'entropy':>9}"
    print(head + ("  right without a right label, %" if is_worse else ""))
    for row in results:
        tau, anchors = (f"{row[name]:g}" if row[name] else "" for name in ("tau", "anchor_weight"))
        line = f"{row['source']:<18}{tau:>6}{row['temperature']:>6g}{anchors:>9}{100 * row['hits']:>10.2f}"
        line += f"{100 * row['mean_iou']:>9.2f}{row['nll']:>8.3f}{row['entropy']:>9.3f}"
        print(line + (f"{100 * row['truths']:>32.2f}" if is_worse else ""))


if __name__ == "__main__":
    main()
