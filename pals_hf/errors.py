"""The one exception for what a user can mend: it names the file, field and value and says what to do."""


class InputError(ValueError):
    """Data, a flag or a model that cannot be used as given. The message is one line."""
