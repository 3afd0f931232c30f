"""Exceptions that say in one line what a user can mend, and how to quote another library's error in them."""


class InputError(ValueError):
    """Data, a flag or a model that cannot be used as given. One line: file, field, value, and what to do."""


class TrainingError(RuntimeError):
    """A training that cannot go on, though its input was fine. One line: what happened, when, and what is left."""


class PushError(RuntimeError):
    """Something that could not be pushed to the Hub. One line: why, where it still is, and how to push it later."""


def first_line(error: Exception) -> str:
    """The first line of an error's message that says something, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
