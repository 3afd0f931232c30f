import dataclasses
import json
import pickle

import pytest
from transformers import TrainingArguments

from pals_hf import PALSConfig
from pals_hf.errors import InputError
from pals_hf.losses import PRESETS


def test_presets_fill_what_is_not_given(tmp_path):
    for preset, values in PRESETS.items():
        config = PALSConfig(tmp_path, preset=preset)
        assert {name: getattr(config, name) for name in values} == values
    config = PALSConfig(tmp_path, preset="paper", beta=0.25)
    assert (config.beta, config.tau) == (0.25, PRESETS["paper"]["tau"])


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
        ("loss", "dice", "loss must be one of pals, ce, label_smoothing, got 'dice'"),
        ("preset", "mine", "preset must be one of default, paper"),
        ("beta_schedule", "quadratic", "beta_schedule must be one of"),
        ("beta_warmup", 0.0, "beta_warmup must be positive"),
        ("affinity_source", "image", "affinity_source must be one of classifier_input, before_dropout"),
        ("pairs", "some", "pairs must be one of"),
        ("affinity_stride", 0, "affinity_stride must be at least 1"),
        ("propagation_weight", 2.0, "propagation_weight must lie in"),
        ("teacher", "frozen", "teacher must be one of live, ema"),
        ("teacher_view", "strong", "teacher_view must be one of same, weak"),
        ("ema_decay", 1.5, "ema_decay must lie in"),
        ("beta", 1.5, r"beta must lie in \[0, 1\], got 1.5"),
        ("beta", -0.1, "beta must lie"),
        ("smoothing", 2.0, "smoothing must lie"),
        ("tau", 0.0, "tau must be positive"),
        ("temperature", -1.0, "temperature must be positive"),
        ("per_device_train_batch_size", 0, "per_device_train_batch_size must be positive"),
        ("num_train_epochs", 0, "num_train_epochs must be positive"),
        ("head_lr_multiplier", 0.0, "head_lr_multiplier must be positive"),
        ("label_smoothing_factor", 0.1, "use loss='label_smoothing' with smoothing=0.1"),
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


def test_beta_schedules(tmp_path):
    assert [PALSConfig(tmp_path, beta=0.4).beta_at(x) for x in (0, 0.5, 1)] == [0.4, 0.4, 0.4]
    linear = PALSConfig(tmp_path, beta=0.4, beta_schedule="linear")
    assert [linear.beta_at(x) for x in (0, 0.5, 1)] == [0, 0.2, 0.4]


def test_the_token_is_in_no_pickle_and_no_json(tmp_path):
    config = PALSConfig(tmp_path, hub_token="hf_secret")
    assert b"hf_secret" not in pickle.dumps(config)
    assert "hf_secret" not in json.dumps(config.to_dict())
    assert config.hub_token == "hf_secret"  # still there for pushing
    assert pickle.loads(pickle.dumps(config)).beta == config.beta


def test_padding_must_be_told_from_void(tmp_path):
    with pytest.raises(InputError, match="distill_void needs another ignore_index than -1"):
        PALSConfig(tmp_path, distill_void=True, ignore_index=-1)


def test_processes_that_would_train_side_by_side(tmp_path, monkeypatch):
    """As `accelerate launch` starts several without GPUs, when it is not told."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"2 processes were started, but each .* set ACCELERATE_USE_CPU=true"):
        PALSConfig(tmp_path)
