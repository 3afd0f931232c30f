"""The output folder of a run: only one run uses it at a time, and its checkpoints belong to one training."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .checkpoints import discard_after, is_complete_checkpoint, last_complete_checkpoint, refuse_damaged
from .config import PALSConfig
from .data import FractionManifest
from .data.fractions import MANIFEST
from .errors import InputError
from .files import refuse_unwritable
from .hub import download_checkpoint
from .model_card import CARD_DATA, PICTURES, CardData, is_hub_id
from .models import listed

RESULTS = "eval_results.json"  # the last file that a run writes, so that with it the run is finished
LOCK = "_lock"  # names that begin with an underscore are not pushed to the Hub


@contextmanager
def lock_output_dir(output_dir: str | os.PathLike) -> Iterator[None]:
    """Create a folder, and lock it against other runs until the block or the process ends.

    The lock is released even if the process is killed.

    Raises:
        InputError: another run has locked the folder.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / LOCK), folder / f"{LOCK}-owner"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise InputError(
            f"output_dir {folder} is in use by {who}. Wait for it to end, or use another folder."
        ) from None
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def find_checkpoint(config: PALSConfig) -> Path | None:
    """Find the checkpoint that `config.resume_from_checkpoint` names.

    A checkpoint's path names that checkpoint. A run's folder names its newest complete checkpoint, and `last` and
    `auto` name the newest one in `config.output_dir`; `auto` starts a new run if there is none. A repository on the
    Hub, OWNER/NAME, names its newest checkpoint, which is downloaded to `config.output_dir`, by default `runs/NAME`.
    With several processes, only the main process should call this, because another run may be writing a checkpoint.

    Returns:
        The folder of the checkpoint, or None for a new run.

    Raises:
        InputError: there is no complete checkpoint.
    """
    resume, output_dir = config.resume_from_checkpoint, config.output_dir
    if resume == "auto" and not output_dir:
        raise InputError("resume_from_checkpoint=auto needs output_dir")
    path = Path(output_dir or ".") if resume in ("last", "auto") else Path(resume)
    if is_hub_id(resume):
        return _fetch(resume, Path(output_dir or f"runs/{path.name}"), config)
    checkpoint = path if is_complete_checkpoint(path) else last_complete_checkpoint(path)
    if checkpoint is None and resume != "auto":
        raise InputError(f"resume_from_checkpoint={resume}: there is no complete checkpoint in {path}")
    return checkpoint


def _fetch(repo_id: str, run_dir: Path, config: PALSConfig) -> Path:
    if _files_of_a_run(run_dir):
        raise InputError(
            f"output_dir {run_dir} already holds a run. Use --resume_from_checkpoint last to resume it, or another "
            f"folder to resume the run of {repo_id}."
        )
    is_new = not run_dir.exists()
    with lock_output_dir(run_dir):
        try:
            return download_checkpoint(repo_id, run_dir, config.hub_revision, config.hub_token)
        except InputError as error:
            if is_new:  # nobody else writes into a locked folder
                shutil.rmtree(run_dir)
            raise InputError(f"resume_from_checkpoint={repo_id}: there is no such folder, and {error}") from error


def refuse_other_run(run_dir: Path, checkpoint: Path | None, overwrite: bool = False) -> None:
    """Refuse to mix the files of two runs in one folder.

    Args:
        run_dir: the folder of the new or resumed run.
        checkpoint: the checkpoint from which the run resumes, or None for a new run.
        overwrite: allow the run to replace another one.

    Raises:
        InputError: the folder holds another run, or later checkpoints than `checkpoint`; or the folder cannot be
            created or written to.
    """
    refuse_unwritable(run_dir)
    goes_on_here = _goes_on_in(run_dir, checkpoint)
    if goes_on_here and not is_complete_checkpoint(checkpoint):
        raise InputError(f"{checkpoint} does not exist any more: another run has used output_dir {run_dir} meanwhile")
    if overwrite:
        return
    if not goes_on_here and _files_of_a_run(run_dir):
        raise InputError(
            f"output_dir {run_dir} already holds a run. Use --resume_from_checkpoint last to resume it, "
            "--overwrite to replace it, or another folder."
        )
    replaced = [name for name in ("README.md", *PICTURES) if (run_dir / name).exists()]
    if not goes_on_here and replaced and not (run_dir / CARD_DATA).exists():
        raise InputError(
            f"output_dir {run_dir} holds {replaced[0]}, which no run has written. Use another folder, or --overwrite "
            "to replace the file."
        )
    newest = last_complete_checkpoint(run_dir)
    if goes_on_here and newest.name != checkpoint.name:
        raise InputError(
            f"output_dir {run_dir} holds {newest.name}, but the run would resume from {checkpoint.name}. Use "
            f"--resume_from_checkpoint last, --overwrite to discard {newest.name}, or another folder."
        )


def refuse_other_training(
    checkpoint: Path, config: PALSConfig, manifest: FractionManifest | None, id2label: dict[int, str]
) -> None:
    """Refuse to resume a run with other images, classes or another loss, even if only the defaults have changed.

    Raises:
        InputError: `checkpoint` is damaged, or was trained on other images, on other classes (in a stream, the images
            do not tell), with another loss, or with a setting that this version does not have.
    """
    refuse_damaged(checkpoint)
    recorded = checkpoint / MANIFEST
    # The manifest also names the folder of the data, which may have moved.
    if recorded.exists() and _images_of(FractionManifest.load(recorded)) != _images_of(manifest):
        raise InputError(f"{checkpoint} was trained on other images. Use those in {recorded}, or start a new run.")
    if not (checkpoint / CARD_DATA).exists():
        return
    card = CardData.load(checkpoint)
    if card.id2label != id2label:
        raise InputError(
            f"{checkpoint} was trained on the classes {listed(card.id2label)}, but the data set has "
            f"{listed(id2label)}. Name them as before, or start a new run."
        )
    began, now = {"loss": card.loss, **card.loss_settings}, {"loss": config.loss, **config.loss_settings}
    other = {name: value for name, value in began.items() if now.get(name) != value}
    if gone := [name for name in other if not hasattr(config, name)]:
        raise InputError(
            f"{checkpoint} was trained by another version of pals_hf, with {gone[0]}={_as_flag(other[gone[0]])}, "
            "which this version does not have. Start a new run, or resume it with the version that began it."
        )
    if other:
        flags = shlex.join(word for name, value in other.items() for word in (f"--{name}", _as_flag(value)))
        raise InputError(f"{checkpoint} was trained with another loss. Resume it with {flags}, or start a new run.")


def _as_flag(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def has_results(run_dir: Path, checkpoint: Path) -> bool:
    """Return whether the run of a checkpoint has come to its end in this folder. It may have been asked for less."""
    return _goes_on_in(run_dir, checkpoint) and (run_dir / RESULTS).exists()


def discard_other_run(run_dir: Path, checkpoint: Path | None) -> None:
    """Delete what the run will replace. Files that no run has written stay.

    These are the checkpoints after `checkpoint` and the results of an earlier end, or the files of another run.
    """
    if _goes_on_in(run_dir, checkpoint):
        discard_after(checkpoint)
        for path in run_dir.glob("*_results.json"):
            path.unlink()
        return
    described = (run_dir / name for name in (MANIFEST, *PICTURES))
    for path in (*_files_of_a_run(run_dir), *filter(Path.exists, described)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _goes_on_in(run_dir: Path, checkpoint: Path | None) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == run_dir.resolve()


def _files_of_a_run(run_dir: Path) -> list[Path]:
    patterns = ("checkpoint-*", "model*.safetensors", "*_results.json", "trainer_state.json")
    return [path for pattern in patterns for path in run_dir.glob(pattern)]


def _images_of(manifest: FractionManifest | None) -> tuple[str, list[str]] | None:
    return None if manifest is None else (manifest.fingerprint, manifest.ids)
