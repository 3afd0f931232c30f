"""A sweep as people start it, cut in the middle and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import RAW_VOID
from test_checkpoints import write_checkpoint

pytest.importorskip("ray")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import run_seg_pals  # noqa: E402
import sweep  # noqa: E402

from pals_hf import PALSLoss  # noqa: E402
from pals_hf.errors import InputError  # noqa: E402

SHORT = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "eval_strategy": "no"}


def recipe_of(folder, grid, **more):
    common = {"dataset_dir": str(folder), "void_labels": [RAW_VOID], "crop_size": [32, 32], **SHORT, **more}
    path = folder.parent / "sweep.yaml"
    path.write_text(yaml.safe_dump({"common": common, "grid": grid}, sort_keys=False))
    return path


def start(recipe, output):
    """Into files: Ray's own processes keep pipes open for a while after a kill."""
    command = [sys.executable, EXAMPLES / "sweep.py", recipe, "--output_dir", output]
    with open(f"{output}.out", "w") as out, open(f"{output}.err", "w") as err:
        return subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, start_new_session=True)


def finish(running, output):
    """What it printed."""
    code = running.wait(timeout=240)
    return code, Path(f"{output}.out").read_text(), Path(f"{output}.err").read_text()


def test_cells(folder):
    grid = {"method": {"ce": {"loss": "ce"}, "soft": {"loss": "pals", "beta": 0.2}}, "seed": [0, 1]}
    cells = sweep.read_cells(recipe_of(folder, grid))
    assert [cell.name for cell in cells] == [f"method={m},seed={s}" for m in ("ce", "soft") for s in (0, 1)]
    assert cells[3].place == {"method": "soft", "seed": "1"}
    assert (cells[3].flags["beta"], cells[3].flags["seed"], cells[3].flags["max_steps"]) == (0.2, 1, 2)
    assert "beta" not in cells[0].flags


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "must have `grid`"),
        ("grid: {}\nother: 1", "and nothing else"),
        ("grid: {seed: 3}", "axis seed must be a list"),
        ("grid: {seed: []}", "axis seed must be a list"),
        ("grid: {a: {x: {beta: 1}}, beta: [0.1]}", "axis beta gives beta, which another axis gives too"),
        (
            "common: {beta: 2}\ngrid: {a: {x: {beta: 1}}, beta: [0.1]}",
            "axis beta gives beta, which another axis gives",
        ),
        ("grid: {dataset_dir: [a/b]}", "must have no slash"),
        ("grid: [", "cannot be read"),
    ],
)
def test_bad_recipes(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        sweep.read_cells(path)


def test_a_cell_goes_on_with_the_flags_it_began_with(tmp_path):
    cell = sweep.Cell({"seed": "0"}, {"learning_rate": 1e-4})
    began = sweep.begun_path(tmp_path, cell)
    began.parent.mkdir()
    began.write_text(json.dumps({"learning_rate": 1e-3}))
    sweep.refuse_other_flags(tmp_path, cell)  # it failed before there was anything to go on from
    write_checkpoint(tmp_path / "runs" / cell.name / "checkpoint-1")
    with pytest.raises(InputError, match="seed=0 was begun with other flags than the recipe has now: delete"):
        next(sweep.run_cells([cell], tmp_path))


def test_what_no_machine_can_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no machine has 1000 cores and 0 GPUs: a cell would wait for ever"):
        next(sweep.run_cells([sweep.Cell({"seed": "0"}, {})], tmp_path, cpus_per_cell=1000))


@pytest.mark.slow
def test_is_cut_and_goes_on(folder, tmp_path):
    """Killed once a first result exists; what is done is not done again. One cell fails, is retried and reported."""
    grid = {"method": {"ce": {"loss": "ce"}, "pals": {"loss": "pals"}, "bad": {"train_count": 99}}}  # of 8 images
    recipe, output = recipe_of(folder, grid), tmp_path / "sweep"
    running = start(recipe, output)
    results = output / "results"
    deadline = time.time() + 120
    while not list(results.glob("*.json")) and time.time() < deadline and running.poll() is None:
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    (first,) = results.glob("*.json")
    before = first.read_text(), first.stat().st_mtime_ns
    code, printed, errors = finish(start(recipe, output), output)
    assert code == 1
    assert "2 of 3 cells are done" in printed, errors[-2000:]
    assert "failed: method=bad: " in printed
    assert "train_count must lie between 1 and the 8 images there are, got 99" in printed
    assert (first.read_text(), first.stat().st_mtime_ns) == before
    log = (output / "runs" / "method=bad.log").read_text()
    assert log.count("error: train_count") >= 2  # tried again
    result = json.loads((results / "method=pals.json").read_text())
    assert result["place"] == {"method": "pals"}
    assert result["flags"]["loss"] == "pals"
    assert result["loss_settings"]["tau"] == PALSLoss().affinity["tau"]  # which no flag gave
    assert 0 <= result["metrics"]["eval_mean_iou"] <= 1
    assert result["classes"] == ["ground", "wall", "sky", "car"]
    assert result["versions"]["torch"]
    assert result["machine"]["threads"] >= 1
    assert not list((output / "runs").glob("*/checkpoint-*"))
    assert (output / "runs" / "method=pals" / "model.safetensors").exists()

    recipe_of(folder, grid, max_steps=3)
    code, _, errors = finish(start(recipe, output), output)
    assert code == 2
    assert "was made with other flags than the recipe has now" in errors


@pytest.mark.parametrize("name", ["builtin", "camvid"])
def test_the_sweeps_of_the_examples(name):
    cells = sweep.read_cells(EXAMPLES / "sweeps" / f"{name}.yaml")
    assert len(cells) == 8
    for cell in cells:
        run_seg_pals.parse_arguments(run_seg_pals.to_argv(cell.flags))
