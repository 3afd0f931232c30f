"""Results of `Dataset.map` that are kept in the cache folder of `datasets`, for the next run."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from filelock import FileLock, Timeout
from transformers.utils import logging

logger = logging.get_logger(__name__)

_PR_SET_PDEATHSIG = 1  # of Linux
_starts_processes = False  # whether this process is in `_ending_with_us`


def cached_map(
    dataset: Dataset, function: Callable[..., dict[str, Any]], meaning: str | None, **options: Any
) -> Dataset:
    """Map a data set as `Dataset.map` does, or read the result from the cache.

    Several processes may call this at the same time: one computes the result, and the others wait for it. A process
    that is killed leaves no half-written result, and what it leaves is removed by the next one.

    Args:
        dataset: the data set.
        function: see `Dataset.map`.
        meaning: a string that changes when the result changes. Without it, nothing is cached.
        options: other arguments of `Dataset.map`.
    """
    if meaning is not None:
        options["new_fingerprint"] = hashlib.sha256(meaning.encode()).hexdigest()[:16]
    folder = None if meaning is None else _cache_folder(meaning)
    with _ending_with_us():
        if folder is None:
            return dataset.map(function, keep_in_memory=True, **options)
        with _locked(folder):
            for unfinished in folder.glob("tmp*"):  # of a process that was killed: the lock is ours
                unfinished.unlink()
            return dataset.map(function, cache_file_name=str(folder / "rows.arrow"), **options)


def _cache_folder(meaning: str) -> Path | None:
    """Return the folder of a result, or None if it is not writable: it may belong to somebody else."""
    name = hashlib.sha256(meaning.encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "pals_hf" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Another process is preparing the same data in %s. This one waits for it.", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _ending_with_us() -> Iterator[None]:
    """Let the processes that are started in this block ignore ctrl-C, which this process handles, and end with it.

    Raises:
        KeyboardInterrupt: it was raised in the block, also if an error of `datasets` took its place.
    """
    global _starts_processes
    before, _starts_processes = _starts_processes, True
    try:
        yield
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        _starts_processes = before


def _in_child() -> None:
    if _starts_processes:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with suppress(AttributeError):  # other systems have no prctl
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


os.register_at_fork(after_in_child=_in_child)
