"""Sweeps as users start them: their recipes, their file of results, and what an interruption leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import yaml
from conftest import RAW_VOID
from filelock import FileLock
from huggingface_hub import get_token
from test_checkpoints import write_checkpoint

pytest.importorskip("ray")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import sweep  # noqa: E402
from study_train import StudyArguments  # noqa: E402

from pals_hf import PALSLoss  # noqa: E402
from pals_hf.cli.parser import to_argv  # noqa: E402
from pals_hf.cli.train import parse_arguments  # noqa: E402
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
        ("grid: {}\nother: 1", "and no other key"),
        ("grid: {seed: 3}", "axis seed must be a list"),
        ("grid: {seed: []}", "axis seed must be a list"),
        ("grid: {a: {x: {beta: 1}}, beta: [0.1]}", "axis beta sets beta, which another axis sets too"),
        (
            "common: {beta: 2}\ngrid: {a: {x: {beta: 1}}, beta: [0.1]}",
            "axis beta sets beta, which another axis sets",
        ),
        ("grid: {dataset_dir: [a/b]}", "dataset_dir=a/b names a folder and must not contain a slash"),
        ("grid: [", "cannot be read"),
        ("grid: {hub_token: [hf_a, hf_b]}", "hub_token cannot be an axis"),
    ],
)
def test_bad_recipes(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        sweep.read_cells(path)


def test_the_token_reaches_the_training_and_no_file(tmp_path, monkeypatch):
    """Neither the file of the flags nor the log has it, and the client of the Hub finds it."""
    found = []

    def train_main(argv):
        print(argv)
        found.append(get_token())
        raise InputError("stop here")

    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    monkeypatch.setattr(sweep.study_train, "main", train_main)
    for flag in ("hub_token", "hub_tok"):
        cell = sweep.Cell({"seed": "0"}, {"seed": 0, "push_to_hub": True, flag: "hf_ofTheRecipe"})
        with pytest.raises(RuntimeError, match="exit code 1"):
            sweep.run_cell(cell, tmp_path, 1)
        assert found.pop() == "hf_ofTheRecipe"
    assert os.environ["HF_TOKEN"] == "hf_of_the_user"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"seed=0.flags.json", "seed=0.lock", "seed=0.log"}
    assert not any("hf_ofTheRecipe" in path.read_text() for path in files)


CELLS = [sweep.Cell({"loss": "ce", "seed": str(seed)}, {"loss": "ce", "seed": seed}) for seed in (0, 1)]


def result_of(cell, **more):
    return {"place": cell.place, "flags": cell.flags, **more}


def test_results_are_found_by_their_place(tmp_path):
    assert sweep.read_results(tmp_path, CELLS) == {}
    other = sweep.Cell({"loss": "ce", "seed": "2"}, {})
    for cell, seconds in ((CELLS[1], 1), (other, 2), (CELLS[0], 3), (CELLS[1], 4)):
        sweep.append_result(tmp_path, result_of(cell, seconds=seconds))
    results = sweep.read_results(tmp_path, CELLS)
    assert list(results) == ["loss=ce,seed=0", "loss=ce,seed=1"]  # in the order of the recipe
    assert [result["seconds"] for result in results.values()] == [3, 4]
    turned = sweep.Cell(dict(reversed(CELLS[0].place.items())), CELLS[0].flags)  # the recipe's axes in another order
    assert sweep.read_results(tmp_path, [turned])["seed=0,loss=ce"]["seconds"] == 3
    with pytest.raises(InputError, match="the result of loss=ce,seed=0 was made with other flags"):
        sweep.read_results(tmp_path, [sweep.Cell(CELLS[0].place, {"loss": "pals"})])


def test_a_line_that_a_crash_tore(tmp_path):
    """The torn result is lost, wherever the crash cut it; those before it and after it are not."""
    sweep.append_result(tmp_path, result_of(CELLS[0]))
    path = sweep.results_path(tmp_path)
    whole = path.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + whole[:length])
        assert list(sweep.read_results(tmp_path, CELLS)) == [CELLS[0].name]
        sweep.append_result(tmp_path, result_of(CELLS[1]))
        assert list(sweep.read_results(tmp_path, CELLS)) == [cell.name for cell in CELLS]
        assert path.read_bytes().startswith(whole)
        assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("line", ["<<<<<<< ours", "{}", "[1]"])
def test_a_line_that_is_not_a_result(tmp_path, line):
    sweep.append_result(tmp_path, result_of(CELLS[0]))
    with open(sweep.results_path(tmp_path), "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match="line 2 is not a result"):
        sweep.read_results(tmp_path, CELLS)


def test_an_append_waits_for_that_of_another_sweep(tmp_path):
    path = sweep.results_path(tmp_path)
    with ThreadPoolExecutor() as pool:
        with FileLock(f"{path}.lock"):
            append = pool.submit(sweep.append_result, tmp_path, result_of(CELLS[0]))
            wait([append], timeout=0.5)
            assert not path.exists()
        append.result(timeout=60)
    assert list(sweep.read_results(tmp_path, CELLS)) == [CELLS[0].name]


def test_a_cell_that_another_sweep_trains(tmp_path, monkeypatch):
    """Its result is waited for and taken, and appears once."""
    monkeypatch.setattr(sweep, "train_cell", lambda *_: pytest.fail("trained again"))
    (tmp_path / "runs").mkdir()
    with ThreadPoolExecutor() as pool:
        with FileLock(tmp_path / "runs" / f"{CELLS[0].name}.lock"):
            cell = pool.submit(sweep.run_cell, CELLS[0], tmp_path, 1)
            wait([cell], timeout=0.5)
            assert not cell.done()
            sweep.append_result(tmp_path, result_of(CELLS[0], seconds=7))
        assert cell.result(timeout=60)["seconds"] == 7
    assert sweep.results_path(tmp_path).read_text().count("\n") == 1


def test_a_cell_goes_on_with_the_flags_it_began_with(tmp_path):
    cell = sweep.Cell({"seed": "0"}, {"learning_rate": 1e-4})
    began = sweep.begun_path(tmp_path, cell)
    began.parent.mkdir()
    began.write_text(json.dumps({"learning_rate": 1e-3}))
    sweep.refuse_other_flags(tmp_path, cell)  # it failed before there was anything to go on from
    write_checkpoint(tmp_path / "runs" / cell.name / "checkpoint-1")
    with pytest.raises(InputError, match="seed=0 was started with other flags than the recipe has now"):
        next(sweep.run_cells([cell], tmp_path))


def test_what_no_machine_can_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no machine has 1000 cores and 0 GPUs, so a cell would wait forever"):
        next(sweep.run_cells([sweep.Cell({"seed": "0"}, {})], tmp_path, cpus_per_cell=1000))


@pytest.mark.slow
def test_is_cut_and_goes_on(folder, tmp_path):
    """Killed once a first result exists; what is done is not done again. One cell fails, is retried and reported."""
    grid = {"method": {"ce": {"loss": "ce"}, "pals": {"loss": "pals"}, "bad": {"train_count": 99}}}  # of 8 images
    recipe, output = recipe_of(folder, grid), tmp_path / "sweep"
    running = start(recipe, output)
    results = sweep.results_path(output)
    deadline = time.time() + 120
    while not results.exists() and time.time() < deadline and running.poll() is None:
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    first = results.read_text()
    code, printed, errors = finish(start(recipe, output), output)
    assert code == 1
    assert "2 of 3 cells are done" in printed, errors[-2000:]
    assert "failed: method=bad: " in printed
    assert "train_count must be between 1 and 8 (the number of images), got 99" in printed
    assert results.read_text().startswith(first)
    log = (output / "runs" / "method=bad.log").read_text()
    assert log.count("error: train_count") >= 2  # tried again
    assert results.read_text().count("\n") == 2
    result = sweep.read_results(output, sweep.read_cells(recipe))["method=pals"]
    assert result["place"] == {"method": "pals"}
    assert result["flags"]["loss"] == "pals"
    assert result["loss_settings"]["affinity"]["tau"] == PALSLoss().affinity.tau  # which no flag gave
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


@pytest.mark.slow
def test_two_at_once_and_a_killed_training(folder, tmp_path):
    """Each cell is trained once, and its process may be killed."""
    grid = {"loss": ["ce", "label_smoothing"]}
    recipe, output = recipe_of(folder, grid, max_steps=60), tmp_path / "sweep"
    sweeps = [start(recipe, output)]
    log = output / "runs" / "loss=ce.log"
    deadline = time.time() + 120
    while not (log.exists() and "'loss'" in log.read_text()) and time.time() < deadline:
        time.sleep(0.1)
    sweeps.append(start(recipe, output))
    owner = (output / "runs" / "loss=ce" / "_lock-owner").read_text()
    os.kill(int(owner.split()[1]), signal.SIGKILL)
    for running in sweeps:
        code, printed, errors = finish(running, output)
        assert code == 0, errors[-2000:]
    assert "2 of 2 cells are done" in printed
    assert sweep.results_path(output).read_text().count("\n") == 2


@pytest.mark.parametrize("name", ["builtin", "camvid"])
def test_the_sweeps_of_the_examples(name):
    cells = sweep.read_cells(EXAMPLES / "sweeps" / f"{name}.yaml")
    assert len(cells) == 8
    for cell in cells:
        parse_arguments(to_argv(cell.flags), StudyArguments)
