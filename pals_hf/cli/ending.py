"""How a program ends when its input is wrong, or at ctrl-C: with one line and an exit code."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from ..errors import InputError, PushError, TrainingError

_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}")  # of the Hub: a line may quote the command line or a recipe


def fail(error: InputError | TrainingError | PushError) -> NoReturn:
    """Print an error in one line and exit, with code 2 for wrong input and code 1 for all else."""
    if not is_main_process():
        # The launcher ends all processes as soon as one has failed. Give the main process time to print its line.
        time.sleep(10)
    text = str(error)
    if text.startswith("Caught "):  # in a worker of a DataLoader: torch puts its traceback into the message
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    print(f"error: {_TOKEN.sub('<TOKEN>', ' '.join(text.split()))}", file=sys.stderr, flush=True)
    sys.exit(2 if isinstance(error, InputError) else 1)


def ends_at_ctrl_c(main: Callable[..., None]) -> Callable[..., None]:
    """Let a program end with one line at SIGINT, which is ctrl-C: the message of the `KeyboardInterrupt`, if any."""

    @functools.wraps(main)
    def program(*args: Any, **kwargs: Any) -> None:
        try:
            with _interrupts_repeated():
                main(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            leave(signal.SIGINT, str(interrupt))

    return program


@contextmanager
def _interrupts_repeated() -> Iterator[None]:
    """Raise a `KeyboardInterrupt` again that Python has dropped, because it came in a destructor or during a fork."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def repeat(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0.05)  # after the destructor
        else:
            hook(dropped)

    hook, handler = sys.unraisablehook, signal.signal(signal.SIGALRM, signal.default_int_handler)
    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGALRM, handler)


def leave(number: signal.Signals, what_now: str = "") -> NoReturn:
    """End a program that a signal has stopped, with one line and the exit code of a shell."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another ctrl-C ends the program while it cleans up
    if is_main_process():
        print(f"stopped by {number.name}{what_now and '; '}{what_now}", flush=True)
    others = set(threading.enumerate()) - {threading.main_thread()}
    if number == signal.SIGINT and not all(thread.daemon for thread in others):
        sys.stderr.flush()
        os._exit(128 + number)  # sys.exit() would wait for them, and one may be pushing
    sys.exit(128 + number)


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0
