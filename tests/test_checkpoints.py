"""Nothing is lost: checkpoints are complete or not there, and a run goes on exactly where it stopped."""

import contextlib
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
from concurrent.futures import Future

import pytest
import torch
from conftest import RAW_VOID, tiny_segformer
from safetensors.torch import load_file
from test_trainer import NO_RANDOMNESS, Examples, OnStepEnd, config, logged
from transformers import AutoModelForSemanticSegmentation

from pals_hf import PALSTrainer, load_segmentation_dataset
from pals_hf.checkpoints import (
    UNFINISHED,
    clear_unfinished,
    discard_old_checkpoints,
    is_complete_checkpoint,
    last_complete_checkpoint,
)
from pals_hf.data import EvalTransform, TrainTransform, TransformedDataset
from pals_hf.errors import InputError, TrainingError
from pals_hf.models import build_image_processor
from pals_hf.nonfinite import keep_step

FILES_TO_RESUME = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
# Every evaluation gives the same, so that the first is the best.
UNCHANGING = {
    **SAVING,
    "eval_steps": 1,
    "freeze_batch_norm": True,
    "learning_rate": 0.0,
    "lr_scheduler_type": "constant",
}


def write_checkpoint(folder, state="{}"):
    folder.mkdir(parents=True)
    (folder / "scheduler.pt").touch()
    if state is not None:
        (folder / "trainer_state.json").write_text(state)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def complete(folder):
    """The checkpoints of a run, every one of which must be whole."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in checkpoints:
        assert is_complete_checkpoint(checkpoint)
        load_file(checkpoint / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(checkpoint / name, weights_only=False)
        json.loads((checkpoint / "trainer_state.json").read_text())
    return checkpoints


def test_which_checkpoint_is_the_last(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    states = {"checkpoint-5": "{}", "checkpoint-10": "{}", "checkpoint-15": '{"half', "checkpoint-20": None}
    for name, state in {**states, "checkpoint-99-copy": "{}", f"{UNFINISHED}/checkpoint-30": "{}"}.items():
        write_checkpoint(tmp_path / name, state)
    (tmp_path / "trainer_state.json").write_text("{}")  # of the run, not of a checkpoint
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-10"
    for name in ("checkpoint-15", "checkpoint-20", "checkpoint-99-copy", "."):
        assert not is_complete_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("limit", "kept", "left"),
    [
        (None, {4}, {1, 2, 3, 4}),
        (0, {4}, {1, 2, 3, 4}),
        (9, {4}, {1, 2, 3, 4}),
        (2, {4}, {3, 4}),
        (2, {4, 1}, {1, 4}),
        (1, {4, 1}, {1, 4}),
        (2, {2}, {2, 4}),  # a run that went back
        (1, {2}, {2}),
    ],
)
def test_old_checkpoints_make_room(limit, kept, left, tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    discard_old_checkpoints(tmp_path, limit, {f"checkpoint-{step}" for step in kept})
    assert {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")} == left
    assert not list(tmp_path.glob(f"{UNFINISHED}/*"))


def sigterm_to_all():
    """To this process and its workers, as a job's end is announced."""
    for process in (*multiprocessing.active_children(), None):
        os.kill(os.getpid() if process is None else process.pid, signal.SIGTERM)


class TestResume:
    """Random crops from worker processes, dropout, evaluations, the best model."""

    def trainer(self, folder, output, **options):
        torch.manual_seed(0)
        data, processor = (
            load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID]),
            build_image_processor(None),
        )
        args = config(
            output,
            max_steps=7,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=options.pop("accumulation", 1),
            dataloader_num_workers=2,
            **{**SAVING, "eval_strategy": "steps", "eval_steps": 2, **options},
        )
        return PALSTrainer(
            tiny_segformer(),
            args,
            train_dataset=TransformedDataset(data.train, TrainTransform(processor, (32, 32)), seed=5),
            eval_dataset=TransformedDataset(data.validation, EvalTransform(processor)),
        )

    def history(self, trainer):
        timings = ("runtime", "per_second")
        kept = [{k: v for k, v in entry.items() if not k.endswith(timings)} for entry in trainer.state.log_history]
        return [entry for entry in kept if "train_loss" not in entry]  # the mean over the steps of this process

    def same(self, trainer, other):
        weights = other.model.state_dict()
        return all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())

    def test_is_exact_from_any_step(self, folder, tmp_path):
        """Four steps an epoch: from the middle, the end and the beginning of epochs."""
        whole = self.trainer(folder, tmp_path / "whole")
        whole.train()
        assert len(complete(tmp_path / "whole")) == 7
        for step in range(1, 7):
            resumed = self.trainer(folder, tmp_path / f"from {step}", save_strategy="no")
            resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
            assert resumed.state.global_step == 7
            assert self.same(resumed, whole), step
            assert self.history(resumed) == self.history(whole), step

    @pytest.mark.parametrize(("strategy", "accumulation"), [("steps", 2), ("epoch", 1), ("best", 2)])
    def test_sigterm_saves_after_the_step_at_hand(self, accumulation, strategy, folder, tmp_path):
        """Also where only the best or the end of an epoch is saved, and room is for one; workers hear it too."""
        options = {"save_steps": 100, "accumulation": accumulation, "save_strategy": strategy, "save_total_limit": 1}
        if strategy == "epoch":
            options["eval_strategy"] = "epoch"
        whole = self.trainer(folder, tmp_path / "whole", **options)
        whole.train()
        assert not whole.terminated
        broken = self.trainer(folder, tmp_path / "broken", **options)
        broken.add_callback(OnStepEnd(lambda: broken.state.global_step == 2 and os.kill(os.getpid(), signal.SIGTERM)))
        before = signal.getsignal(signal.SIGTERM)
        broken.train()
        assert broken.terminated
        assert signal.getsignal(signal.SIGTERM) is before
        checkpoint = complete(tmp_path / "broken")[-1]
        assert checkpoint.name == f"checkpoint-{broken.state.global_step}"
        assert broken.state.global_step in (2, 3)  # whoever is called first at the end of the step
        resumed = self.trainer(folder, tmp_path / "broken", **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert not resumed.terminated
        assert self.same(resumed, whole)
        assert self.history(resumed) == self.history(whole)

    def test_the_best_checkpoint_has_its_final_name(self, folder, tmp_path):
        options = {"save_steps": 2, "eval_steps": 2, "save_total_limit": 2, "load_best_model_at_end": True}
        trainer = self.trainer(folder, tmp_path / "run", **options)
        trainer.train()
        best = trainer.state.best_model_checkpoint
        assert best == str(tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}")
        assert set(map(str, complete(tmp_path / "run"))) == {best, str(tmp_path / "run" / "checkpoint-7")}
        states = [json.loads((path / "trainer_state.json").read_text()) for path in complete(tmp_path / "run")]
        assert {state["best_model_checkpoint"] for state in states} == {best}
        saved = AutoModelForSemanticSegmentation.from_pretrained(best).state_dict()
        assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())


@contextlib.contextmanager
def files_of_at_most(size):
    """What is written beyond `size` fails, as on a full disk, with another name for the reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(folder, megabytes):
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # torch may keep a file open for a while


class TestSaving:
    def test_leftovers_of_a_killed_process_are_removed(self, tmp_path):
        write_checkpoint(tmp_path / UNFINISHED / "checkpoint-9")
        PALSTrainer(tiny_segformer(), config(tmp_path, **SAVING), train_dataset=Examples()).train()
        assert names(tmp_path) == ["checkpoint-1"]
        assert len(complete(tmp_path)) == 1

    def test_a_replaced_checkpoint_comes_back_if_the_new_one_did_not(self, tmp_path):
        write_checkpoint(tmp_path / UNFINISHED / "replaced-checkpoint-3")
        write_checkpoint(tmp_path / UNFINISHED / "deleted-checkpoint-2")
        clear_unfinished(tmp_path)
        assert names(tmp_path) == ["checkpoint-3"]

    def test_a_path_with_a_dot(self, tmp_path, monkeypatch):
        """The best checkpoint's path is the one it has in the end, however the folder was written."""
        monkeypatch.chdir(tmp_path)
        args = config("./runs//x", eval_strategy="steps", load_best_model_at_end=True, **{**SAVING, "eval_steps": 1})
        trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples(), eval_dataset=Examples())
        trainer.train()
        assert is_complete_checkpoint(trainer.state.best_model_checkpoint)

    def test_the_best_checkpoint_of_a_run_that_was_moved(self, tmp_path):
        """Its recorded path is gone; it is found where the run is now, and stays."""

        def train(run, max_steps, limit, checkpoint=None):
            args = config(run, **{**UNCHANGING, "save_total_limit": limit}, eval_strategy="steps", max_steps=max_steps)
            trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples(), eval_dataset=Examples())
            trainer.train(resume_from_checkpoint=checkpoint)
            return trainer.state

        assert train(tmp_path / "here", 2, None).best_global_step == 1
        (tmp_path / "here").rename(tmp_path / "there")
        state = train(tmp_path / "there", 3, 1, str(tmp_path / "there" / "checkpoint-2"))
        first, last = complete(tmp_path / "there")
        assert (first.name, last.name) == ("checkpoint-1", "checkpoint-3")
        saved = json.loads((last / "trainer_state.json").read_text())
        assert state.best_model_checkpoint == saved["best_model_checkpoint"] == str(first)

    @pytest.mark.parametrize("is_there", [True, False])
    def test_the_best_model_of_a_run_that_goes_on_elsewhere(self, tmp_path, is_there):
        """Fetched from the Hub, a run has its last checkpoint only: then the best of the rest is what it ends with."""

        def trainer(run, max_steps):
            options = {**UNCHANGING, "eval_strategy": "steps", "load_best_model_at_end": True, "max_steps": max_steps}
            return PALSTrainer(
                tiny_segformer(), config(run, **options), train_dataset=Examples(), eval_dataset=Examples()
            )

        trainer(tmp_path / "here", 2).train()
        (tmp_path / "there").mkdir()
        for step in (1, 2) if is_there else (2,):
            shutil.copytree(tmp_path / "here" / f"checkpoint-{step}", tmp_path / "there" / f"checkpoint-{step}")
        shutil.rmtree(tmp_path / "here")
        resumed = trainer(tmp_path / "there", 3)
        resumed.train(resume_from_checkpoint=str(tmp_path / "there" / "checkpoint-2"))
        best = 1 if is_there else 3
        assert resumed.state.best_global_step == best
        assert resumed.state.best_model_checkpoint == str(tmp_path / "there" / f"checkpoint-{best}")

    def test_the_best_checkpoint_that_is_evaluated_after_it_was_saved(self, tmp_path):
        args = config(tmp_path, **{**UNCHANGING, "save_total_limit": 1}, eval_strategy="epoch", max_steps=3)
        args.per_device_train_batch_size = 2
        trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples(), eval_dataset=Examples())
        trainer.train()
        assert trainer.state.best_global_step == 2
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
        assert [path.name for path in complete(tmp_path)] == ["checkpoint-2", "checkpoint-3"]

    def test_sigterm_is_heard_in_training_only(self, tmp_path):
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(TrainingError):
            PALSTrainer(tiny_segformer(), config(tmp_path), train_dataset=Named(bad=0)).train()
        assert signal.getsignal(signal.SIGTERM) is before

    def test_a_checkpoint_that_is_being_pushed_stays(self, tmp_path):
        """It makes room once it has arrived."""
        args = config(tmp_path, **{**SAVING, "save_total_limit": 1}, max_steps=3)
        trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples(8))
        slow = Future()
        trainer._pushes = [(slow, "checkpoint-1")]
        trainer.train()
        assert [path.name for path in complete(tmp_path)] == ["checkpoint-1", "checkpoint-3"]
        slow.set_result(None)
        trainer._discard_old_checkpoints(tmp_path, set())
        assert [path.name for path in complete(tmp_path)] == ["checkpoint-3"]

    def test_a_checkpoint_of_that_name_is_replaced(self, tmp_path):
        """By a run that went on from an earlier one."""
        write_checkpoint(tmp_path / "checkpoint-1", state='{"old": true}')
        PALSTrainer(tiny_segformer(), config(tmp_path, **SAVING), train_dataset=Examples()).train()
        (checkpoint,) = complete(tmp_path)
        assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 1

    @pytest.mark.parametrize("limit", [1000, 150_000])
    def test_save_checkpoint_leaves_nothing_if_it_fails(self, limit, tmp_path):
        """With the larger limit the network can be written, and the optimizer's state cannot."""
        trainer = PALSTrainer(tiny_segformer(), config(tmp_path, max_steps=3, **SAVING), train_dataset=Examples())
        with contextlib.ExitStack() as stack:
            trainer.add_callback(
                OnStepEnd(lambda: trainer.state.global_step == 2 and stack.enter_context(files_of_at_most(limit)))
            )
            with pytest.raises(TrainingError) as stop:
                trainer.train()
        assert str(stop.value).startswith(f"{tmp_path / 'checkpoint-2'} cannot be written, with ")
        assert str(stop.value).endswith(f"The last checkpoint is {tmp_path / 'checkpoint-1'}.")
        assert names(tmp_path) == ["checkpoint-1"]
        complete(tmp_path)

    def test_full_disk(self, tmp_path):
        with small_disk(tmp_path / "disk", megabytes=1):
            run = tmp_path / "disk" / "run"
            args = config(run, max_steps=30, **SAVING)
            with pytest.raises(TrainingError, match=r"cannot be written, with 0 MB left on its disk: "):
                PALSTrainer(tiny_segformer(), args, train_dataset=Examples()).train()
            saved = complete(run)
            assert names(run) == sorted(path.name for path in saved)
            args = config(run, max_steps=len(saved) + 1, save_strategy="no")
            resumed = PALSTrainer(tiny_segformer(), args, train_dataset=Examples())
            resumed.train(resume_from_checkpoint=str(saved[-1]))
            assert resumed.state.global_step == len(saved) + 1


class Named(Examples):
    """One image at a time, in order of the data set; from a given one on with a pixel that is no number."""

    def __init__(self, bad=None):
        super().__init__(8)
        if bad is not None:
            self.images[bad, 0, 5, 5] = float("nan")

    def __getitem__(self, index):
        return {**super().__getitem__(index), "id": f"image-{int(index)}"}


class TestNonFinite:
    def test_loss(self, tmp_path):
        """The step, the batch's files and what is needed to see it again; the last good checkpoint stays."""
        args = config(tmp_path, max_steps=8, per_device_train_batch_size=1, save_total_limit=1, save_strategy="steps")
        args.save_steps, args.gradient_accumulation_steps = 1, 2
        trainer = PALSTrainer(tiny_segformer(**NO_RANDOMNESS), args, train_dataset=Named(bad=5))
        with pytest.raises(TrainingError) as stop:
            trainer.train()
        (folder,) = tmp_path.glob("_non-finite-step-*")
        step = int(folder.name.rsplit("-", 1)[1])
        assert step == trainer.state.global_step + 1
        message = str(stop.value)
        assert message.startswith(f"the loss is nan at step {step}, images image-5: the images have values")
        assert str(folder) in message
        checkpoint = last_complete_checkpoint(tmp_path)
        assert message.endswith(f"the last checkpoint is {checkpoint or 'none yet'}")
        assert (checkpoint is None) == (step == 1)
        batch = load_file(folder / "batch.safetensors")
        assert torch.equal(batch["pixel_values"][0].isnan(), Named(bad=5)[5]["pixel_values"].isnan())
        about = json.loads((folder / "step.json").read_text())
        assert (about["step"], about["images"]) == (step, ["image-5"])
        again = PALSTrainer(AutoModelForSemanticSegmentation.from_pretrained(folder), config(tmp_path / "again"))
        assert again.compute_loss(again.model, batch).isnan()

    def test_what_cannot_be_kept_does_not_hide_why(self, tmp_path):
        trainer = PALSTrainer(tiny_segformer(**NO_RANDOMNESS), config(tmp_path), train_dataset=Named(bad=slice(None)))
        (tmp_path / "_non-finite-step-1").write_text("in the way")
        with pytest.raises(TrainingError, match=r"the loss is nan at step 1, images image-.* cannot be saved in"):
            trainer.train()

    def test_batches_of_several_sizes(self, tmp_path):
        batches = [{"pixel_values": torch.full((1, 3, 8, width), float("nan"))} for width in (8, 16)]
        keep_step(tmp_path, batches, None, {})
        kept = load_file(tmp_path / "batch.safetensors")
        assert {name: part.shape[-1] for name, part in kept.items()} == {"pixel_values.0": 8, "pixel_values.1": 16}

    def test_get_grad_norm_stops_before_the_optimizer_step(self, tmp_path):
        """It would make every weight NaN, and the next checkpoint worthless."""
        model = tiny_segformer(**NO_RANDOMNESS)
        model.decode_head.classifier.weight.register_hook(lambda gradient: gradient * float("inf"))
        trainer = PALSTrainer(model, config(tmp_path, **SAVING), train_dataset=Named())
        before = {name: value.clone() for name, value in model.named_parameters()}
        with pytest.raises(TrainingError, match=r"the gradient's norm is (inf|nan) at step 1, images image-") as stop:
            trainer.train()
        assert "the images and weights are finite" in str(stop.value)
        assert not list(tmp_path.glob("checkpoint-*"))
        kept = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "_non-finite-step-1")
        assert all(torch.equal(value, before[name]) for name, value in kept.named_parameters())

    def test_weights(self, tmp_path):
        model = tiny_segformer()
        trainer = PALSTrainer(model, config(tmp_path, max_steps=3), train_dataset=Examples())
        trainer.add_callback(OnStepEnd(lambda: model.decode_head.classifier.bias.data.fill_(float("inf"))))
        with pytest.raises(TrainingError, match="at step 2: the weights of the network are not finite; try a lower"):
            trainer.train()
        assert logged(trainer, "loss")[0] > 0
        shutil.rmtree(tmp_path / "_non-finite-step-2")


class Code:
    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


def save(value):
    return lambda path: torch.save(value, path)


def state(**changes):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


STATE = "trainer_state.json"
DAMAGES = [
    *(
        (name, lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]))
        for name in FILES_TO_RESUME
    ),
    *((name, lambda path: path.write_bytes(b"")) for name in FILES_TO_RESUME),
    *((name, lambda path: path.write_bytes(b"no state")) for name in FILES_TO_RESUME),
    *((name, lambda path: path.write_bytes(pickle.dumps(Code(), 2))) for name in FILES_TO_RESUME[1:]),
    *((name, save([1])) for name in FILES_TO_RESUME[1:]),
    *((name, save({"a": 1})) for name in FILES_TO_RESUME[1:]),
    ("optimizer.pt", lambda path: save(scaled(torch.load(path)))(path)),
    ("scheduler.pt", save({"last_epoch": "x"})),
    ("rng_state.pth", save({"python": 1, "numpy": 2, "cpu": 3})),
    *((STATE, lambda path, text=text: path.write_text(text)) for text in ("[1]", "1", '{"x": 1}')),
    *((STATE, state(global_step=step)) for step in ("1", -1, 1.5, None, True, "../../x")),
    (STATE, state(epoch="x")),
    (STATE, state(max_steps=None)),
    (STATE, state(log_history=[1])),
    (STATE, state(best_model_checkpoint=5)),
    (STATE, state(stateful_callbacks=[1])),
]


def scaled(optimizer):
    """The state of an optimizer of a network with other shapes."""
    for moments in optimizer["state"].values():
        moments["exp_avg"] = torch.zeros(3, 3)
    return optimizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    PALSTrainer(tiny_segformer(), config(run_dir, **SAVING), train_dataset=Examples()).train()
    return run_dir / "checkpoint-1"


class TestDamage:
    @pytest.mark.parametrize("place", range(len(DAMAGES)), ids=lambda place: f"{place}-{DAMAGES[place][0]}")
    def test_ends_in_one_line_before_the_training(self, whole, place, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        name, damage = DAMAGES[place]
        checkpoint = shutil.copytree(whole, tmp_path / "run" / "checkpoint-1")
        damage(checkpoint / name)
        trainer = PALSTrainer(
            tiny_segformer(), config(tmp_path / "run", **SAVING, max_steps=3), train_dataset=Examples()
        )
        with pytest.raises(InputError, match=rf"checkpoint {checkpoint} cannot be loaded: ") as raised:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert "\n" not in str(raised.value)
        assert str(raised.value).endswith("Resume from an earlier checkpoint, or delete this one and start a new run.")
        assert names(tmp_path) == ["run"]
        assert names(tmp_path / "run") == ["checkpoint-1"]

    def test_the_recorded_best_checkpoint_of_somebody_else_is_not_loaded(self, whole, tmp_path):
        """The path may come from the Hub."""
        checkpoint = shutil.copytree(whole, tmp_path / "run" / "checkpoint-1")
        other = shutil.copytree(whole, tmp_path / "other" / "checkpoint-1")
        for named in (other, tmp_path / "run" / ".." / "other" / "checkpoint-1"):
            state(best_model_checkpoint=str(named), best_global_step=1, best_metric=2.0)(checkpoint / STATE)
            options = {**UNCHANGING, "eval_strategy": "steps", "load_best_model_at_end": True, "max_steps": 2}
            trainer = PALSTrainer(
                tiny_segformer(),
                config(tmp_path / "run", **options),
                train_dataset=Examples(),
                eval_dataset=Examples(),
            )
            trainer.train(resume_from_checkpoint=str(checkpoint))
            assert trainer.state.best_model_checkpoint == str(checkpoint)
