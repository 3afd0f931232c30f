"""The private methods of `transformers.Trainer` that PALSTrainer overrides: each still exists there, and has a test.

They are not part of the public API, so a new release of transformers may rename one or stop calling it.
"""

import inspect
import logging
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import test_checkpoints
import torch
from conftest import tiny_segformer
from safetensors.torch import load_file, save_file
from test_checkpoints import SAVING, UNCHANGING, complete, names
from test_trainer import Examples, config
from transformers import Trainer
from transformers.trainer_utils import HPSearchBackend

from pals_hf import PALSTrainer, publishing
from pals_hf.checkpoints import UNFINISHED, is_complete_checkpoint
from pals_hf.errors import InputError
from pals_hf.losses import CrossEntropyLoss
from pals_hf.models import build_image_processor


@pytest.fixture
def trained(tmp_path):
    """A trainer after one step, with a checkpoint."""
    trainer = PALSTrainer(tiny_segformer(), config(tmp_path, **SAVING), train_dataset=Examples())
    trainer.train()
    return trainer


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_same(model, expected):
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_get_output_dir_is_temporary_while_a_checkpoint_is_written(tmp_path):
    trainer = PALSTrainer(tiny_segformer(), config(tmp_path, **SAVING), train_dataset=Examples())
    folders, save = [], trainer.model.save_pretrained
    trainer.model.save_pretrained = lambda folder, **options: folders.append(folder) or save(folder, **options)
    trainer.train()
    assert folders == [str(tmp_path / UNFINISHED / "checkpoint-1" / UNFINISHED)]
    assert trainer._get_output_dir(None) == str(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


def test_save_replaces_no_file_unless_all_are_written(tmp_path, monkeypatch):
    processor = build_image_processor(None)
    trainer = PALSTrainer(tiny_segformer(), config(tmp_path), processing_class=processor)
    trainer.save_model()
    saved, before = names(tmp_path), (tmp_path / "model.safetensors").read_bytes()
    assert {"model.safetensors", "preprocessor_config.json", "README.md", "model_card.json"} <= set(saved)
    trainer.model.decode_head.classifier.bias.data.fill_(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(type(processor), "save_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    trainer.save_model()
    assert names(tmp_path) == saved
    assert (tmp_path / "model.safetensors").read_bytes() != before


def test_finalize_training_keeps_the_last_checkpoint_beside_the_best(tmp_path):
    args = config(tmp_path, **{**UNCHANGING, "save_total_limit": 1}, eval_strategy="steps", max_steps=3)
    trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples(), eval_dataset=Examples())
    trainer.train()
    assert [path.name for path in complete(tmp_path)] == ["checkpoint-1", "checkpoint-3"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert args.save_total_limit == 1


def test_load_from_checkpoint_finds_weights_under_their_old_names(trained, tmp_path):
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    saved, expected = load_file(file), weights(trained.model)
    assert saved.keys() != expected.keys()  # else the parent's method would do
    trained.model.apply(lambda layer: hasattr(layer, "reset_parameters") and layer.reset_parameters())
    assert not is_same(trained.model, expected)
    trained._load_from_checkpoint(str(file.parent))
    assert is_same(trained.model, expected)
    save_file({name: value for name, value in saved.items() if "classifier" not in name}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"checkpoint-1 lacks the weights .*decode_head\.classifier\.bias"):
        trained._load_from_checkpoint(str(file.parent))


def refuses_damage(trained, tmp_path, name, load):
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / name).write_bytes(b"damaged")
    with pytest.raises(InputError, match=rf"^checkpoint {checkpoint} cannot be loaded: .*Resume from an earlier"):
        load(str(checkpoint))


def test_load_optimizer_and_scheduler_names_a_damaged_checkpoint(trained, tmp_path):
    refuses_damage(trained, tmp_path, "optimizer.pt", trained._load_optimizer_and_scheduler)


def test_load_rng_state_names_a_damaged_checkpoint(trained, tmp_path):
    refuses_damage(trained, tmp_path, "rng_state.pth", trained._load_rng_state)


def test_load_scaler_names_a_damaged_checkpoint(trained, tmp_path):
    trained.accelerator.scaler = torch.amp.GradScaler("cpu")
    refuses_damage(trained, tmp_path, "scaler.pt", trained._load_scaler)


def test_load_callback_state_names_a_damaged_checkpoint(trained, tmp_path):
    trained.args.restore_callback_states_from_checkpoint = True
    trained._resumed_from, trained.state.stateful_callbacks = tmp_path / "checkpoint-1", {"DefaultFlowCallback": 5}
    with pytest.raises(InputError, match=rf"^checkpoint {tmp_path / 'checkpoint-1'} cannot be loaded: "):
        trained._load_callback_state()


@pytest.mark.parametrize("terminated", [True, False])
def test_load_best_model_unless_the_run_will_be_resumed(trained, tmp_path, terminated):
    best, trained.terminated = weights(trained.model), terminated
    trained.model.decode_head.classifier.bias.data.fill_(1.0)
    last = weights(trained.model)
    trained.state.best_model_checkpoint, trained.state.global_step = str(tmp_path / "checkpoint-1"), 5
    trained._load_best_model()
    assert is_same(trained.model, last if terminated else best)
    card = trained.card_data()
    assert (card.step, card.best_of) == ((5, None) if terminated else (1, 5))


@pytest.mark.parametrize("error", [None, OSError("the push failed\nlong ago")])
def test_push_from_checkpoint_waits_until_the_checkpoint_is_complete(tmp_path, monkeypatch, caplog, error):
    """A push that fails is a warning."""
    pushed = []

    def push(folder, repo_id, **options):
        pushed.append((folder, is_complete_checkpoint(folder), repo_id))
        job = Future()
        job.set_result(None) if error is None else job.set_exception(error)
        return job

    monkeypatch.setattr(publishing, "push_in_background", push)
    monkeypatch.setattr(publishing, "create_repo", lambda *_, **__: "owner/name")
    args = config(tmp_path, **SAVING, max_steps=2, push_to_hub=True, hub_model_id="name")
    with caplog.at_level(logging.WARNING, "pals_hf"):
        PALSTrainer(tiny_segformer(), args, train_dataset=Examples()).train()
    assert pushed == [(tmp_path / f"checkpoint-{step}", True, "owner/name") for step in (1, 2)]
    assert [record.message for record in caplog.records if record.name == "pals_hf.publishing"] == (
        [] if error is None else ["the push failed"] * 2
    )


def test_get_num_items_in_batch_counts_labelled_pixels(tmp_path):
    trainer, examples = PALSTrainer(tiny_segformer(), config(tmp_path)), Examples()
    batches = [{"labels": examples.labels[:3]}, {"labels": examples.labels[3:]}]
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert torch.equal(count, trainer.loss_function.count(examples.labels))
    assert count[0] == (examples.labels != 255).sum() < examples.labels.numel()


def test_hp_search_setup_builds_the_loss_of_the_trial(tmp_path):
    trainer = PALSTrainer(model_init=lambda: tiny_segformer(), args=config(tmp_path), train_dataset=Examples())
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    trainer._hp_search_setup(SimpleNamespace(number=0, params={"loss": "ce"}))
    assert isinstance(trainer.loss_function, CrossEntropyLoss)
    with pytest.raises(InputError, match="beta"):
        trainer._hp_search_setup(SimpleNamespace(number=1, params={"beta": 3.0}))


TESTS = {
    "_finalize_training": test_finalize_training_keeps_the_last_checkpoint_beside_the_best,
    "_get_grad_norm": test_checkpoints.TestNonFinite.test_get_grad_norm_stops_before_the_optimizer_step,
    "_get_num_items_in_batch": test_get_num_items_in_batch_counts_labelled_pixels,
    "_get_output_dir": test_get_output_dir_is_temporary_while_a_checkpoint_is_written,
    "_hp_search_setup": test_hp_search_setup_builds_the_loss_of_the_trial,
    "_init_training_state": (test_checkpoints.TestResume.test_init_training_state_leaves_no_step_if_all_are_done),
    "_load_callback_state": test_load_callback_state_names_a_damaged_checkpoint,
    "_load_optimizer_and_scheduler": test_load_optimizer_and_scheduler_names_a_damaged_checkpoint,
    "_load_rng_state": test_load_rng_state_names_a_damaged_checkpoint,
    "_load_scaler": test_load_scaler_names_a_damaged_checkpoint,
    "_load_best_model": test_load_best_model_unless_the_run_will_be_resumed,
    "_load_from_checkpoint": test_load_from_checkpoint_finds_weights_under_their_old_names,
    "_push_from_checkpoint": test_push_from_checkpoint_waits_until_the_checkpoint_is_complete,
    "_save": test_save_replaces_no_file_unless_all_are_written,
    "_save_checkpoint": test_checkpoints.TestSaving.test_save_checkpoint_leaves_nothing_if_it_fails,
}


def overrides():
    """The overrides of private methods of Trainer, as (name, function)."""
    classes = PALSTrainer.__mro__[: PALSTrainer.__mro__.index(Trainer)]
    found = [(name, function) for cls in classes for name, function in vars(cls).items() if callable(function)]
    is_private = [name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name) for name, _ in found]
    return [entry for entry, private in zip(found, is_private, strict=True) if private]


def test_every_hook_has_a_test():
    assert {name for name, _ in overrides()} == TESTS.keys()
    for name, test in TESTS.items():
        assert test.__name__.startswith(f"test{name}_")


def parameters(function):
    return [(p.name, p.kind, p.default is p.empty) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(("name", "function"), overrides(), ids=lambda value: getattr(value, "__qualname__", ""))
def test_signature(name, function):
    assert parameters(function) == parameters(getattr(Trainer, name))
