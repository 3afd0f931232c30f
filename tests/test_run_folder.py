"""One run at a time in a folder, one history, and where a run goes on."""

import inspect
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import tiny_segformer
from test_checkpoints import names, write_checkpoint
from test_trainer import config

from pals_hf import PALSLoss, PALSTrainer
from pals_hf.errors import InputError
from pals_hf.model_card import CARD_DATA
from pals_hf.run_folder import (
    discard_other_run,
    find_checkpoint,
    has_results,
    lock_output_dir,
    refuse_other_run,
    refuse_other_training,
)


@pytest.fixture
def run_dir(tmp_path):
    """A run of two checkpoints that was killed while it deleted a third."""
    folder = tmp_path / "run"
    for step in (5, 10):
        write_checkpoint(folder / f"checkpoint-{step}")
    write_checkpoint(folder / "checkpoint-20", state=None)
    (folder / "eval_results.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    return folder


class TestOneRunAFolder:
    def test_is_kept_from_others_and_given_back(self, tmp_path):
        with lock_output_dir(tmp_path / "run"):
            with (
                pytest.raises(InputError, match=f"run is in use by process {os.getpid()} on"),
                lock_output_dir(tmp_path / "run"),
            ):
                pass
            with pytest.raises(InputError, match="in use by"), lock_output_dir(tmp_path / "run"):  # still
                pass
        with lock_output_dir(tmp_path / "run"):
            pass

    def test_a_killed_run_holds_nothing(self, tmp_path):
        code = (
            "from pals_hf.run_folder import lock_output_dir; import time\n"
            f"with lock_output_dir({str(tmp_path)!r}): time.sleep(99)"
        )
        with subprocess.Popen([sys.executable, "-c", code]) as other:
            deadline = time.time() + 60
            while not list(tmp_path.glob("_lock-owner")) and time.time() < deadline:
                time.sleep(0.05)
            with pytest.raises(InputError, match=f"in use by process {other.pid} on"):
                lock_output_dir(tmp_path).__enter__()
            other.kill()
        with lock_output_dir(tmp_path):
            pass


LABELS = {index: f"LABEL_{index}" for index in range(4)}  # of the network in these tests


class TestOtherTraining:
    def checkpoint(self, tmp_path, **options):
        model = tiny_segformer()
        trainer = PALSTrainer(model, config(tmp_path / "run", **options))
        trainer.save_model()
        return tmp_path / "run"

    def test_goes_on_with_the_same_loss(self, tmp_path):
        options = {"affinity": {"keys": 500}, "distill_unlabeled": True}
        refuse_other_training(self.checkpoint(tmp_path, **options), config(tmp_path / "run", **options), None, LABELS)

    @pytest.mark.parametrize(
        ("began", "flag"),
        [
            ({"affinity": {"keys": 500}}, """--affinity '{"tau": .*"keys": 500,.*}'"""),
            ({"distill_unlabeled": True}, "--distill_unlabeled True"),
            ({"loss": "ce", "class_weighting": "none"}, "--loss ce"),
        ],
    )
    def test_refuses_another_loss(self, tmp_path, began, flag):
        with pytest.raises(InputError, match=rf"was trained with another loss\. Resume it with {flag}, or start"):
            refuse_other_training(self.checkpoint(tmp_path, **began), config(tmp_path / "run"), None, LABELS)

    def test_refuses_a_setting_that_does_not_exist_any_more(self, tmp_path):
        """No flag that could be advised would be accepted."""
        checkpoint = self.checkpoint(tmp_path)
        card = json.loads((checkpoint / CARD_DATA).read_text())
        del card["loss_settings"]["affinity"]
        card["loss_settings"] |= {"tau": 0.1, "beta": 0.3}
        (checkpoint / CARD_DATA).write_text(json.dumps(card))
        with pytest.raises(InputError, match=r"by another version of pals_hf, with tau=0\.1, which.*Start a new run"):
            refuse_other_training(checkpoint, config(tmp_path / "run"), None, LABELS)

    def test_refuses_other_classes(self, tmp_path):
        """Also the same ones in another order: the outputs have learned the first one."""
        other = {0: "LABEL_1", 1: "LABEL_0", 2: "LABEL_2", 3: "LABEL_3"}
        with pytest.raises(InputError, match=r"on the classes 0: LABEL_0, .* but the data set has 0: LABEL_1, "):
            refuse_other_training(self.checkpoint(tmp_path), config(tmp_path / "run"), None, other)

    def test_every_option_of_the_loss_is_compared(self, tmp_path):
        options = inspect.signature(PALSLoss).parameters.keys() - {"ignore_index", "class_weights"}
        assert options < config(tmp_path).loss_settings.keys()


class TestFindCheckpoint:
    def find(self, resume, output_dir):
        return find_checkpoint(config(output_dir, resume_from_checkpoint=str(resume)))

    @pytest.mark.parametrize("resume", ["last", "auto"])
    def test_newest_complete_one(self, run_dir, resume):
        assert self.find(resume, run_dir) == run_dir / "checkpoint-10"

    def test_of_a_folder_or_by_its_own_path(self, run_dir, tmp_path):
        assert self.find(run_dir, tmp_path / "new") == run_dir / "checkpoint-10"
        assert self.find(run_dir / "checkpoint-5", run_dir) == run_dir / "checkpoint-5"

    def test_none_to_go_on_from(self, run_dir, tmp_path):
        assert self.find("auto", tmp_path / "new") is None
        for resume in ("last", tmp_path / "new", run_dir / "checkpoint-20"):
            with pytest.raises(InputError, match="there is no complete checkpoint in"):
                self.find(resume, tmp_path / "new")

    def test_a_mistyped_folder_is_not_made(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for _ in range(2):
            with pytest.raises(
                InputError, match="runs/mien: there is no such folder, and no checkpoint of runs/mien can be"
            ):
                self.find("runs/mien", "")
        assert not list(tmp_path.rglob("mien"))


class TestOneHistory:
    def test_has_results_in_its_own_folder(self, run_dir, tmp_path):
        assert has_results(run_dir, run_dir / "checkpoint-10")
        assert not has_results(run_dir, tmp_path / "other" / "checkpoint-10")

    def test_goes_on_from_its_newest_checkpoint(self, run_dir):
        refuse_other_run(run_dir, run_dir / "checkpoint-10")

    @pytest.mark.parametrize(
        ("checkpoint", "message"),
        [
            (None, "already holds a run"),
            ("checkpoint-5", "holds checkpoint-10, but the run would resume from checkpoint-5"),
        ],
    )
    def test_another_needs_a_word(self, run_dir, checkpoint, message):
        checkpoint = None if checkpoint is None else run_dir / checkpoint
        with pytest.raises(InputError, match=message):
            refuse_other_run(run_dir, checkpoint)
        refuse_other_run(run_dir, checkpoint, overwrite=True)

    @pytest.mark.parametrize("name", ["README.md", "predictions.png"])
    def test_what_others_wrote_is_not_replaced(self, tmp_path, name):
        """A project's own folder, for example, which a card would take the README of."""
        (tmp_path / name).write_text("mine")
        with pytest.raises(InputError, match=f"holds {name}, which no run has written. Use another folder"):
            refuse_other_run(tmp_path, None)
        refuse_other_run(tmp_path, None, overwrite=True)

    def test_from_another_folder(self, run_dir, tmp_path):
        refuse_other_run(tmp_path / "new", run_dir / "checkpoint-5")
        write_checkpoint(tmp_path / "other" / "checkpoint-5")
        with pytest.raises(InputError, match="other already holds a run"):
            refuse_other_run(tmp_path / "other", run_dir / "checkpoint-5")

    @pytest.mark.parametrize("name", ["notes.txt", "notes.txt/run"])
    def test_a_file(self, run_dir, name):
        with pytest.raises(InputError, match=r"notes.txt is a file"):
            refuse_other_run(run_dir / name, None, overwrite=True)

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_of_others(self, run_dir):
        run_dir.chmod(0o500)
        with pytest.raises(InputError, match="you have no permission to write to"):
            refuse_other_run(run_dir / "more" / "new", None)
        run_dir.chmod(0o700)

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_what_it_goes_on_from_is_gone(self, tmp_path, overwrite):
        (tmp_path / "run").mkdir()
        with pytest.raises(InputError, match="checkpoint-5 does not exist any more: another run has used output_dir"):
            refuse_other_run(tmp_path / "run", tmp_path / "run" / "checkpoint-5", overwrite)

    def test_what_is_replaced_goes_and_the_rest_stays(self, run_dir):
        discard_other_run(run_dir, run_dir / "checkpoint-5")
        assert [name for name in names(run_dir) if name.startswith("checkpoint")] == ["checkpoint-5"]
        assert not has_results(run_dir, run_dir / "checkpoint-5")  # those of fewer steps
        discard_other_run(run_dir, None)
        assert not [name for name in names(run_dir) if name.startswith("checkpoint") or name.endswith(".json")]
        assert (run_dir / "notes.txt").read_text() == "mine"
