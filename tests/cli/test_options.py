"""Every option with odd values: each of them is used, or refused in one line before anything is loaded."""

import contextlib
import dataclasses

import pytest
from conftest import RAW_VOID
from launching import call
from transformers import TrainingArguments

from pals_hf import PALSConfig
from pals_hf.cli import train
from pals_hf.cli.arguments import TrainArguments
from pals_hf.errors import InputError

ODD = {
    "int": ["0", "-1", "3000000000", "1.5", "x"],
    "float": ["0", "-1", "nan", "inf", "1e30", "x"],
    "bool": ["True", "maybe"],
    "dict": ['{"a": 1}', "{", "[1]", "/no/file.json"],
    "str": ["", "nonsense", "/no/such/file"],
    "list": ["", "nonsense"],
}
ODD |= {"OptimizerNames": ["lomo", "galore_adamw", "adamw_8bit", "nonsense"], "Strategy": ["nonsense"]}


def odd_flags():
    for options in (TrainArguments, PALSConfig):
        for field in dataclasses.fields(options):
            if field.metadata.get("command_line", True) and field.name != "hub_token":
                values = [value for kind, values in ODD.items() if kind in str(field.type) for value in values]
                yield from ([f"--{field.name}", value] for value in dict.fromkeys(values))


FLAGS = list(odd_flags())


def in_one_line(ended):
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    return line if ended.returncode in (1, 2) and "Traceback" not in ended.stderr else pytest.fail(ended.stderr)


def parse(flags):
    """Return the options, or None if they are refused. An error of another type is a failure."""
    with contextlib.suppress(InputError):
        return train.parse_arguments(["--output_dir", "o", *flags], TrainArguments)


def test_are_parsed_or_refused():
    """No other type of error, and no number that is not finite gets through."""
    assert len(FLAGS) > 500
    for flags in FLAGS:
        if flags[0] not in ("--log_level", "--tf32"):  # which change this process
            parsed = parse(flags)
            assert parsed is None or flags[1] not in ("nan", "inf"), flags


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--learning_rate", "0"], ["learning_rate must be positive"]),
        (["--adam_beta2", "1"], ["adam_beta2"]),
        (["--seed", "4294967296"], ["seed must be at most 4294967295"]),
        (["--max_steps", "-5"], ["max_steps must be positive, or -1"]),
        (["--dataloader_num_workers", "99999"], ["dataloader_num_workers must be at most"]),
        (["--preprocessing_num_workers", "99999"], ["preprocessing_num_workers must be at most"]),
        (["--fraction_seed", "-1"], ["fraction_seed must not be negative"]),
        (["--scale_range", "0.5", "inf"], ["scale_range must be a finite number"]),
        (["--fp16", "True"], ["fp16 has no effect on a CPU"]),
        (["--do_eval"], ["--eval_only"]),
        (["--do_train", "--do_eval", "--do_predict"], ["do_predict", "pals-hf predict"]),
        (["--save_strategy", "best", "--eval_strategy", "no"], ["save_strategy=best needs evaluations"]),
        (["--load_best_model_at_end", "True", "--save_strategy", "no"], ["load_best_model_at_end needs checkpoints"]),
        (["--save_steps", "0"], ["save_steps must be positive"]),
        (["--lr_scheduler_kwargs", "[1]"], ["lr_scheduler_kwargs must be JSON"]),
        (["--lr_scheduler_kwargs", "{"], ["--lr_scheduler_kwargs {"]),
        (["--train_sampling_strategy", "group_by_length"], ["train_sampling_strategy must be random"]),
        (["--deepspeed", "/no/config.json"], ["deepspeed"]),
        (["--accelerator_config", "/no/config.json"], ["/no/config.json"]),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_are_refused_before_the_data_is_read(flags, parts, tmp_path):
    line = in_one_line(call(train.main, "--dataset_dir", "/nowhere", "--output_dir", tmp_path / "run", *flags))
    assert all(part in line for part in parts), line


@pytest.fixture
def start(folder, tmp_path):
    where = ["--dataset_dir", folder, "--void_labels", RAW_VOID, "--output_dir", tmp_path / "run"]
    return [*where, "--max_steps", "1", "--per_device_train_batch_size", "2", "--disable_tqdm", "True"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--optim", "adamw_8bit"], ["bitsandbytes", "--optim adamw_8bit"]),
        (["--optim", "sgd", "--optim_args", "nonsense"], ["--optim_args nonsense"]),
        (["--lr_scheduler_type", "cosine_with_min_lr"], ["min_lr", "--lr_scheduler_type cosine_with_min_lr"]),
        (["--report_to", "swanlab"], ["swanlab"]),
        (["--fsdp", "full_shard"], ["fsdp"]),
        (["--torch_compile_backend", "nonsense"], ["--torch_compile_backend nonsense"]),
        (["--torch_compile_mode", "nonsense"], ["--torch_compile_mode nonsense"]),
        (["--warmup_steps", "1"], ["warmup_steps 1 leaves no step"]),
        (
            ["--load_best_model_at_end", "True", "--eval_steps", "2", "--save_steps", "2"],
            ["first one would be at step 2"],
        ),
        (["--metric_for_best_model", "dice"], ["metric_for_best_model must be one of"]),
        (
            ["--dataloader_drop_last", "True", "--per_device_train_batch_size", "9"],
            ["8 training images for batches of 9"],
        ),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_are_refused_before_the_training(start, flags, parts, tmp_path):
    line = in_one_line(call(train.main, *start, *flags))
    assert all(part in line for part in parts), line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_train_or_are_refused(start):
    """Those of transformers, in one step each. Those that compile the network would take minutes."""
    theirs = {f"--{field.name}" for field in dataclasses.fields(TrainingArguments)}
    others = {"--log_level", "--tf32", "--full_determinism", "--output_dir", "--max_steps"}
    for flags in FLAGS:
        if flags[0] in theirs - others and "compile" not in flags[0] and parse(flags) is not None:
            ended = call(train.main, *start, "--overwrite", *flags)
            if ended.returncode:
                in_one_line(ended)
