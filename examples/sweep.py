#!/usr/bin/env python
"""Run a grid of trainings, on this machine or on a Ray cluster.

    pip install -e ".[sweep]"
    python examples/sweep.py examples/sweeps/builtin.yaml --output_dir runs/sweep

The recipe has the flags of study_train.py that all trainings share, and a grid of axes:

    common: {dataset_dir: camvid, void_labels: [11], max_steps: 500}
    grid:
      method:                             # an axis with named sets of flags
        ce: {loss: ce}
        pals: {loss: pals, beta: 0.5}
      train_fraction: [0.1, 0.5]          # an axis with values of one flag
      seed: [0, 1]

Each combination of values is a cell, which is one training. Its result is appended to `results.jsonl` as soon as the
training ends. An interrupted sweep resumes where it stopped, also within a training. A failed cell is retried. If it
fails again, it is reported at the end, and the exit code is 1. With several machines, all of them need access to the
data and the output folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import study_train
import yaml
from filelock import FileLock
from tqdm import tqdm

from pals_hf.checkpoints import last_complete_checkpoint
from pals_hf.cli.ending import fail
from pals_hf.cli.parser import to_argv
from pals_hf.errors import InputError
from pals_hf.files import atomic_write_text, read_json
from pals_hf.model_card import CardData, processor_name, versions


@dataclass(frozen=True)
class Cell:
    """One training of a sweep: its value on each axis, and its flags."""

    place: dict[str, str]
    flags: dict[str, Any]

    @property
    def name(self) -> str:
        return ",".join(f"{axis}={value}" for axis, value in self.place.items())

    @property
    def recorded(self) -> dict[str, Any]:
        """The flags without the token of the Hub, for files and command lines, which others can read."""
        return {name: value for name, value in self.flags.items() if not is_token(name)}

    @property
    def token(self) -> str | None:
        return next((str(value) for name, value in self.flags.items() if is_token(name) and value is not None), None)


def is_token(flag: str) -> bool:
    """Tell whether a flag is `hub_token`, which the parser also accepts in a shorter spelling."""
    return flag.startswith("hub_t")


def read_cells(path: Path) -> list[Cell]:
    """Return all cells of a recipe.

    Raises:
        InputError: the recipe is not valid, or two axes set the same flag.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: the recipe cannot be read: {error}") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("grid"), dict) or recipe.keys() - {"common", "grid"}:
        raise InputError(
            f"{path}: the recipe must have `grid`, a mapping of axes. It may have `common`, and no other key."
        )
    common, axes = recipe.get("common") or {}, {}
    for axis, values in recipe["grid"].items():
        if is_token(str(axis)):  # its values would become names of folders
            raise InputError(f"{path}: {axis} cannot be an axis. Set HF_TOKEN, or write it into `common`.")
        if isinstance(values, dict) and values and all(isinstance(flags, dict) for flags in values.values()):
            axes[axis] = [(str(name), flags) for name, flags in values.items()]
        elif isinstance(values, list) and values:
            axes[axis] = [(str(value), {axis: value}) for value in values]
        else:
            raise InputError(f"{path}: axis {axis} must be a list of values or a mapping of names to flags.")
    cells = []
    for combination in itertools.product(*axes.values()):
        place = {axis: name for axis, (name, _) in zip(axes, combination, strict=True)}
        flags: dict[str, Any] = {}
        for axis, (_, more) in zip(axes, combination, strict=True):
            if twice := more.keys() & flags.keys():
                raise InputError(f"{path}: axis {axis} sets {min(twice)}, which another axis sets too. Remove one.")
            flags |= more
        cells.append(Cell(place, {**common, **flags}))
    if bad := next((cell.name for cell in cells if "/" in cell.name), None):
        raise InputError(f"{path}: {bad} names a folder and must not contain a slash. Give that value a name.")
    return cells


def results_path(output_dir: Path) -> Path:
    return output_dir / "results.jsonl"


def read_results(output_dir: Path, cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """Return the results of the cells that are done, by the name of the cell, in the order of `cells`.

    A result belongs to the cell with the same place. If a place has several results, the last one counts.

    Raises:
        InputError: a line is not a result, or a result was made with other flags than the recipe has now.
    """
    path, by_place, done = results_path(output_dir), {}, {}
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(without_torn_line(content).splitlines(), start=1):
        try:
            result = json.loads(line)
            by_place[frozenset(result["place"].items())] = result
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise InputError(f"{path}: line {number} is not a result ({error!r}). Repair or delete it.") from error
    for cell in cells:
        result = by_place.get(frozenset(cell.place.items()))
        if result is None:
            continue
        if result["flags"] != as_json(cell.recorded):
            raise InputError(
                f"{path}: the result of {cell.name} was made with other flags than the recipe has now. "
                "Use another folder, or delete that line."
            )
        done[cell.name] = result
    return done


def append_result(output_dir: Path, result: dict[str, Any]) -> None:
    """Append a result to the file, so that neither a crash nor another sweep on the folder can mix up its lines."""
    path = results_path(output_dir)
    with FileLock(f"{path}.lock"), open(path, "a+b") as file:
        file.seek(0)
        file.truncate(len(without_torn_line(file.read())))
        file.write(json.dumps(result).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def without_torn_line(content: bytes) -> bytes:
    """Drop a last line without a line break: a crash cut it while it was written."""
    return content[: content.rfind(b"\n") + 1]


def as_json(flags: dict[str, Any]) -> dict[str, Any]:
    """Return flags as they read from a JSON file, to compare them with those of a result."""
    return json.loads(json.dumps(flags))


def refuse_other_flags(output_dir: Path, cell: Cell) -> None:
    """Check that an interrupted cell would resume with the flags it was started with.

    Raises:
        InputError: the recipe has other flags now.
    """
    began, folder = begun_path(output_dir, cell), output_dir / "runs" / cell.name
    if not began.exists() or last_complete_checkpoint(folder) is None:  # without a checkpoint, the cell starts anew
        return
    if read_json(began) != as_json(cell.recorded):
        raise InputError(
            f"{folder} was started with other flags than the recipe has now. Delete the folder to train it anew."
        )


def begun_path(output_dir: Path, cell: Cell) -> Path:
    return output_dir / "runs" / f"{cell.name}.flags.json"


def run_cell(cell: Cell, output_dir: Path, num_threads: int) -> dict[str, Any]:
    """Train one cell, from its last checkpoint if there is one, and return its result."""
    folder, begin = output_dir / "runs" / cell.name, time.time()
    folder.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(begun_path(output_dir, cell), json.dumps(cell.recorded))
    go_on = last_complete_checkpoint(folder) is not None
    flags = {**cell.recorded, "output_dir": str(folder), "num_threads": num_threads, "disable_tqdm": True}
    how = ["--resume_from_checkpoint", "last"] if go_on else ["--overwrite"]
    with token_in_environment(cell.token):
        train_here([*to_argv(flags), *how], Path(f"{folder}.log"))
    metrics = read_json(folder / "eval_results.json")
    return {
        "place": cell.place,
        "flags": cell.recorded,
        "loss_settings": CardData.load(folder).loss_settings,  # with the defaults of this version
        "classes": list(read_json(folder / "config.json")["id2label"].values()),
        "metrics": metrics,
        "seconds": time.time() - begin,
        "resumed": go_on,
        "machine": machine(num_threads),
        "versions": versions(),
    }


@contextmanager
def token_in_environment(token: str | None) -> Iterator[None]:
    """Let the Hub's client find the token in HF_TOKEN, so that it is in no file and no command line."""
    before = os.environ.get("HF_TOKEN")
    if token is not None:
        os.environ["HF_TOKEN"] = token
    try:
        yield
    finally:
        if token is not None:
            os.environ.pop("HF_TOKEN") if before is None else os.environ.update(HF_TOKEN=before)


def train_here(argv: list[str], log: Path) -> None:
    """Train in this process. It belongs to Ray, so that no training outlives its sweep.

    Raises:
        RuntimeError: the training failed. The message ends with the last line of its log.
    """
    with open(log, "a", encoding="utf-8") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            study_train.main(argv)
            return
        except SystemExit as stop:
            code = stop.code
        except Exception:
            traceback.print_exc()
            code = 1
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    raise RuntimeError(f"exit code {code}: {lines[-1] if lines else 'no output'} (log: {log})")


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
    """Run the cells that are not done yet. Yield each cell with its result, or with its error, as it finishes.

    Ray distributes and retries the cells, and survives the loss of a machine. By default, a cell uses all cores of a
    machine.

    Raises:
        InputError: the flags of a finished or interrupted cell have changed, or no machine is large enough for a cell.
    """
    done = read_results(output_dir, cells)
    for cell in (cell for cell in cells if cell.name in done):
        discard_checkpoints(output_dir, cell)  # the sweep may have been killed before it did
        yield cell, done[cell.name]
    wanted = [cell for cell in cells if cell.name not in done]
    if not wanted:
        return
    for cell in wanted:
        refuse_other_flags(output_dir, cell)
    output_dir.mkdir(parents=True, exist_ok=True)
    ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = cpus_per_cell or int(min(node.get("CPU", 1) for node in nodes))
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus_per_cell for node in nodes):
            raise InputError(
                f"no machine has {cpus} cores and {gpus_per_cell:g} GPUs, so a cell would wait forever. "
                "Lower --cpus_per_cell or --gpus_per_cell."
            )
        # Each cell has a process of its own, so that memory, threads and global state end with the training.
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
            append_result(output_dir, result)
            discard_checkpoints(output_dir, cell)
            yield cell, result
    finally:
        ray.shutdown()


def discard_checkpoints(output_dir: Path, cell: Cell) -> None:
    """Delete the checkpoints of a finished cell. The final model stays."""
    for checkpoint in (output_dir / "runs" / cell.name).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def reason_of(error: Exception) -> str:
    """Return the last line of an error that Ray passed on from another process."""
    return next(line.strip() for line in reversed(str(error).splitlines()) if line.strip())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file with the grid.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/sweep"), help="Folder for results and runs. Default: runs/sweep."
    )
    parser.add_argument("--address", help="Address of a Ray cluster, `auto` on its machines. Default: this machine.")
    parser.add_argument("--cpus_per_cell", type=int, help="CPU cores for each training. Default: all of a machine.")
    parser.add_argument("--gpus_per_cell", type=float, default=0, help="GPUs for each training. Default: 0.")
    parser.add_argument("--retries", type=int, default=1, help="How often to retry a failed cell. Default: 1.")
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
    print(f"{len(cells) - len(failed)} of {len(cells)} cells are done. Results: {results_path(output_dir)}")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
