"""Exceptions whose message is one line for the user."""


class InputError(ValueError):
    """Data, an option or a model cannot be used as given. The message names the place, the value and the remedy."""


class TrainingError(RuntimeError):
    """A training with valid input cannot continue. The message says what failed, at which step, and what was saved."""


class PushError(RuntimeError):
    """A push to the Hub failed. The message says why, where the files are, and how to push them later."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that is not empty, or else the name of the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
