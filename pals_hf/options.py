"""Options: dataclass fields with the help text and the group that the command line shows them in."""

from __future__ import annotations

from dataclasses import field
from typing import Any

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
