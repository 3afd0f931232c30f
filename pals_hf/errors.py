"""Exceptions whose message is one line for the user."""

import re


class InputError(ValueError):
    """Data, an option or a model cannot be used as given. The message names the place, the value and the remedy."""


class TrainingError(RuntimeError):
    """A training with valid input cannot continue. The message says what failed, at which step, and what was saved."""


class PushError(RuntimeError):
    """A push to the Hub failed. The message says why, where the files are, and how to push them later."""


def message_of(error: BaseException) -> str:
    """Return an error's message, without the traceback that torch puts before that of a worker of a DataLoader."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2] if text.startswith("Caught ") else text


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or else the name of the error's type."""
    return next((line.strip() for line in message_of(error).splitlines() if line.strip()), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether the memory of the machine or of a GPU was too small. torch has several errors for that."""
    return isinstance(error, MemoryError) or bool(
        re.search(r"out of memory|not enough memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", str(error))
    )
