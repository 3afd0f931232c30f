#!/usr/bin/env python
"""Measure the cost of PALS on this machine, side by side in one run.

    python examples/benchmark_loss.py                      # everything, on all cores
    python examples/benchmark_loss.py --sections loss --device cuda

Times are medians of rounds in which the variants take turns, so that a noisy machine disturbs all of them alike.
Memory is the peak of one call above the memory in use before the call, each in a fresh process. Ratios are to the
first variant of a case. The figures are written to `benchmark.json` and `benchmark.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import is_matplotlib_available, logging

from pals_hf import PALSConfig, PALSLoss, PALSTrainer
from pals_hf.functional import Affinity, aggregate_probabilities
from pals_hf.losses import CrossEntropyLoss, LabelSmoothingLoss

Variants = dict[str, Callable[[], float | None]]

FEATURES = 256  # channels of SegFormer-B0's classifier input
EXACT = Affinity(tau=0.3, keys=None)
KEYS = (64, 128, 256, 512, 2048, None)


# ---- What is measured: each function gives the variants of one case, the first of them the baseline. ----


def aggregation(device: str, cells: int) -> Variants:
    """q for one image, 19 classes: the N x N matrix against attention."""
    side = math.isqrt(cells)
    features = torch.randn(1, FEATURES, side, side, device=device)
    probabilities = torch.randn(1, 19, side, side, device=device).softmax(dim=1)
    half = features.bfloat16()
    variants = {"materialised float32": lambda: materialised(features, probabilities)}
    if cells > 16384:
        variants = {}  # 17 GB at 65 536 cells
    return variants | {
        "float32": lambda: aggregate_probabilities(features, probabilities, EXACT),
        "bfloat16": lambda: aggregate_probabilities(half, probabilities, EXACT),
        "float32, 256 keys": lambda: aggregate_probabilities(features, probabilities, replace(EXACT, keys=256)),
    }


def materialised(features: Tensor, probabilities: Tensor) -> Tensor:
    f = F.normalize(features, dim=1).flatten(2)
    similarity = torch.softmax(f.transpose(1, 2) @ f / 0.3, dim=2)
    return (similarity @ probabilities.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(probabilities.shape)


def loss(device: str, classes: int) -> Variants:
    """Forward and backward from 128 x 128 logits to 512 x 512 labels, two images."""
    logits = torch.randn(2, classes, 128, 128, device=device, requires_grad=True)
    features = torch.randn(2, FEATURES, 128, 128, device=device)
    labels = torch.randint(0, classes, (2, 512, 512), device=device)
    labels[:, :16] = 255
    q = torch.randn(2, classes, 128, 128, device=device).softmax(dim=1)
    criterion = nn.CrossEntropyLoss(ignore_index=255)

    def transformers_path() -> Tensor:
        """As the models of transformers compute it."""
        return criterion(F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False), labels)

    def step(function: Callable[..., Tensor], *args, **kwargs) -> Callable[[], None]:
        def run() -> None:
            logits.grad = None
            function(*args, **kwargs).backward()

        return run

    losses = {"PALS, q given": step(PALSLoss(), logits, labels, aggregated=q)}
    losses["self-distillation"] = step(PALSLoss(affinity=Affinity(weight=0.0)), logits, labels, features)
    for keys in KEYS:
        losses[f"PALS, {keys or 'all'} keys"] = step(PALSLoss(affinity=Affinity(keys=keys)), logits, labels, features)
    return {
        "transformers CE": step(transformers_path),
        "CE": step(CrossEntropyLoss(), logits, labels),
        "label smoothing": step(LabelSmoothingLoss(), logits, labels),
        **losses,
    }


def step(device: str, architecture: str, classes: int) -> Variants:
    """Whole training steps on 512 x 512 images, batch 2: forward, loss, backward, clipping, AdamW."""
    sides = {
        "Trainer + CE": (Trainer, TrainingArguments, {"remove_unused_columns": False}),
        "PALSTrainer + CE": (PALSTrainer, PALSConfig, {"loss": "ce"}),
        "PALSTrainer + PALS": (PALSTrainer, PALSConfig, {}),
        "PALSTrainer + PALS, channels last": (PALSTrainer, PALSConfig, {"channels_last": True}),
        "PALSTrainer + PALS, all pairs": (PALSTrainer, PALSConfig, {"affinity": {"keys": None}}),
    }
    return {
        name: lambda side=side: training_step(device, architecture, classes, *side) for name, side in sides.items()
    }


def training_step(
    device: str, architecture: str, classes: int, trainer_class: type, config_class: type, settings: dict
) -> float:
    """Seconds of a step: the median of three, after one that warms up."""
    clock = StepClock(device)
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            output_dir=folder,
            max_steps=4,
            per_device_train_batch_size=2,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
            logging_strategy="no",
            **settings,
        )
        model = build_network(architecture, classes)
        trainer_class(model, args, train_dataset=Scenes(classes, (512, 512)), callbacks=[clock]).train()
    return statistics.median(clock.seconds[1:])


def build_network(architecture: str, classes: int) -> nn.Module:
    if architecture == "SegFormer-B0":
        return SegformerForSemanticSegmentation(SegformerConfig(num_labels=classes))
    return MobileNetV2ForSemanticSegmentation(MobileNetV2Config(num_labels=classes, output_stride=8))


class Scenes(Dataset):
    """Random pictures and masks, always the same ones."""

    def __init__(self, classes: int, size: tuple[int, int], count: int = 8):
        generator = torch.Generator().manual_seed(0)
        self.count = count
        self.pictures = torch.randn(8, 3, *size, generator=generator)
        self.masks = torch.randint(0, classes, (8, *size), generator=generator)
        self.masks[:, :8] = 255

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pictures[index % 8], "labels": self.masks[index % 8]}


class StepClock(TrainerCallback):
    def __init__(self, device: str):
        self.device = device
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.start)


def evaluation(device: str, images: int, mean_iou: str) -> Variants:
    """`evaluate()` of a trainer over 512 x 1024 images with 19 classes and a very small network."""
    network = SegformerForSemanticSegmentation(
        SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], decoder_hidden_size=8, num_labels=19)
    )
    dataset = Scenes(19, (512, 1024), images)
    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_eval_batch_size": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": False,
    }
    variants: Variants = {}
    if images <= 50:  # it keeps all logits
        import evaluate

        metric = evaluate.load(mean_iou)

        def compute_metrics(result) -> dict[str, float]:
            logits, labels = torch.from_numpy(result.predictions), result.label_ids
            up = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
            predictions = up.argmax(dim=1).numpy()
            scores = metric.compute(predictions=predictions, references=labels, num_labels=19, ignore_index=255)
            return {"mean_iou": scores["mean_iou"]}

        args = TrainingArguments(**common, remove_unused_columns=False)
        theirs = Trainer(network, args, eval_dataset=dataset, compute_metrics=compute_metrics)
        variants["evaluate"] = lambda: untimed(theirs.evaluate())
    ours = PALSTrainer(network, PALSConfig(**common), eval_dataset=dataset)
    variants["PALSTrainer"] = lambda: untimed(ours.evaluate())
    variants["the network alone"] = lambda: forward_passes(network.eval(), dataset, device)
    return variants


@torch.no_grad()
def forward_passes(network: nn.Module, dataset: Dataset, device: str) -> None:
    """What no evaluation can do without."""
    for index in range(len(dataset)):
        network(pixel_values=dataset[index]["pixel_values"][None].to(device))


def untimed(_: object) -> None:
    """Not a time."""


# ---- How it is measured ----


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], float | None], device: str) -> float:
    """The time of a call, or what it says itself. CUDA by events."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        own = call()
        end.record()
        torch.cuda.synchronize()
        measured = start.elapsed_time(end) / 1000
    else:
        begin = time.perf_counter()
        own = call()
        measured = time.perf_counter() - begin
    return own if isinstance(own, float) else measured


def time_side_by_side(variants: Variants, device: str, rounds: int) -> dict[str, float]:
    """Medians over rounds in which the variants take turns. The first of several rounds does not count."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + (rounds > 1)):
        for name, call in variants.items():
            samples[name].append(seconds_of(call, device))
    return {name: statistics.median(values[rounds > 1 :]) for name, values in samples.items()}


def extra_megabytes(call: Callable[[], object], device: str) -> float:
    """The peak of memory during a call, above what is in use before it. Needs a process of its own on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = resident_peak(reset=True)
    call()
    return (resident_peak() - before) / 1e3


def warm_up(device: str) -> None:
    """Have libraries and thread pools loaded, which would count as memory of the first call."""
    logits = torch.randn(1, 8, 8, 8, device=device, requires_grad=True)
    labels = torch.zeros(1, 32, 32, dtype=torch.int64, device=device)
    F.cross_entropy(F.interpolate(logits, size=(32, 32), mode="bilinear"), labels).backward()
    PALSLoss()(logits, labels).backward()


def resident_peak(reset: bool = False) -> int:
    """The highest resident size so far in kB; where the system allows (Linux), since the last reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


SECTIONS = {"aggregation": aggregation, "loss": loss, "step": step, "evaluation": evaluation}


def cases_of(section: str, args: argparse.Namespace) -> list[dict]:
    if section == "aggregation":
        return [{"cells": cells} for cells in ((1024,) if args.quick else (1024, 4096, 16384, 65536))]
    if section == "loss":
        return [{"classes": classes} for classes in ((2,) if args.quick else (2, 19, 150))]
    if section == "step":
        architectures = ("SegFormer-B0",) if args.quick else ("SegFormer-B0", "MobileNetV2")
        return [{"architecture": a, "classes": c} for a in architectures for c in ((2,) if args.quick else (19, 150))]
    return [{"images": images, "mean_iou": args.mean_iou} for images in ((2,) if args.quick else (10, 50, 500))]


def memory_in_fresh_process(section: str, case: dict, variant: str, args: argparse.Namespace) -> float:
    """Run this program again for one call, and read what it says."""
    task = json.dumps({"section": section, "case": case, "variant": variant})
    command = [sys.executable, __file__, "--worker", task, "--device", args.device, "--threads", str(args.threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"measuring the memory of {variant} ({section} {case}) failed:\n{result.stderr[-2000:]}")
    return float(result.stdout.split()[-1])


def measure(section: str, case: dict, args: argparse.Namespace) -> list[dict]:
    variants = SECTIONS[section](args.device, **case)
    takes_minutes = case.get("images", 0) > 50 or case.get("cells", 0) > 16384
    rounds = 1 if takes_minutes else args.rounds
    seconds = time_side_by_side(variants, args.device, rounds)
    rows = []
    for name in variants:
        megabytes = memory_in_fresh_process(section, case, name, args)
        rows.append({"section": section, **case, "variant": name, "seconds": seconds[name], "megabytes": megabytes})
    for row in rows:
        row["time_ratio"] = row["seconds"] / rows[0]["seconds"]
        row["memory_ratio"] = row["megabytes"] / rows[0]["megabytes"] if rows[0]["megabytes"] else math.nan
    return rows


def report(rows: list[dict]) -> None:
    for row in rows:
        print(
            f"{row['section']:12}{label_of(row):20}{row['variant']:30}"
            f"{row['seconds'] * 1e3:10.1f} ms {row['time_ratio']:6.2f} x"
            f"{row['megabytes']:10.1f} MB {row['memory_ratio']:6.2f} x",
            flush=True,
        )


def errors_of_aggregation(device: str, cells: int = 16384) -> dict[str, float]:
    """Relative errors (Frobenius) against float64, a block of rows at a time."""
    side = math.isqrt(cells)
    features = torch.randn(1, FEATURES, side, side, device=device)
    probabilities = torch.randn(1, 19, side, side, device=device).softmax(dim=1)
    f, p = F.normalize(features.double(), dim=1).flatten(2)[0].T, probabilities.double().flatten(2)[0].T
    expected = torch.cat([torch.softmax(rows @ f.T / 0.3, dim=1) @ p for rows in f.split(2048)])
    errors = {}
    for name, maps in (("float32", features), ("bfloat16", features.bfloat16())):
        q = aggregate_probabilities(maps, probabilities, EXACT)[0].flatten(1).T.double()
        errors[name] = float((q - expected).norm() / expected.norm())
    return errors


def share_of_peak(device: str, seconds: float, cells: int = 16384) -> float:
    """Arithmetic of the bfloat16 aggregation over that of a bfloat16 matrix product of its size."""
    a = torch.randn(cells, FEATURES, device=device, dtype=torch.bfloat16)
    product = time_side_by_side({"product": lambda: untimed(a @ a.T)}, device, 5)["product"]
    rate = 2 * cells**2 * FEATURES / product
    return 2 * cells**2 * (FEATURES + 19) / seconds / rate


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sections = list(dict.fromkeys(row["section"] for row in rows))
    figure, axes = plt.subplots(2, len(sections), figsize=(5.5 * len(sections), 8), squeeze=False)
    for column, section in enumerate(sections):
        chosen = [row for row in rows if row["section"] == section]
        cases = list(dict.fromkeys(label_of(row) for row in chosen))
        names = list(dict.fromkeys(row["variant"] for row in chosen))
        for axis, key, unit in ((axes[0, column], "seconds", "s"), (axes[1, column], "megabytes", "extra MB")):
            for index, name in enumerate(names):
                points = [(cases.index(label_of(row)), row[key]) for row in chosen if row["variant"] == name]
                width = 0.8 / len(names)
                axis.bar([x + index * width for x, _ in points], [y for _, y in points], width, label=name)
            axis.set_xticks([x + 0.4 for x in range(len(cases))], cases, fontsize=7)
            axis.set_yscale("log")
            axis.set_title(f"{section}, {unit}")
        axes[0, column].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def label_of(row: dict) -> str:
    return " ".join(str(row[key]) for key in ("architecture", "cells", "classes", "images") if key in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads, for all variants")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one small case a section, to see that it runs")
    parser.add_argument(
        "--mean_iou",
        default=str(Path(__file__).parent / "mean_iou"),
        help="what evaluate.load gets: a local module, or `mean_iou` for the Hub's",
    )
    parser.add_argument("--output_dir", default="runs/benchmark")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    if args.worker:
        task = json.loads(args.worker)
        warm_up(args.device)
        print(extra_megabytes(SECTIONS[task["section"]](args.device, **task["case"])[task["variant"]], args.device))
        return
    print(
        f"{platform.machine()}, torch {torch.__version__}, {args.device}, {args.threads} threads, {args.rounds} rounds"
    )
    output, rows, summary = Path(args.output_dir), [], {}
    output.mkdir(parents=True, exist_ok=True)
    for section in args.sections:
        for case in cases_of(section, args):
            rows += (measured := measure(section, case, args))
            report(measured)
            (output / "benchmark.json").write_text(json.dumps({"rows": rows, **summary}, indent=2))
        if section == "aggregation" and not args.quick:
            summary["relative_errors"] = errors_of_aggregation(args.device)
            half = next(r["seconds"] for r in rows if r.get("cells") == 16384 and r["variant"] == "bfloat16")
            summary["share_of_matrix_product"] = share_of_peak(args.device, half)
            print(f"relative error against float64: {summary['relative_errors']}")
            print(f"share of the rate of a bfloat16 matrix product: {summary['share_of_matrix_product']:.2f}")
    (output / "benchmark.json").write_text(json.dumps({"rows": rows, **summary}, indent=2))
    if is_matplotlib_available():
        plot(rows, output / "benchmark.png")
    print(f"results: {output}")


if __name__ == "__main__":
    main()
