import dataclasses
import json
import pickle
from dataclasses import asdict, replace

import pytest
from transformers import TrainingArguments

from pals_hf import PALSConfig
from pals_hf.errors import InputError
from pals_hf.functional import Affinity
from pals_hf.losses import PRESETS


def test_presets_fill_missing_settings(tmp_path):
    for preset, values in PRESETS.items():
        config = PALSConfig(tmp_path, preset=preset)
        assert (config.beta, config.adaptive_beta) == (values["beta"], values["adaptive_beta"])
        assert config.affinity_settings == values["affinity"]
    config = PALSConfig(tmp_path, preset="paper", beta=0.25, affinity={"keys": 9})
    assert config.beta == 0.25
    assert config.affinity_settings == replace(PRESETS["paper"]["affinity"], keys=9)


def test_affinity_as_json_and_as_a_dictionary(tmp_path):
    expected = Affinity(tau=0.1, keys=None)
    for given in ({"tau": 0.1, "keys": None}, '{"tau": 0.1, "keys": null}'):
        config = PALSConfig(tmp_path, affinity=given)
        assert config.affinity_settings == expected
        assert json.loads(config.to_json_string())["affinity"] == asdict(expected)
    assert PALSConfig(tmp_path, loss="self_distillation").affinity_settings.weight == 0


def test_what_is_better_goes_by_the_metric(tmp_path):
    def is_greater_better(metric, **given):
        return PALSConfig(tmp_path, metric_for_best_model=metric, **given).greater_is_better

    for metric in ("mean_iou", "eval_overall_accuracy", "mean_boundary_iou"):
        assert is_greater_better(metric) is True
    for metric in ("loss", "eval_loss", "ece", "eval_classwise_ece", "brier"):
        assert is_greater_better(metric) is False
        assert is_greater_better(metric, greater_is_better=True) is True
    assert is_greater_better(None, load_best_model_at_end=True) is False  # by the loss, then


def test_every_field_has_help():
    assert not [field.name for field in dataclasses.fields(PALSConfig) if not field.metadata.get("help")]


def test_docstring_lists_every_default_that_differs():
    def default(field):
        return field.default_factory() if field.default is dataclasses.MISSING else field.default

    theirs = {field.name: default(field) for field in dataclasses.fields(TrainingArguments)}
    changed = {
        field.name
        for field in dataclasses.fields(PALSConfig)
        if field.name in theirs and default(field) != theirs[field.name]
    }
    assert changed
    assert not [name for name in changed if f"`{name}`" not in PALSConfig.__doc__]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "loss",
            "dice",
            "loss must be one of pals, self_distillation, ce, label_smoothing, focal, margin, got 'dice'",
        ),
        ("preset", "mine", "preset must be one of default, paper"),
        ("affinity", {"tau": 0.0}, "affinity: tau must be positive, got 0.0"),
        ("affinity", {"taus": 0.1}, "affinity: there is no setting 'taus'; the settings are tau, keys"),
        ("affinity", {"weight": 0}, "affinity: with weight 0 no pixels are compared: use loss self_distillation"),
        ("affinity", '{"tau": 0.1', "affinity must be JSON like"),
        ("affinity", "[0.1]", "affinity must hold settings and their values"),
        ("enable_jit_checkpoint", True, "enable_jit_checkpoint must be False: .* survives SIGTERM"),
        ("beta", 1.5, r"beta must lie in \[0, 1\], got 1.5"),
        ("beta", -0.1, "beta must lie"),
        ("smoothing", 2.0, "smoothing must lie"),
        ("per_device_train_batch_size", 0, "per_device_train_batch_size must be positive"),
        ("num_train_epochs", 0, "num_train_epochs must be positive"),
        ("head_lr_multiplier", 0.0, "head_lr_multiplier must be positive"),
        ("max_steps", 0, "max_steps must be positive, or -1 to train for num_train_epochs, got 0"),
        ("num_train_epochs", float("nan"), "num_train_epochs must be"),
        ("adam_beta1", 1.0, "adam_beta1 must be below 1, got 1.0"),
        ("weight_decay", float("inf"), "weight_decay must be a finite number, got inf"),
        ("gradient_accumulation_steps", 0, "gradient_accumulation_steps must be positive"),
        ("data_seed", -1, "data_seed must not be negative"),
        ("fp16_full_eval", True, "fp16_full_eval must be False: it converts the network itself"),
        ("label_names", ["mask"], "label_names must be None"),
        ("activation_checkpointing_kwargs", {"a": 1}, "has no effect without activation_checkpointing"),
        ("label_smoothing_factor", 0.1, "Use loss='label_smoothing' with smoothing=0.1"),
        ("remove_unused_columns", True, "remove_unused_columns must be False"),
        ("batch_eval_metrics", False, "batch_eval_metrics must be True"),
    ],
)
def test_refuses(tmp_path, field, value, message):
    with pytest.raises(InputError, match=message):
        PALSConfig(tmp_path, **{field: value})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "polynomial"])
def test_schedules_get_arguments_of_their_own(tmp_path, schedule):
    config = PALSConfig(tmp_path, lr_scheduler_type=schedule)
    assert config.lr_scheduler_kwargs == ({"power": 0.9, "lr_end": 0.0} if schedule == "polynomial" else None)
    given = {"power": 2.0}
    assert PALSConfig(tmp_path, lr_scheduler_kwargs=given).lr_scheduler_kwargs == given


def test_the_token_is_in_no_pickle_and_no_json(tmp_path):
    config = PALSConfig(tmp_path, hub_token="hf_secret")
    assert b"hf_secret" not in pickle.dumps(config)
    assert "hf_secret" not in json.dumps(config.to_dict())
    assert config.hub_token == "hf_secret"  # still there for pushing
    for text in (repr(config), str(config), config.to_json_string(), str(config.to_sanitized_dict())):
        assert "hf_secret" not in text
    assert pickle.loads(pickle.dumps(config)).beta == config.beta


def test_padding_must_be_told_from_void(tmp_path):
    with pytest.raises(InputError, match="ignore_index must not be -1, the label of padding"):
        PALSConfig(tmp_path, distill_unlabeled=True, ignore_index=-1)


def test_processes_that_would_train_side_by_side(tmp_path, monkeypatch):
    """As `accelerate launch` starts several without GPUs, when it is not told."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"2 processes were started, but each .* set ACCELERATE_USE_CPU=true"):
        PALSConfig(tmp_path)
