"""Checkpoint folders, which are written and deleted atomically."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from .errors import InputError
from .files import has_type, read_json
from .pretrained import loading

# The folder of a run in which checkpoints are written and deleted. Names that begin with an underscore are not pushed.
UNFINISHED = "_unfinished"
_REPLACED = "replaced-"
_TRAINING_STATES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")
_STATE_TYPES = {
    **dict.fromkeys(("epoch", "best_metric"), float | None),
    **dict.fromkeys(("train_batch_size", "best_global_step"), int | None),
    **dict.fromkeys(("max_steps", "num_input_tokens_seen"), int),
    **dict.fromkeys(("num_train_epochs", "total_flos", "logging_steps", "eval_steps", "save_steps"), float | None),
    "best_model_checkpoint": str | None,
    "log_history": list[dict] | None,
    "stateful_callbacks": dict | None,
}
_CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


def is_complete_checkpoint(folder: str | os.PathLike) -> bool:
    """Return whether `folder` is a `checkpoint-STEP` from which a training can resume."""
    folder = Path(folder)
    try:
        read_json(folder / TRAINER_STATE_NAME)
    except InputError:
        return False
    return _CHECKPOINT_NAME.fullmatch(folder.name) is not None and (folder / SCHEDULER_NAME).exists()


def loading_checkpoint(checkpoint: str | os.PathLike | None, part: str = "") -> AbstractContextManager[None]:
    """Turn every error of the block, in which a training reads (a part of) a checkpoint, into one line."""
    failure = f"checkpoint {checkpoint} cannot be loaded" + (f": {part}" if part else "")
    return loading(failure, "Resume from an earlier checkpoint, or delete this one and start a new run.")


def refuse_damaged(checkpoint: str | os.PathLike) -> None:
    """Read the files that a training resumes from, before anything is done for it.

    Raises:
        InputError: a file is damaged, or contains code.
    """
    folder, files = Path(checkpoint), [*_TRAINING_STATES, "*.safetensors"]
    if (folder / TRAINER_STATE_NAME).exists():
        with loading_checkpoint(folder):
            _check_state(read_json(folder / TRAINER_STATE_NAME))
    for path in sorted(path for pattern in files for path in folder.glob(pattern)):
        with loading_checkpoint(folder, path.name):
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    continue
            with safe_globals():
                # Tensors stay on the disk where possible. Files in the old format cannot do that.
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}, not a state")
            if path.name == SCHEDULER_NAME and not isinstance(state.get("last_epoch"), int):
                raise ValueError("it is not the state of a learning rate schedule")


def _check_state(state: Any) -> None:
    TrainerState(**state)  # raises TypeError for unknown names
    for name, hint in _STATE_TYPES.items():
        if name in state and not has_type(state[name], hint):
            raise ValueError(f"{TRAINER_STATE_NAME} has {name}={state[name]!r:.80}")
    step_of(state)


def step_of(state: Any) -> int:
    """Return the step of a `trainer_state.json`.

    Raises:
        ValueError: it is not a number of steps.
    """
    step = state.get("global_step", 0) if isinstance(state, dict) else None
    if not has_type(step, int) or step < 0:
        raise ValueError(f"{TRAINER_STATE_NAME} has global_step={step!r:.80}, which is not a number of steps")
    return step


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
