"""Starts programs in real processes, without importing everything again for each: `Zygote().start(...)`.

The process of this file has imported the package, and has one thread. It forks a process for every program, in a
process group of its own, which ends as Python ends: with everything that runs at its exit.
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
LONGEST = 60  # seconds


class Zygote:
    """`with Zygote() as zygote:` for as many programs as needed."""

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=TESTS,
        )
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=LONGEST)

    def start(self, program, *arguments, log):
        """Call `module:function` with a list of arguments in a new process, what it prints going to a file."""
        Path(log).touch()
        return Running(self, self.ask(program=program, arguments=list(map(str, arguments)), log=str(log)), log)

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Running:
    def __init__(self, zygote, pid, log):
        self.zygote, self.pid, self.log = zygote, pid, Path(log)

    def wait_for(self, condition, pause=0.01):
        deadline = time.time() + LONGEST
        while not condition():
            assert time.time() < deadline, self.log.read_text()[-3000:]
            assert self.members(), self.log.read_text()[-3000:]
            time.sleep(pause)

    def printed(self, text):
        return lambda: text in self.log.read_text()

    def members(self):
        """The processes of its group, which are it, its workers and whatever it started."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.pid and state != "Z":
                    found.append(int(stat.parent.name))
        return found

    def signal_all(self, number):
        os.killpg(self.pid, number)

    def signal_it(self, number):
        os.kill(self.pid, number)

    def finish(self, timeout=LONGEST):
        """Its exit code (negative for a signal) and what it printed, once nothing of it is left."""
        code = self.zygote.ask(wait=self.pid, timeout=timeout)
        deadline = time.time() + 10
        while (left := self.members()) and time.time() < deadline:
            time.sleep(0.05)
        if left:
            os.killpg(self.pid, signal.SIGKILL)
        printed = self.log.read_text()
        assert code is not None, f"still running after {timeout} s: {printed[-3000:]}"
        assert not left, f"{len(left)} processes outlive it: {printed[-3000:]}"
        return code, printed


def become(program, arguments, log):
    with contextlib.suppress(OSError):  # of the two of us who do it
        os.setpgid(0, 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    module, function = program.split(":")
    getattr(importlib.import_module(module), function)(arguments)


def serve():
    groups = []
    for line in sys.stdin:
        order = json.loads(line)
        if "program" in order:
            answer = os.fork()
            if answer == 0:
                return become(**order)
            with contextlib.suppress(OSError):
                os.setpgid(answer, answer)
            groups.append(answer)
        else:
            deadline, answer = time.time() + order["timeout"], None
            while answer is None and time.time() < deadline:
                pid, status = os.waitpid(order["wait"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else time.sleep(0.01)
            if answer is None:
                os.killpg(order["wait"], signal.SIGKILL)
                os.waitpid(order["wait"], 0)
        print(json.dumps(answer), flush=True)
    for group in groups:  # of tests that failed
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)  # which conftest has made
    return None


if __name__ == "__main__":
    import conftest  # noqa: F401
    import endings  # noqa: F401

    serve()
