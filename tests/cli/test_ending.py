"""How programs end: in one line, whatever a library raises before the first step, at ctrl-C, and without a reader."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import RAW_VOID
from hub import TOKEN
from launching import call, command
from test_checkpoints import complete
from transformers.utils import logging

from pals_hf.cli import train
from pals_hf.cli.ending import one_line
from pals_hf.errors import InputError, TrainingError
from pals_hf.trainer import PALSTrainer

ROOT = Path(__file__).parents[2]


def raising(error, is_setup=True, argv=()):
    def main(arguments):
        with one_line(lambda: is_setup, list(argv)):
            raise error

    return call(main)


def allocate():
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        return error


class TestOneLine:
    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (InputError("a.png is empty"), "a.png is empty"),
            (ImportError("install x\nor y"), "install x"),
            (KeyError("lr"), "KeyError: 'lr'"),
            (AssertionError(), "AssertionError"),
            (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
            (RuntimeError("Caught RuntimeError in worker.\nTraceback ...\nRuntimeError: no shared memory"), None),
        ],
    )
    def test_before_the_first_step(self, error, line):
        ended = raising(error)
        line = line or "RuntimeError: no shared memory"
        assert (ended.returncode, ended.stderr) == (2, f"error: {line}\n")

    def test_names_the_flags(self):
        flags = ["--output_dir", "o", "--optim", "lomo", "--adam_beta1=0.5", "--report_to", "none"]
        for message, given in (
            ("no module lomo", " (given: --optim lomo)"),
            ("bad momentum", " (given: --optim lomo, --adam_beta1 0.5)"),
            ("`adam_beta1` is bad", ""),
        ):
            assert raising(ValueError(message), argv=flags).stderr == f"error: {message}{given}\n"

    def test_a_bug_after_the_first_step_keeps_its_traceback(self):
        with pytest.raises(KeyError):
            raising(KeyError("loss"), is_setup=False)

    @pytest.mark.parametrize(
        "error", [OSError(28, "No space left on device", "/x/log"), allocate(), TrainingError("NaN")]
    )
    def test_machines_that_are_too_small(self, error):
        ended = raising(error, is_setup=False)
        assert ended.returncode == 1
        assert ended.stderr.count("\n") == 1

    def test_shows_the_traceback_on_request(self):
        before = logging.get_verbosity()
        logging.set_verbosity_debug()
        try:
            assert "Traceback" in raising(KeyError("lr")).stderr
        finally:
            logging.set_verbosity(before)


def on(folder, tmp_path, *flags):
    start = ["--dataset_dir", folder, "--void_labels", RAW_VOID, "--output_dir", tmp_path / "run", "--max_steps", "2"]
    return [
        *map(str, start),
        "--per_device_train_batch_size",
        "2",
        "--disable_tqdm",
        "True",
        "--report_to",
        "none",
        *flags,
    ]


@pytest.mark.parametrize("step", [0, 1])
def test_the_line_is_the_first_step(folder, tmp_path, step, monkeypatch):
    """A library that fails in the first step fails for the input; one that fails later has a bug."""
    original = PALSTrainer.training_step

    def training_step(trainer, *args, **kwargs):
        if trainer.state.global_step == step:
            raise AttributeError("no gradient")
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(PALSTrainer, "training_step", training_step)
    if step:
        with pytest.raises(AttributeError, match="no gradient"):
            call(train.main, *on(folder, tmp_path))
    else:
        ended = call(train.main, *on(folder, tmp_path))
        assert ended.returncode == 2
        assert "error: AttributeError: no gradient" in ended.stderr


def test_the_line_begins_after_progress_bars(folder, tmp_path):
    flags = on(folder, tmp_path, "--learning_rate", "1e30", "--disable_tqdm", "False")
    ended = call(train.main, *flags)
    assert ended.stderr.splitlines()[-1].startswith("error: ")


class TestStandardOutput:
    PROGRAM = "from pals_hf.cli.ending import one_line\nwith one_line():\n    {}\n    open('done', 'w').close()\n"

    def run(self, body, tmp_path, **options):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
        command = [sys.executable, "-c", self.PROGRAM.format(body)]
        return subprocess.run(command, cwd=tmp_path, env=environment, timeout=120, **options)

    def test_any_text_in_any_encoding(self, tmp_path):
        ended = self.run("print('straße', '\\udcff')", tmp_path, capture_output=True)
        assert (ended.returncode, ended.stdout) == (0, b"stra\\xdfe \\udcff\n")

    def test_a_reader_that_is_gone(self, tmp_path):
        """A training goes on: its results are in files."""
        reader, writer = os.pipe()
        os.close(reader)
        ended = self.run(
            "for _ in range(9): print('x' * 9999, flush=True)", tmp_path, stdout=writer, stderr=subprocess.PIPE
        )
        os.close(writer)
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert (tmp_path / "done").exists()


def test_an_interrupt_that_python_drops(zygote, tmp_path):
    run = zygote.start("endings:is_interrupted_in_a_destructor", log=tmp_path / "log")
    assert run.finish(timeout=30) == (130, "stopped by SIGINT\n")


def test_threads_draw_nothing_behind_the_last_line(zygote, tmp_path):
    run = zygote.start("endings:is_interrupted_beside_a_progress_bar", log=tmp_path / "log")
    code, printed = run.finish(timeout=30)
    assert (code, printed.splitlines()[-1]) == (130, "stopped by SIGINT")
    assert "50 %\nstopped" in printed


@pytest.mark.parametrize("flags", [["--hub_tokn", TOKEN], [TOKEN], ["--push_to_hub", TOKEN]])
def test_errors_quote_no_token(flags):
    result = call(train.main, *flags)
    assert result.returncode == 2
    assert "<TOKEN>" in result.stderr
    assert TOKEN not in result.stderr


class TestCtrlC:
    def start(self, zygote, folder, output, *options):
        arguments = command(folder, output, 10_000, "--num_threads", 1, "--dataloader_num_workers", 2, *options)
        return zygote.start("pals_hf.cli.train:main", *arguments, log=output.with_name("log"))

    def stopped(self, run, output):
        code, printed = run.finish()
        assert code == 130
        assert "Traceback" not in printed
        *_, line = printed.splitlines()
        checkpoints = complete(output)
        if checkpoints:
            last = checkpoints[-1]
            assert line == f"stopped by SIGINT; {last} is saved, resume with --resume_from_checkpoint {last}"
        else:
            assert line == "stopped by SIGINT; there is no checkpoint yet, so start the run again"
        return [path.name for path in checkpoints]

    @pytest.mark.parametrize("when", ["training", "saving", pytest.param("evaluating", marks=pytest.mark.slow)])
    def test_saves_after_the_step(self, zygote, folder, tmp_path, when):
        output = tmp_path / "run"
        saving = ["--save_steps", 1] if when == "saving" else ["--save_steps", 9_999]
        evaluating = ["--eval_strategy", "steps", "--eval_steps", 1] if when == "evaluating" else []
        run = self.start(zygote, folder, output, *saving, *evaluating)
        run.wait_for((lambda: list(output.glob("_unfinished/*/*"))) if when == "saving" else run.printed("loss'"))
        run.signal_all(signal.SIGINT)
        assert self.stopped(run, output)

    def test_a_second_one_does_not_wait(self, zygote, folder, tmp_path):
        """Not even for the checkpoint, which takes as long as it takes; earlier ones are whole."""
        output = tmp_path / "run"
        run = self.start(zygote, folder, output, "--save_steps", 1)
        run.wait_for(lambda: list(output.glob("_unfinished/checkpoint-2/*")))
        run.signal_all(signal.SIGINT)
        run.signal_all(signal.SIGINT)
        assert self.stopped(run, output)
