"""Options: dataclass fields with the help text and the group that the command line shows them in."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from typing import Any

from .errors import InputError

# The groups of `--help`, in the order in which they are shown.
DATA, IMAGES, MODEL, LOSS, TRAINING, EVALUATION, RUN = GROUPS = (
    "data",
    "training images",
    "model",
    "loss",
    "training",
    "evaluation",
    "run",
)


def option(default: Any, group: str, text: str, **metadata: Any) -> Any:
    """Return a dataclass field with a help text.

    Args:
        default: default value; a list is copied for each instance.
        group: one of [`GROUPS`].
        text: help text, a full sentence that stands alone.
        metadata: `choices`; `advanced=True` for options that only `--help_all` shows; `command_line=False` for fields
            that are no flags.
    """
    about = {"help": text, "group": group, **metadata}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


def check_size(name: str, size: Sequence[int] | None) -> None:
    """Refuse a size that is not two positive numbers. None is no size.

    Raises:
        InputError: the message names the option.
    """
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise InputError(f"{name} must be two positive numbers, height and width, got {size}")


LARGEST = 2**31 - 1  # of an integer: torch and numpy reject many of those above with an error of their own

MOST_WORKERS = 16 * (os.cpu_count() or 1)  # processes that read data: more of them would only exhaust the machine


def check_numbers(options: Any, limits: dict[str, tuple[float, float]] | None = None) -> None:
    """Refuse numbers that cannot be meant: those that are not finite, negative numbers, and a count of 0.

    The limits of a field follow from its default. A number may not be negative unless its default is, and an integer
    must be positive if its default is, like the size of a batch.

    Args:
        options: an instance of a dataclass.
        limits: (smallest, largest) value of the fields whose limits do not follow from their default.

    Raises:
        InputError: a number is out of range; the message names the field.
    """
    for about in fields(options):
        given = getattr(options, about.name)
        for value in given if isinstance(given, list | tuple) else [given]:
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise InputError(f"{about.name} must be a finite number, got {given}")
            low, high = (limits or {}).get(about.name) or _limits_of(about.default, value)
            if value is given and not low <= value <= high:
                raise InputError(f"{about.name} must {_range_in_words(low, high, value)}, got {given}")


def _limits_of(default: Any, value: float) -> tuple[float, float]:
    largest = LARGEST if isinstance(value, int) else math.inf
    if default is None or default is MISSING:
        return 0, largest
    return (1 if isinstance(default, int) and default >= 1 else min(0, default)), largest


def _range_in_words(low: float, high: float, value: float) -> str:
    if value > high:
        return f"be below {high:g}" if isinstance(high, float) else f"be at most {high}"
    return "not be negative" if low == 0 else "be positive" if 0 < low <= 1 else f"be at least {low:g}"
