"""How a program ends when its input is wrong: with one line and an exit code."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

from ..errors import InputError, PushError, TrainingError


def fail(error: InputError | TrainingError | PushError) -> NoReturn:
    """Print an error in one line and exit, with code 2 for wrong input and code 1 for all else."""
    if not is_main_process():
        # The launcher ends all processes as soon as one has failed. Give the main process time to print its line.
        time.sleep(10)
    text = str(error)
    if text.startswith("Caught "):  # in a worker of a DataLoader: torch puts its traceback into the message
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.exit(2 if isinstance(error, InputError) else 1)


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0
