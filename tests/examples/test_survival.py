"""The program, ended from outside at moments of all kinds, and started again with the same command."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import call, command, environment_of_launch, launcher
from safetensors.torch import load_file
from test_checkpoints import complete

from pals_hf.checkpoints import UNFINISHED
from pals_hf.cli import train

SCRIPT = Path(__file__).parents[2] / "examples" / "run_seg_pals.py"


class Running:
    """A started program in a process group of its own, what it prints going to a file."""

    def __init__(self, arguments, log, processes=1):
        program = launcher(SCRIPT, processes) if processes > 1 else [sys.executable, str(SCRIPT)]
        self.log = Path(log)
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                [*program, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**environment_of_launch(), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    def wait_for(self, condition, pause=0.02):
        deadline = time.time() + 120
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.time() < deadline, self.log.read_text()[-3000:]
            time.sleep(pause)

    def printed(self, text):
        return lambda: text in self.log.read_text()

    def end(self, number):
        os.killpg(self.process.pid, number)
        return self.finish()

    def finish(self):
        code = self.process.wait(timeout=300)
        return code, self.log.read_text()


def weights(output):
    return load_file(output / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm(processes, folder, tmp_path):
    """Saves, says how to go on, and leaves; the resumed run ends as the uninterrupted one."""
    options = ["--save_steps", 1000, "--dataloader_num_workers", 2, "--save_total_limit", 1]
    code, printed = Running(command(folder, tmp_path / "whole", 30, *options), tmp_path / "0", processes).finish()
    assert code == 0, printed[-3000:]
    assert "starting a new run" in printed
    output = tmp_path / "broken"
    run = Running(command(folder, output, 30, *options), tmp_path / "1", processes)
    run.wait_for(run.printed("'loss'"))
    code, printed = run.end(signal.SIGTERM)
    (checkpoint,) = complete_or_distributed(output, processes)
    assert f"stopped by SIGTERM; {checkpoint} is saved, resume with --resume_from_checkpoint {checkpoint}" in printed
    assert not (output / "eval_results.json").exists()
    assert not (output / "model.safetensors").exists()
    if processes == 1:
        assert code == 128 + signal.SIGTERM
        assert "Traceback" not in printed
    code, printed = Running(command(folder, output, 30, *options), tmp_path / "2", processes).finish()
    assert code == 0, printed[-3000:]
    assert f"resuming from {checkpoint}" in printed
    for name, tensor in weights(tmp_path / "whole").items():
        if processes == 1:
            assert torch.equal(weights(output)[name], tensor), name
        else:  # measured: at most 3e-8
            torch.testing.assert_close(weights(output)[name], tensor, rtol=1e-4, atol=1e-5)
    results = [json.loads((path / "eval_results.json").read_text()) for path in (tmp_path / "whole", output)]
    assert results[0]["eval_mean_iou"] == pytest.approx(results[1]["eval_mean_iou"], abs=0 if processes == 1 else 1e-3)


def everything(folder):
    """The contents and times of all files, and the times of the folders."""
    paths = [folder, *folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in paths}


class TestFinished:
    """A run that has its steps and its results is left alone, and one that lacks something gets just that."""

    def run(self, folder, output, max_steps, *options):
        result = call(
            train.main, *command(folder, output, max_steps, "--save_steps", 2, "--logging_steps", 1, *options)
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def left_alone(self, folder, output, *run):
        before = everything(output)
        printed = self.run(folder, output, *run)
        assert everything(output) == before
        (line,) = printed.splitlines()
        return line

    def test_is_left_alone(self, folder, tmp_path):
        output = tmp_path / "run"
        self.run(folder, output, 4, "--save_total_limit", 1)
        for resume in ("auto", "last", output, output / "checkpoint-4"):
            line = self.left_alone(folder, output, 4, "--save_total_limit", 1, "--resume_from_checkpoint", resume)
            assert line.startswith(f"{output} is finished: it has all of its 4 steps, and its results are in ")
            assert "raise --max_steps" in line
        self.left_alone(folder, output, 3)
        self.left_alone(folder, output, -1, "--num_train_epochs", 1)  # of 4 steps
        code = call(train.main, *command(folder, output, 4, "--loss", "ce"))
        assert (code.returncode, "another loss" in code.stderr) == (2, True)

        before = load_file(output / "checkpoint-4" / "model.safetensors")
        self.run(folder, output, -1, "--num_train_epochs", 1.5)  # more than before
        assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 6
        assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(output).items())
        self.left_alone(folder, output, 6)

    def test_results_that_a_kill_prevented_are_written(self, folder, tmp_path):
        """Without a further step, also of a run that was finished once and then went on."""
        output = tmp_path / "run"
        self.run(folder, output, 2)
        self.run(folder, output, 4)
        before = everything(output / "checkpoint-4"), weights(output)
        results = json.loads((output / "eval_results.json").read_text())
        for name in ("eval_results.json", "model.safetensors", "trainer_state.json", "README.md"):
            (output / name).unlink()
        assert "results, checkpoint and pictures: " in self.run(folder, output, 4)
        assert before[0] == everything(output / "checkpoint-4")
        assert all(torch.equal(tensor, before[1][name]) for name, tensor in weights(output).items())
        assert sorted(path.name for path in complete(output)) == ["checkpoint-2", "checkpoint-4"]
        assert json.loads((output / "eval_results.json").read_text())["eval_mean_iou"] == results["eval_mean_iou"]
        assert json.loads((output / "train_results.json").read_text())["train_loss"] is None
        assert (output / "README.md").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("is_killed", [True, False])
    def test_early_stopping(self, folder, tmp_path, is_killed):
        """A run that stopped early is finished, unless it gets more patience. A kill does not renew its patience."""
        output = tmp_path / "run"
        options = ["--load_best_model_at_end", "True", "--eval_strategy", "steps", "--eval_steps", 2]
        options += ["--learning_rate", 1e-30, "--freeze_batch_norm", "True", "--lr_scheduler_type", "constant"]

        def train(steps, patience):
            self.run(folder, output, steps, *options, "--early_stopping_patience", patience)
            return [int(path.name.split("-")[1]) for path in complete(output)]

        if is_killed:  # after the first evaluation that was no better
            assert train(4, 2) == [2, 4]
            (output / "eval_results.json").unlink()
        assert train(20, 2) == [2, 6]
        assert "6 steps" in self.left_alone(folder, output, 20, *options, "--early_stopping_patience", 2)
        (output / "eval_results.json").unlink()  # as if it had been killed before it was written
        assert train(20, 2) == [2, 6]
        assert train(8, 3) == [2, 8]


def complete_or_distributed(output, processes):
    return complete(output) if processes == 1 else list(output.glob("checkpoint-*"))


def test_two_runs_in_one_folder(folder, tmp_path):
    """The second refuses, and disturbs nothing."""
    output = tmp_path / "run"
    first = Running(command(folder, output, 500, "--save_steps", 1000), tmp_path / "first")
    first.wait_for(first.printed("'loss'"))
    before = sorted(path.name for path in output.iterdir())
    second = call(train.main, *command(folder, output, 500, "--overwrite"))
    assert second.returncode == 2
    assert f"error: output_dir {output} is in use by process {first.process.pid} on" in second.stderr
    assert sorted(path.name for path in output.iterdir()) == before
    assert first.process.poll() is None
    first.end(signal.SIGKILL)
    assert call(train.main, *command(folder, output, 1)).returncode == 0


def test_a_loss_that_is_no_number(folder, tmp_path):
    """One line that says where and why, exit code 1, and the checkpoints before it."""
    output = tmp_path / "run"
    result = call(train.main, *command(folder, output, 9, "--save_steps", 1, "--learning_rate", 1e30))
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"(loss is|norm is) (nan|inf) at step \d+, images street \d, street \d: ", line)
    (kept,) = output.glob("_non-finite-step-*")
    assert str(kept) in line
    assert not (output / "model.safetensors").exists()
    for checkpoint in complete(output):
        assert str(checkpoint) in line or int(checkpoint.name.split("-")[1]) < int(kept.name.split("-")[-1]) - 1


@pytest.mark.slow
def test_twenty_kills(folder, tmp_path):
    """SIGKILL at random moments, every second time while a checkpoint is being written: nothing is lost.

    After each, every checkpoint there is can be loaded, and the run goes on from the newest. It ends as the
    uninterrupted run, bit by bit.
    """
    generator, max_steps, kills = random.Random(0), 120, 0
    options = ["--save_steps", 1, "--save_total_limit", 3]
    code, printed = Running(command(folder, tmp_path / "whole", max_steps, *options), tmp_path / "whole.log").finish()
    assert code == 0, printed[-3000:]
    output, reached, while_writing = tmp_path / "broken", 0, 0
    while kills < 20:
        run = Running(command(folder, output, max_steps, *options), tmp_path / f"{kills}.log")
        run.wait_for(run.printed("'loss'"))
        run.wait_for(lambda: list(output.glob("checkpoint-*")))
        if kills % 2:
            time.sleep(generator.uniform(0.0, 1.0))
        else:
            run.wait_for(lambda: list(output.glob(f"{UNFINISHED}/checkpoint-*/*")), pause=0.001)
            time.sleep(generator.uniform(0.0, 0.03))
        run.end(signal.SIGKILL)
        kills += 1
        while_writing += bool(list(output.glob(f"{UNFINISHED}/checkpoint-*")))
        steps = [int(path.name.split("-")[1]) for path in complete(output)]
        assert steps, "no checkpoint is left"
        assert max(steps) >= reached
        if reached:
            assert f"resuming from {output / f'checkpoint-{reached}'}" in run.log.read_text()
        reached = max(steps)
        assert reached < max_steps, "the run was over before its kills were"
    print(f"{kills} kills, {while_writing} of them while a checkpoint was being written, {reached} steps reached")
    assert while_writing >= 5
    code, printed = Running(command(folder, output, max_steps, *options), tmp_path / "last.log").finish()
    assert code == 0, printed[-3000:]
    assert not (output / UNFINISHED).exists()
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(output).items())
    results = [json.loads((path / "eval_results.json").read_text()) for path in (tmp_path / "whole", output)]
    assert results[0]["eval_mean_iou"] == results[1]["eval_mean_iou"]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]
