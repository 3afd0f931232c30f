"""How a program ends when its input is wrong, at ctrl-C or without a reader: with one line and an exit code."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from itertools import pairwise
from typing import Any, NoReturn, TextIO

from ..errors import InputError, PushError, TrainingError, first_line, is_out_of_memory, message_of

_OURS = (InputError, TrainingError, PushError)
# Options that are given all the time and are hardly ever why a library fails.
_HARMLESS = {"output_dir", "max_steps", "num_train_epochs", "disable_tqdm", "run_name", "seed"}


@contextmanager
def one_line(is_setup: Callable[[], bool] = lambda: True, argv: list[str] | None = None) -> Iterator[None]:
    """End the program with one line instead of a traceback. Use it around a whole program, also as a decorator.

    At ctrl-C, it does what [`ends_at_ctrl_c`] does.

    The line between wrong input and a bug is the first training step. Until then, everything that a program does
    follows from its options, files and installation, so that whatever a library raises is about these: the user needs
    its message and not its traceback. Afterwards the same code has already run with the same options, so an unexpected
    error is a bug and keeps its traceback. Full disks, lost permissions and too little memory stay one line.

    Args:
        is_setup: tells whether an error of this moment is about the input. Default: always.
        argv: the command line, whose flags the line names. Default: that of this process.
    """
    with ExitStack() as streams:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if stream is not None:
                streams.enter_context(redirect(_PatientStream(stream)))
        try:
            with _interrupts_repeated():
                yield
            print(end="", flush=True)
        except KeyboardInterrupt as interrupt:
            leave(signal.SIGINT, str(interrupt))
        except _OURS as error:
            fail(error)
        except Exception as error:
            if is_setup():
                fail(in_one_line(error, sys.argv[1:] if argv is None else argv))
            problem = problem_of(error)
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                problem = f"a file of the run cannot be read or written: {problem}"
            elif not is_out_of_memory(error):
                raise
            fail(_caused(TrainingError(problem), error))


def in_one_line(error: Exception, argv: list[str]) -> InputError:
    """Return an error of a library as one of this package, with the options of transformers that may cause it."""
    flags = _given(argv)
    text = problem_of(error)
    if any(re.search(rf"\b{name}\b", text) for name in flags):
        return _caused(InputError(text), error)
    suspects = [name for name, value in flags.items() if len(value) > 2 and value in text]
    suspects = suspects or [name for name, value in flags.items() if name not in _HARMLESS and value != "none"]
    given = ", ".join(f"--{name} {flags[name]}".rstrip() for name in suspects)
    return _caused(InputError(f"{text} (given: {given})" if given else text), error)


def problem_of(error: Exception) -> str:
    """Return what went wrong, with its type where the message alone does not tell."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    is_clear = isinstance(error, ValueError | ImportError | OSError) or is_out_of_memory(error)
    text = first_line(error)
    return text if is_clear or text == type(error).__name__ else f"{type(error).__name__}: {text}"


def _caused(error: Any, cause: Exception) -> Any:
    error.__cause__ = cause
    return error


def _given(argv: list[str]) -> dict[str, str]:
    """Return the options of transformers on a command line, with their values."""
    from transformers import TrainingArguments  # takes seconds to import, and most programs never need it

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    words = [word for argument in argv for word in argument.split("=", 1)]
    found = {}
    for word, following in pairwise([*words, "--"]):
        name = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in names:
            found[name] = "" if following.startswith("--") else following
    return found


_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}")  # of the Hub: a line may quote the command line or a recipe


def fail(error: InputError | TrainingError | PushError) -> NoReturn:
    """Print an error in one line and exit, with code 2 for wrong input and code 1 for all else.

    With TRANSFORMERS_VERBOSITY=debug, the traceback is printed before the line.
    """
    if not is_main_process():
        # The launcher ends all processes as soon as one has failed. Give the main process time to print its line.
        time.sleep(10)
    from transformers.utils import logging  # takes a second to import, which `pals-hf --help` does without

    if logging.get_verbosity() <= logging.DEBUG:
        traceback.print_exception(error)
    text = _TOKEN.sub("<TOKEN>", " ".join(message_of(error).split()))
    _end_progress_bar()
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(2 if isinstance(error, InputError) else 1)


def _end_progress_bar(is_last: bool = False) -> None:
    """Begin a line of its own for what comes next, and with `is_last` let nothing else follow on standard error."""
    if isinstance(sys.stderr, _PatientStream):
        sys.stderr.end_line(is_last)


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
    others = set(threading.enumerate()) - {threading.main_thread()}
    is_abrupt = number == signal.SIGINT and not all(thread.daemon for thread in others)
    if is_main_process():
        _end_progress_bar(is_last=is_abrupt)  # the other threads still draw theirs
        print(f"stopped by {number.name}{what_now and '; '}{what_now}", flush=True)
    if is_abrupt:
        os._exit(128 + number)  # sys.exit() would wait for the other threads, and one may be pushing
    sys.exit(128 + number)


def is_main_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


class _PatientStream:
    """Standard output or standard error that takes any text, and outlives its reader.

    Characters that its encoding lacks, like those of the class `straße` in ASCII, are written as escapes. When a
    reader like `head` or `less` is gone, the rest is dropped: a training must not be lost for it.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._lock = threading.RLock()
        self._is_in_a_line = self._has_ended = False
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lock:
            if text and not self._has_ended:
                self._unless_closed(lambda: self._stream.write(text))
                self._is_in_a_line = not text.endswith("\n")
        return len(text)

    def end_line(self, is_last: bool) -> None:
        with self._lock:
            if self._is_in_a_line:
                self.write("\n")
            self.flush()
            self._has_ended = is_last

    def flush(self) -> None:
        self._unless_closed(self._stream.flush)

    def _unless_closed(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except BrokenPipeError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
