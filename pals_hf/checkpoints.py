"""Checkpoint folders, which are written and deleted atomically."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

# The folder of a run in which checkpoints are written and deleted. Names that begin with an underscore are not pushed.
UNFINISHED = "_unfinished"
_REPLACED = "replaced-"
_CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


def is_complete_checkpoint(folder: str | os.PathLike) -> bool:
    """Return whether `folder` is a `checkpoint-STEP` from which a training can resume."""
    folder = Path(folder)
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return _CHECKPOINT_NAME.fullmatch(folder.name) is not None and (folder / SCHEDULER_NAME).exists()


def last_complete_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    folders = [path for path in Path(output_dir).glob("*") if is_complete_checkpoint(path)]
    return max(folders, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def clear_unfinished(run_dir: Path) -> None:
    """Remove the folder of unfinished checkpoints, and restore checkpoints that a killed process was replacing."""
    for old in (run_dir / UNFINISHED).glob(f"{_REPLACED}*"):  # restored if a kill came before its replacement
        target = run_dir / old.name.removeprefix(_REPLACED)
        if not target.exists():
            old.rename(target)
    shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)


def publish(written: Path, target: Path) -> None:
    """Move a folder from [`UNFINISHED`] to its own name, after all its files have been flushed to the disk."""
    for path in written.rglob("*"):
        if path.is_file():
            _sync(path)
    old = written.parent / f"{_REPLACED}{target.name}"
    if target.exists():  # a folder cannot replace another one that has files
        target.rename(old)
    written.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def publish_files(written: Path, folder: Path) -> None:
    """Flush files to the disk, then move them into a folder, each file atomically."""
    for path in sorted(written.iterdir()):
        _sync(path)
        path.replace(folder / path.name)
    written.rmdir()


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint. The folder is renamed first, so that no partly deleted checkpoint keeps its name."""
    doomed = checkpoint.parent / UNFINISHED / f"deleted-{checkpoint.name}"
    doomed.parent.mkdir(exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def discard_after(checkpoint: Path) -> None:
    """Discard the checkpoints of later steps than this one, from which a run resumes."""
    step = int(checkpoint.name.rsplit("-", 1)[1])
    for path in checkpoint.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if _CHECKPOINT_NAME.fullmatch(path.name) and int(path.name.rsplit("-", 1)[1]) > step:
            discard(path)


def discard_old_checkpoints(run_dir: Path, limit: int | None, kept: Collection[str]) -> None:
    """Discard the checkpoints of the earliest steps until `limit` remain.

    Args:
        run_dir: the folder of the run.
        limit: the number of checkpoints to keep. None or 0 keeps all.
        kept: the names of checkpoints to keep in any case, like the newest and the best one.
    """
    checkpoints = [Path(path) for path in sort_checkpoints(str(run_dir))]
    if limit is None or limit <= 0:
        return
    spare = [path for path in checkpoints if path.name not in kept]
    for checkpoint in spare[: max(0, len(checkpoints) - limit)]:
        discard(checkpoint)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
