"""Exceptions whose message is one line for the user."""

import re


class InputError(ValueError):
    """Data, an option or a model cannot be used as given. The message names the place, the value and the remedy."""


class TrainingError(RuntimeError):
    """A training with valid input cannot continue. The message says what failed, at which step, and what was saved."""


class PushError(RuntimeError):
    """A push to the Hub failed. The message says why, where the files are, and how to push them later."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or else the name of the error's type.

    An error of a worker of a DataLoader carries the worker's traceback in its message: its last line says what failed.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1].removeprefix(f"{type(error).__name__}: ") if lines[0].startswith("Caught ") else lines[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether the memory of the machine or of a GPU was too small. torch has several errors for that."""
    return isinstance(error, MemoryError) or bool(
        re.search(r"out of memory|not enough memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", str(error))
    )
