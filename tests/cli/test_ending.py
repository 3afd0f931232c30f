"""How programs end at ctrl-C: with one line, exit code 130, and nothing that goes on."""

import signal

import pytest
from hub import TOKEN
from launching import call, command
from test_checkpoints import complete

from pals_hf.cli import train


def test_an_interrupt_that_python_drops(zygote, tmp_path):
    run = zygote.start("endings:is_interrupted_in_a_destructor", log=tmp_path / "log")
    assert run.finish(timeout=30) == (130, "stopped by SIGINT\n")


@pytest.mark.parametrize("flags", [["--hub_tokn", TOKEN], [TOKEN], ["--push_to_hub", TOKEN]])
def test_errors_quote_no_token(flags):
    result = call(train.main, *flags)
    assert result.returncode == 2
    assert "<TOKEN>" in result.stderr
    assert TOKEN not in result.stderr


class TestTraining:
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
