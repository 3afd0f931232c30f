"""Starting things the way users do."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from types import SimpleNamespace


def launcher(script, processes=1, config=None):
    """`accelerate launch`, as a user types it; several real processes need the flags below on a CPU."""
    how = ["--multi_gpu"] if config is None else ["--config_file", str(config), "--mixed_precision", "no"]
    several = ["--num_processes", str(processes), "--main_process_port", "0"] if processes > 1 else []
    how = how if several or config is not None else []
    return [sys.executable, "-m", "accelerate.commands.launch", *how, *several, str(script)]


def environment_of_launch():
    return {**os.environ, "ACCELERATE_USE_CPU": "true"}


def launch(script, *arguments, processes=1, cwd=None, config=None):
    """Run it to its end, and return what it printed."""
    command = [*launcher(script, processes, config), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment_of_launch(), check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@contextlib.contextmanager
def time_limit(seconds):
    """Raise an error in a block that would wait forever."""

    def stop(*_):
        raise AssertionError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def call(main, *arguments):
    """A program's `main` in this process, which spares importing everything again; what it printed and its code."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
