"""Checkpoints that are complete or not there."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

# In a run's folder: what is being written or deleted. What begins with an underscore is not pushed to the Hub.
UNFINISHED = "_unfinished"
_REPLACED = "replaced-"
_CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


def is_complete_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether `folder` is a `checkpoint-STEP` that a training can go on from."""
    folder = Path(folder)
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return _CHECKPOINT_NAME.fullmatch(folder.name) is not None and (folder / SCHEDULER_NAME).exists()


def last_complete_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    folders = [path for path in Path(output_dir).glob("*") if is_complete_checkpoint(path)]
    return max(folders, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def clear_unfinished(run_dir: Path) -> None:
    """Remove the folder of what is being written or deleted, with what a killed process left there."""
    for old in (run_dir / UNFINISHED).glob(f"{_REPLACED}*"):  # killed before the new one had the name
        target = run_dir / old.name.removeprefix(_REPLACED)
        if not target.exists():
            old.rename(target)
    shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)


def publish(written: Path, target: Path) -> None:
    """Have a folder below [`UNFINISHED`] appear under its own name, all at once and safe on the disk."""
    for path in written.rglob("*"):
        if path.is_file():
            _sync(path)
    old = written.parent / f"{_REPLACED}{target.name}"
    if target.exists():  # a folder with files cannot be replaced in one step
        target.rename(old)
    written.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def publish_files(written: Path, folder: Path) -> None:
    """Move files into a folder, each of them complete."""
    for path in sorted(written.iterdir()):
        _sync(path)
        path.replace(folder / path.name)
    written.rmdir()


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint. It loses its name first, so that half of it is never taken for all of it."""
    doomed = checkpoint.parent / UNFINISHED / f"deleted-{checkpoint.name}"
    doomed.parent.mkdir(exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def discard_after(checkpoint: Path) -> None:
    """Discard the checkpoints of later steps than this one: a run goes on from it."""
    step = int(checkpoint.name.rsplit("-", 1)[1])
    for path in checkpoint.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if _CHECKPOINT_NAME.fullmatch(path.name) and int(path.name.rsplit("-", 1)[1]) > step:
            discard(path)


def discard_old_checkpoints(run_dir: Path, limit: int | None, kept: Collection[str]) -> None:
    """Discard those of the earliest steps until there are `limit`, if that is a positive number.

    Args:
        run_dir: folder of the run.
        limit: how many stay.
        kept: names of checkpoints that stay in any case, like the one just written and the best one.
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
