#!/usr/bin/env python
"""Compare methods on fractions of a training set with paired runs, and report whether they differ.

    pip install -e ".[study]"
    python examples/study_fractions.py examples/studies/camvid --run

A study is a folder with a `recipe.yaml` of sweep.py, whose axes are `method`, `train_fraction` and `pair`. A pair is a
draw of training images and a seed, the same for all methods. `results.jsonl` has one result per line, and `--run`
appends the missing ones. From these results, this program writes:

- `table.md`, `table.csv`: the mean of each method, and its paired difference to each baseline with a 95 % interval
  (Student's t) and an exact two-sided p-value (sign-flip test over the pairs);
  runs with `--calibrate` also count as methods of their own with a temperature, like `ce, T`;
- `fractions.png`, `classes.png`, `reliability.png`: mIoU by fraction, IoU gain by class, and reliability diagrams.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from sweep import Cell, read_cells, read_results, reason_of, run_cells
from tqdm import tqdm

from pals_hf.cli.ending import ends_at_ctrl_c, fail
from pals_hf.errors import InputError
from pals_hf.files import atomic_write_text
from pals_hf.model_card import Comparison

AXES = ("method", "train_fraction", "pair")
MIN_PAIRS = 6  # with fewer pairs, p cannot be below 5 % in a sign-flip test
METRICS = {  # name: (key in the results, factor, unit)
    "mIoU": ("eval_mean_iou", 100, "%"),
    "mean accuracy": ("eval_mean_accuracy", 100, "%"),
    "pixel accuracy": ("eval_overall_accuracy", 100, "%"),
    "boundary IoU": ("eval_mean_boundary_iou", 100, "%"),
    "ECE": ("eval_ece", 100, "%"),
    "classwise ECE": ("eval_classwise_ece", 100, "%"),
    "NLL": ("eval_loss", 1, "nats"),
    "Brier": ("eval_brier", 1, ""),
}
SHOWN = {
    "mIoU": 2,
    "boundary IoU": 2,
    "ECE": 2,
    "NLL": 3,
}  # the metrics in table.md, with their decimals


# A method scored with a temperature is a method of its own. By the ending of its name, the prefix of its metrics:
VARIANTS = {
    "": "eval_uncalibrated_",
    ", T": "eval_calibrated_",  # cross-fitted on the scored images
    ", T of training images": "eval_moved_",  # fitted to training images that were held out for it
}


@dataclass(frozen=True)
class Difference:
    """The mean difference of a method to a baseline over pairs of runs, with its 95 % interval and p-value."""

    difference: float
    low: float
    high: float
    p: float
    pairs: int

    @classmethod
    def of(cls, method: np.ndarray, baseline: np.ndarray) -> Difference:
        """Compare values of the same pairs in the same order. For a single pair, interval and p are NaN."""
        differences = method - baseline
        if len(differences) < 2:
            return cls(float(differences.mean()), np.nan, np.nan, np.nan, len(differences))
        interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
        flips = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
        return cls(
            float(differences.mean()), float(interval.low), float(interval.high), float(flips.pvalue), len(differences)
        )

    def text(self, digits: int = 2) -> str:
        if np.isnan(self.low):
            return f"{self.difference:+.{digits}f}"
        return f"{self.difference:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def read_study(folder: Path, baselines: Sequence[str] = ()) -> list[Cell]:
    """Return all cells of a study's recipe.

    Raises:
        InputError: the axes are not those of a study, a fraction is not a number, or a baseline is not a method.
    """
    path = folder / "recipe.yaml"
    cells = read_cells(path)
    for cell in cells:
        if set(cell.place) != set(AXES):
            raise InputError(f"{path}: the axes must be {', '.join(AXES)}, got those of {cell.name}.")
        if not is_number(cell.place["train_fraction"]):
            raise InputError(
                f"{path}: train_fraction {cell.place['train_fraction']} must be a number or have a number as its name."
            )
    methods = list(dict.fromkeys(cell.place["method"] for cell in cells))
    for baseline in baselines:
        if baseline not in [method + ending for method in methods for ending in VARIANTS]:
            raise InputError(f"{path}: baseline {baseline} is not a method. Choose from {', '.join(methods)}.")
    return cells


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


class Results:
    """The results of a study: `cells[method, fraction]` is `{pair: result}`, `fractions` has those with results."""

    def __init__(self, folder: Path):
        self.cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        cells = read_study(folder)
        done = read_results(folder, cells)
        for cell in (cell for cell in cells if cell.name in done):
            for ending, metrics in scored_variants(done[cell.name]["metrics"]).items():
                key = cell.place["method"] + ending, cell.place["train_fraction"]
                self.cells.setdefault(key, {})[cell.place["pair"]] = {**done[cell.name], "metrics": metrics}
        names = dict.fromkeys(cell.place["method"] for cell in cells)
        found = {method for method, _ in self.cells}
        self.methods = [name + ending for name in names for ending in VARIANTS if not ending or name + ending in found]
        fractions = dict.fromkeys(cell.place["train_fraction"] for cell in cells)
        self.fractions = [f for f in fractions if any(fraction == f for _, fraction in self.cells)]
        self.missing = len(cells) - len(done)

    def values(self, method: str, fraction: str, read: Callable[[dict], float]) -> dict[str, float]:
        """Return the metric of each pair whose run has it."""
        results = self.cells.get((method, fraction), {})
        found = {pair: read(result["metrics"]) for pair, result in results.items()}
        return {pair: value for pair, value in found.items() if not np.isnan(value)}

    def compare(self, method: str, baseline: str, fraction: str, read: Callable[[dict], float]) -> Difference | None:
        """Compare two methods on the pairs that both have. Return None if there are none."""
        ours, theirs = (self.values(name, fraction, read) for name in (method, baseline))
        both = [pair for pair in ours if pair in theirs]
        if not both:
            return None
        return Difference.of(np.array([ours[pair] for pair in both]), np.array([theirs[pair] for pair in both]))


def scored_variants(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of a run by the ending of its method's name, see [`VARIANTS`]."""
    found = {"": metrics}
    for ending, prefix in VARIANTS.items():
        own = {name.replace(prefix, "eval_", 1): of for name, of in metrics.items() if name.startswith(prefix)}
        if own:
            found[ending] = {**metrics, **own}
    return found


def reader(key: str, factor: float) -> Callable[[dict], float]:
    """Return a function that reads a metric from a result's metrics, NaN if it is missing."""
    return lambda metrics: np.nan if metrics.get(key) is None else factor * metrics[key]


def baselines_of(method: str, baselines: list[str]) -> list[str]:
    """Return the baselines for a method: all of them, or for a baseline only those before it."""
    return baselines[: baselines.index(method)] if method in baselines else baselines


def table_rows(results: Results, baselines: list[str]) -> list[dict[str, Any]]:
    """Return a row for each method, metric and baseline. Without a baseline to compare with, there is one row."""
    rows = []
    for fraction in results.fractions:
        for method in results.methods:
            for name, (key, factor, unit) in METRICS.items():
                values = list(results.values(method, fraction, reader(key, factor)).values())
                if not values:
                    continue
                row = {"fraction": fraction, "method": method, "metric": name, "unit": unit, "runs": len(values)}
                row |= {
                    "mean": float(np.mean(values)),
                    "deviation": float(np.std(values, ddof=1)) if values[1:] else None,
                }
                compared = [
                    {"against": baseline, **vars(difference)}
                    for baseline in baselines_of(method, baselines)
                    if (difference := results.compare(method, baseline, fraction, reader(key, factor)))
                ]
                rows += [row | difference for difference in compared or [{}]]
    return rows


def markdown(results: Results, baselines: list[str]) -> str:
    """Return a table of means and a table of differences for each fraction."""
    lines = []
    for fraction in results.fractions:
        means, differences = [], []
        for method in results.methods:
            values = {name: results.values(method, fraction, reader(*METRICS[name][:2])) for name in SHOWN}
            if not values["mIoU"]:
                continue
            cells = [f"{np.mean(list(of.values())):.{SHOWN[name]}f}" if of else "" for name, of in values.items()]
            means.append([method, str(len(values["mIoU"])), *cells])
            for baseline in baselines_of(method, baselines):
                of = {name: results.compare(method, baseline, fraction, reader(*METRICS[name][:2])) for name in SHOWN}
                if of["mIoU"] is None:
                    continue
                p = "" if np.isnan(of["mIoU"].p) else f"{of['mIoU'].p:.3f}"
                cells = [of[name].text(SHOWN[name]) if of[name] else "" for name in SHOWN]
                differences.append([method, baseline, str(of["mIoU"].pairs), *cells, p])
        if not means:
            continue
        lines += [f"### {float(fraction):.0%} of the training images", ""]
        lines += table(["method", "runs", *SHOWN], means)
        if differences:
            lines += table(["method", "against", "pairs", *SHOWN, "p of mIoU"], differences)
    lines.append(
        "Values are means over pairs of (draw, seed). Differences are paired, with 95 % intervals in brackets. A "
        f"difference is inconclusive if its interval contains 0, or if it rests on fewer than {MIN_PAIRS} pairs."
    )
    if results.missing:
        lines.append(f"Runs of the recipe without a result: {results.missing}.")
    return "\n".join(lines) + "\n"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def comparison(results: Results, fraction: str, study: str, own: str, baseline: str = "ce") -> Comparison:
    """Return the comparison for a model card: the methods that were run on the same pairs as the checkpoint's.

    Args:
        results: The results of the study.
        fraction: The fraction, as the recipe names it.
        study: The folder of the study, as the card shows it.
        own: The method of the card's checkpoint.
        baseline: The method that the others are compared with.
    """
    rows, mean_iou, ece = [], reader("eval_mean_iou", 100), reader("eval_ece", 100)
    pairs = results.cells.get((own, fraction), {})
    for method in comparable(results, fraction, own):
        scores, eces = (results.values(method, fraction, read) for read in (mean_iou, ece))
        difference = results.compare(method, baseline, fraction, mean_iou)
        rows.append(
            {
                "method": f"{method} (this checkpoint)" if method == own else method,
                "runs": len(scores),
                "mean_iou": f"{np.mean(list(scores.values())):.2f}",
                "difference": "" if method == baseline or difference is None else difference.text(),
                "ece": f"{np.mean(list(eces.values())):.2f}" if eces else "",
            }
        )
    count = f"{len(pairs)} {'pair' if len(pairs) == 1 else 'pairs'} of draw and seed"
    return Comparison(study, count if len(pairs) >= MIN_PAIRS else f"{count}, too few for a claim", rows)


def plot(results: Results, folder: Path, baseline: str) -> None:
    plot_fractions(results, folder / "fractions.png", baseline)
    plot_classes(results, folder / "classes.png", baseline)
    plot_reliability(results, folder / "reliability.png", baseline)


def comparable(results: Results, fraction: str, baseline: str) -> list[str]:
    """Return the methods whose means are comparable with the baseline's, because they have the same pairs."""
    pairs = results.cells.get((baseline, fraction), {}).keys()
    return [m for m in results.methods if pairs and results.cells.get((m, fraction), {}).keys() == pairs]


def styles(results: Results) -> dict[str, dict[str, Any]]:
    """Return a line style for each method with results: ten colours, then the same colours with other dashes."""
    from matplotlib import colormaps

    found = [method for method in results.methods if any(key[0] == method for key in results.cells)]
    colors, lines = colormaps["tab10"].colors, ("-", "--", ":")
    return {
        method: {"color": colors[index % len(colors)], "linestyle": lines[index // len(colors) % len(lines)]}
        for index, method in enumerate(found)
    }


def legend(figure: Any, axes: Any) -> None:
    """Draw one legend above the panels, with the methods of all of them."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", fontsize=8, ncols=4)


def plot_fractions(results: Results, path: Path, baseline: str) -> None:
    """Plot the mIoU over the fraction, with 95 % bands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis, shown = figure.subplots(), {f: comparable(results, f, baseline) for f in results.fractions}
    for method, style in styles(results).items():
        points = []
        for fraction in (fraction for fraction in results.fractions if method in shown[fraction]):
            values = np.array(list(results.values(method, fraction, reader("eval_mean_iou", 100)).values()))
            half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else 0.0
            points.append((100 * float(fraction), values.mean(), half))
        if points:
            x, y, half = map(np.array, zip(*points, strict=True))
            axis.plot(x, y, marker="o", label=method, **style)
            axis.fill_between(x, y - half, y + half, alpha=0.1, color=style["color"])
    axis.set(xlabel="training images, %", ylabel="mIoU, %")
    legend(figure, [axis])
    figure.savefig(path, dpi=110)


def plot_classes(results: Results, path: Path, baseline: str) -> None:
    """Plot the mean IoU gain of each class over the baseline, one panel for each fraction."""
    from matplotlib.figure import Figure

    names = next((r["classes"] for cell in results.cells.values() for r in cell.values() if "classes" in r), None)
    figure = Figure(figsize=(8, 2.6 * len(results.fractions)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(results.fractions), 1))
    for axis, fraction in zip(axes, results.fractions, strict=True):
        gains = {
            method: class_gains(results, method, baseline, fraction)
            for method in comparable(results, fraction, baseline)
            if method != baseline
        }
        for index, (method, of) in enumerate(gains.items()):
            style, width = styles(results)[method], 0.8 / len(gains)
            hatch = {"-": None, "--": "//////", ":": "......"}[style["linestyle"]]
            at = np.arange(len(of)) + width * index
            axis.bar(at, of, width, color=style["color"], hatch=hatch, edgecolor="white", linewidth=0, label=method)
        if names:
            axis.set_xticks(np.arange(len(names)) + 0.4, names, fontsize=7, rotation=30)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(f"{float(fraction):.0%}: IoU against {baseline}, points", fontsize=9)
    legend(figure, axes)
    figure.savefig(path, dpi=110)


def class_gains(results: Results, method: str, baseline: str, fraction: str) -> np.ndarray:
    """Return the mean IoU gain of each class over the baseline, in points. NaN for a class without an IoU."""
    ours, theirs = (results.cells.get((name, fraction), {}) for name in (method, baseline))
    gains = [
        100
        * np.subtract(
            *(np.array(runs[pair]["metrics"]["eval_per_category_iou"], dtype=float) for runs in (ours, theirs))
        )
        for pair in ours
        if pair in theirs
    ]
    return np.array(
        [np.mean([gain for gain in of if not np.isnan(gain)] or [np.nan]) for of in zip(*gains, strict=True)]
    )


def plot_reliability(results: Results, path: Path, baseline: str) -> None:
    """Plot accuracy over confidence, averaged over all runs of a method, one panel for each fraction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results.fractions), 4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(results.fractions)))
    for axis, fraction in zip(axes, results.fractions, strict=True):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for method in comparable(results, fraction, baseline):
            runs = [r["metrics"].get("eval_reliability") for r in results.cells[method, fraction].values()]
            bins = np.array([run for run in runs if run], dtype=float)
            if len(bins):
                share = bins[..., 0].sum(axis=0)
                points = np.nansum(bins[..., 1:] * bins[..., :1], axis=0) / np.where(share, share, np.nan)[:, None]
                axis.plot(points[:, 0], points[:, 1], marker=".", label=method, **styles(results)[method])
        axis.set(xlabel="confidence", ylabel="share of hits", title=f"{float(fraction):.0%}")
    legend(figure, axes)
    figure.savefig(path, dpi=110)


def run_missing(folder: Path, options: dict[str, Any]) -> bool:
    """Train the missing runs, and return whether all of them succeeded."""
    cells, worked = read_study(folder), True
    with tqdm(total=len(cells), desc="runs") as progress:
        for cell, result in run_cells(cells, folder, **options):
            progress.update()
            if isinstance(result, Exception):
                worked = False
                progress.write(f"{cell.name}: failed: {reason_of(result)}")
            else:
                progress.write(f"{cell.name}: mIoU {100 * result['metrics']['eval_mean_iou']:.2f}")
    return worked


@ends_at_ctrl_c
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="Folder of the study, with its recipe.yaml.")
    parser.add_argument("--run", action="store_true", help="Train the missing runs first.")
    parser.add_argument(
        "--baseline", nargs="+", default=["ce"], help="Methods to compare the others with. Figures use the first one."
    )
    parser.add_argument("--address", help="Address of a Ray cluster, `auto` on its machines. Default: this machine.")
    parser.add_argument("--cpus_per_cell", type=int, help="CPU cores for each training. Default: all of a machine.")
    parser.add_argument("--gpus_per_cell", type=float, default=0, help="GPUs for each training. Default: 0.")
    options = vars(parser.parse_args(argv))
    folder, baselines, worked = options.pop("study"), options.pop("baseline"), True
    try:
        read_study(folder, baselines)  # fail before days of training, not after
        if options.pop("run"):
            worked = run_missing(folder, options)
        results = Results(folder)
        if not results.cells:
            raise InputError(f"{folder} has no results yet. Train the runs with --run.")
    except InputError as error:
        fail(error)
    rows = table_rows(results, baselines)
    atomic_write_text(folder / "table.md", markdown(results, baselines))
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    plot(results, folder, baselines[0])
    print((folder / "table.md").read_text(encoding="utf-8"))
    sys.exit(0 if worked else 1)


if __name__ == "__main__":
    main()
