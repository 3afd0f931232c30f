"""A command line parser for dataclasses of options, with short help in groups, recipes and one-line errors."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..errors import InputError
from ..options import GROUPS
from .ending import in_one_line

# Arguments of transformers that `--help` shows beside the options of this package, in words of our own.
_COMMON = {
    "training": {
        "max_steps": "Number of training steps, instead of epochs.",
        "num_train_epochs": "Passes over the training images.",
        "learning_rate": "Peak learning rate of the backbone. Default: 2e-4, from random weights 2e-3.",
        "per_device_train_batch_size": "Images in a training batch of a process.",
        "bf16": "Train in bfloat16 mixed precision.",
        "seed": "Seed of the training.",
    },
    "evaluation": {"load_best_model_at_end": "Save the best checkpoint as the model, not the last one."},
    "run": {
        "output_dir": "Folder of the run. Default: a new folder in runs/.",
        "resume_from_checkpoint": "Checkpoint, run or Hub repository to resume, `last`, or `auto`.",
        "push_to_hub": "Push the run to the Hub.",
        "hub_model_id": "Repository on the Hub, OWNER/NAME.",
    },
}
_GROUP_OF_COMMON = {name: group for group, names in _COMMON.items() for name in names}
_HELP_OF_COMMON = {name: text for names in _COMMON.values() for name, text in names.items()}
_OTHERS = "transformers.TrainingArguments"
_OWN_METADATA = ("group", "advanced", "command_line", "in_card")
_METAVARS = {int: "N", float: "X"}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, not a page of usage."""

    def error(self, message: str):
        raise InputError(message)


class OptionParser(HfArgumentParser, OneLineParser):
    """Parse dataclasses of [`options.option`] fields.

    `--help` shows the options of this package in groups, and `--help_all` shows also the advanced ones and those of
    [`~transformers.TrainingArguments`].
    """

    def __init__(self, dataclass_types: Any, description: str):
        self._groups: dict[str, argparse._ArgumentGroup] = {}
        self._is_shown: dict[str, bool] = {}
        super().__init__(dataclass_types, description=description, add_help=False, formatter_class=_HelpFormatter)

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        for title in (*GROUPS, _OTHERS):
            self._groups.setdefault(title, self.add_argument_group(title))
        super()._add_dataclass_arguments(dtype)

    def _parse_dataclass_field(self, parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        about = dict(field.metadata)
        own = {name: about.pop(name) for name in _OWN_METADATA if name in about}
        about["help"] = _HELP_OF_COMMON.get(field.name, about.get("help"))
        if not own.get("command_line", True):
            self.set_defaults(**{field.name: field.default})
            return
        group = own.get("group") or _GROUP_OF_COMMON.get(field.name, _OTHERS)
        self._is_shown[field.name] = group != _OTHERS and not own.get("advanced", False)
        plain = copy.copy(field)
        plain.metadata = about
        super()._parse_dataclass_field(self._groups[group], plain)

    def parse(self, argv: list[str]) -> tuple[Any, ...]:
        """Return an instance of each dataclass, or print the help and end the program.

        Raises:
            InputError: a flag is unknown, or a value is not of its type.
        """
        if {"-h", "--help", "--help_all"} & set(argv):
            print(self.format_help(is_all="--help_all" in argv).rstrip())
            self.exit()
        try:
            return self.parse_args_into_dataclasses(argv, look_for_args_file=False)
        except InputError:
            raise
        except Exception as error:  # of any type: the dataclasses read files, import libraries and look for devices
            raise in_one_line(error, argv) from error

    def is_given(self, name: str, argv: list[str]) -> bool:
        """Tell whether a command line sets an option, or leaves it at its default."""
        unset = object()
        namespace, _ = self.parse_known_args(argv, argparse.Namespace(**{name: unset}))
        return getattr(namespace, name) is not unset

    def format_help(self, is_all: bool = False) -> str:
        formatter = self._get_formatter()
        formatter.is_short = not is_all
        formatter.add_text(self.description)
        for title, group in self._groups.items():
            actions = [
                action
                for action in group._group_actions
                if is_all or (self._is_shown[action.dest] and not isinstance(action, argparse._StoreFalseAction))
            ]
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        if not is_all:
            others = " and those of transformers.TrainingArguments" if self._groups[_OTHERS]._group_actions else ""
            formatter.add_text(f"--help_all also shows advanced options{others}.")
        return formatter.format_help()


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Compact help: one spelling of each flag, a short placeholder, the first sentence, and the default."""

    is_short = False

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=31)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = action.option_strings[0]
        if action.nargs in (0, "?"):
            return flag
        return f"{flag} {_METAVARS.get(action.type, 'TEXT')}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        sentences = re.split(r"(?<=\.) (?=[A-Z])", action.help or "")
        if self.is_short:
            sentences = [text for index, text in enumerate(sentences) if index == 0 or text.startswith("Default:")]
        default, text = action.default, " ".join(sentences)
        if "Default:" in text or default in (None, False, "", [], -1, "default", argparse.SUPPRESS):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else f"{default}"
        return f"{text} Default: {shown}."


def with_recipe(argv: list[str], parser: OptionParser) -> list[str]:
    """Put the flags of the `--recipe` file before those of the command line, which win."""
    recipe = parser.parse_known_args(argv)[0].recipe
    if recipe is None:
        return argv
    return [*read_recipe(Path(recipe), {action.dest for action in parser._actions}), *argv]


def read_recipe(path: Path, known: set[str]) -> list[str]:
    """Return a recipe as a command line, so that one parser checks both.

    Raises:
        InputError: the file cannot be read, or it names an unknown flag.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"recipe {path} must hold flags and their values, like `learning_rate: 2e-4`")
    for name in recipe:
        if name not in known:
            raise InputError(f"recipe {path} names the flag {name}, which does not exist")
    return to_argv(recipe)


def to_argv(flags: dict[str, Any]) -> list[str]:
    """Return flags and their values as a command line."""
    argv = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        argv += [f"--{name}", *map(str, values)] if value is not None and values else []
    return argv
