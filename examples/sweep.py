#!/usr/bin/env python
"""Run a grid of trainings, on this machine or on a Ray cluster.

    pip install -e ".[sweep]"
    python examples/sweep.py examples/sweeps/builtin.yaml --output_dir runs/sweep

The recipe has flags of run_seg_pals.py that all trainings share, and axes whose values are combined:

    common: {dataset_dir: camvid, void_labels: [11], max_steps: 500}
    grid:
      method:                             # an axis of named sets of flags
        ce: {loss: ce}
        pals: {loss: pals, beta: 0.5}
      train_fraction: [0.1, 0.5]          # an axis of values of one flag
      seed: [0, 1]

Each cell is a training of its own; its result is written to `results/CELL.json` as soon as it exists. A sweep that was
interrupted goes on where it stopped, inside a training too. A cell that fails is tried again, and then reported at the
end, with exit code 1. On several machines the output folder and the data must be where all of them see them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import run_seg_pals
import yaml
from run_seg_pals import fail, to_argv
from tqdm import tqdm

from pals_hf.checkpoints import last_complete_checkpoint
from pals_hf.errors import InputError
from pals_hf.files import write_whole
from pals_hf.model_card import CardData, processor_name, versions


@dataclass(frozen=True)
class Cell:
    """One training of a sweep: where it stands on each axis, and its flags."""

    place: dict[str, str]
    flags: dict[str, Any]

    @property
    def name(self) -> str:
        return ",".join(f"{axis}={value}" for axis, value in self.place.items())


def read_cells(path: Path) -> list[Cell]:
    """All cells of a recipe.

    Raises:
        InputError: it is no recipe of a sweep, or a flag is given twice.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("grid"), dict) or recipe.keys() - {"common", "grid"}:
        raise InputError(f"recipe {path} must have `grid`, a mapping of axes, and may have `common`, and nothing else")
    common, axes = recipe.get("common") or {}, {}
    for axis, values in recipe["grid"].items():
        if isinstance(values, dict) and values and all(isinstance(flags, dict) for flags in values.values()):
            axes[axis] = [(str(name), flags) for name, flags in values.items()]
        elif isinstance(values, list) and values:
            axes[axis] = [(str(value), {axis: value}) for value in values]
        else:
            raise InputError(f"recipe {path}: axis {axis} must be a list of values, or names with their flags")
    cells = []
    for combination in itertools.product(*axes.values()):
        place = {axis: name for axis, (name, _) in zip(axes, combination, strict=True)}
        flags: dict[str, Any] = {}
        for axis, (_, more) in zip(axes, combination, strict=True):
            if twice := more.keys() & flags.keys():
                raise InputError(f"recipe {path}: axis {axis} gives {min(twice)}, which another axis gives too")
            flags |= more
        cells.append(Cell(place, {**common, **flags}))
    if bad := next((cell.name for cell in cells if "/" in cell.name), None):
        raise InputError(f"recipe {path}: {bad} is to be a file name, so values of axes must have no slash: name them")
    return cells


def result_path(output_dir: Path, cell: Cell) -> Path:
    return output_dir / "results" / f"{cell.name}.json"


def read_result(output_dir: Path, cell: Cell) -> dict[str, Any] | None:
    """The result of a cell that is done.

    Raises:
        InputError: there is a result, of a training with other flags.
    """
    path = result_path(output_dir, cell)
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["flags"] != json.loads(json.dumps(cell.flags)):
        raise InputError(f"{path} was made with other flags than the recipe has now: take another --output_dir")
    return result


def refuse_other_flags(output_dir: Path, cell: Cell) -> None:
    """A cell that was cut goes on with the flags that it began with.

    Raises:
        InputError: the recipe has others now.
    """
    began, folder = begun_path(output_dir, cell), output_dir / "runs" / cell.name
    if not began.exists() or last_complete_checkpoint(folder) is None:  # or it failed before it got anywhere
        return
    if json.loads(began.read_text(encoding="utf-8")) != json.loads(json.dumps(cell.flags)):
        raise InputError(f"{folder} was begun with other flags than the recipe has now: delete it")


def begun_path(output_dir: Path, cell: Cell) -> Path:
    return output_dir / "runs" / f"{cell.name}.flags.json"


def run_cell(cell: Cell, output_dir: Path, num_threads: int) -> dict[str, Any]:
    """Train one cell, from its last checkpoint if it has one, and return what there is to know of it."""
    folder, begin = output_dir / "runs" / cell.name, time.time()
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_whole(begun_path(output_dir, cell), json.dumps(cell.flags))
    go_on = last_complete_checkpoint(folder) is not None
    flags = {**cell.flags, "output_dir": str(folder), "num_threads": num_threads, "disable_tqdm": True}
    how = ["--resume_from_checkpoint", "last"] if go_on else ["--overwrite"]
    train_here([*to_argv(flags), *how], Path(f"{folder}.log"))
    metrics = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    return {
        "place": cell.place,
        "flags": cell.flags,
        "loss_settings": CardData.load(folder).loss_settings,  # flags leave to defaults what may change with a version
        "classes": list(json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"].values()),
        "metrics": metrics,
        "seconds": time.time() - begin,
        "resumed": go_on,
        "machine": machine(num_threads),
        "versions": versions(),
    }


def train_here(argv: list[str], log: Path) -> None:
    """Train in this process, which ends with Ray's: no training outlives its sweep.

    Raises:
        RuntimeError: it failed; the message is the last line of its log.
    """
    with open(log, "a", encoding="utf-8") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            run_seg_pals.main(argv)
            return
        except SystemExit as stop:
            code = stop.code
        except Exception:
            traceback.print_exc()
            code = 1
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    raise RuntimeError(f"exit code {code}: {lines[-1] if lines else 'no output'}, see {log}")


def machine(num_threads: int) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": processor_name(), "threads": num_threads, "gpu": gpu}


def run_cells(
    cells: list[Cell],
    output_dir: Path,
    *,
    address: str | None = None,
    cpus_per_cell: int | None = None,
    gpus_per_cell: float = 0,
    retries: int = 1,
) -> Iterator[tuple[Cell, dict[str, Any] | Exception]]:
    """Run what is not done yet, and give each cell with its result, or with what went wrong, as it comes.

    Ray places the cells, retries them and survives lost machines. By default one cell takes a machine's cores.
    """
    done = {cell.name: result for cell in cells if (result := read_result(output_dir, cell)) is not None}
    for cell in (cell for cell in cells if cell.name in done):
        discard_checkpoints(output_dir, cell)  # maybe killed before it could
        yield cell, done[cell.name]
    wanted = [cell for cell in cells if cell.name not in done]
    if not wanted:
        return
    for cell in wanted:
        refuse_other_flags(output_dir, cell)
    (output_dir / "results").mkdir(parents=True, exist_ok=True)
    ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = cpus_per_cell or int(min(node.get("CPU", 1) for node in nodes))
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus_per_cell for node in nodes):
            raise InputError(f"no machine has {cpus} cores and {gpus_per_cell:g} GPUs: a cell would wait for ever")
        # One cell a process: what a training leaves behind - memory, threads, a state of its own - ends with it.
        remote = ray.remote(
            num_cpus=cpus, num_gpus=gpus_per_cell, max_retries=retries, retry_exceptions=True, max_calls=1
        )(run_cell)
        running = {remote.remote(cell, output_dir.resolve(), cpus): cell for cell in wanted}
        while running:
            (ready, *_), _ = ray.wait(list(running))
            cell = running.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayError as error:
                yield cell, error
                continue
            write_whole(result_path(output_dir, cell), json.dumps(result, indent=2))
            discard_checkpoints(output_dir, cell)
            yield cell, result
    finally:
        ray.shutdown()


def discard_checkpoints(output_dir: Path, cell: Cell) -> None:
    """What a finished cell has no use for: its model stays, the optimizer's state was for going on."""
    for checkpoint in (output_dir / "runs" / cell.name).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def reason_of(error: Exception) -> str:
    """The last line of an error that crossed processes."""
    return next(line.strip() for line in reversed(str(error).splitlines()) if line.strip())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--address", help="Ray cluster, like `auto` on one of its machines. Default: this machine.")
    parser.add_argument("--cpus_per_cell", type=int, help="Cores of a training. Default: all of a machine.")
    parser.add_argument("--gpus_per_cell", type=float, default=0)
    parser.add_argument("--retries", type=int, default=1, help="How often a failed cell is tried again.")
    options = vars(parser.parse_args(argv))
    output_dir, failed = options.pop("output_dir"), {}
    try:
        cells = read_cells(options.pop("recipe"))
        with tqdm(total=len(cells), desc="cells") as progress:
            for cell, result in run_cells(cells, output_dir, **options):
                progress.update()
                if isinstance(result, Exception):
                    failed[cell.name] = reason_of(result)
                    progress.write(f"{cell.name}: failed")
                else:
                    score = result["metrics"]["eval_mean_iou"]
                    progress.write(f"{cell.name}: mIoU {score:.4f}, {result['seconds']:.0f} s")
    except InputError as error:
        fail(error)
    print(f"{len(cells) - len(failed)} of {len(cells)} cells are done: {output_dir / 'results'}")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
