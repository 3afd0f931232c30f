"""The folder of a run: one run at a time, one history, and where a run goes on."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .checkpoints import discard_after, is_complete_checkpoint, last_complete_checkpoint
from .config import PALSConfig
from .data import FractionManifest
from .data.fractions import MANIFEST
from .errors import InputError
from .hub import download_checkpoint
from .model_card import CARD_DATA, PICTURES, CardData, is_hub_id, loss_settings

LOCK = "_lock"  # what begins with an underscore is not pushed to the Hub


@contextmanager
def claimed(output_dir: str | os.PathLike) -> Iterator[None]:
    """Make a folder, and keep other runs out of it until the block or the process ends, however that ends.

    Raises:
        InputError: another run has it.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / LOCK), folder / f"{LOCK}-owner"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise InputError(f"output_dir {folder} is in use by {who}: wait for it, or take another folder") from None
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def find_checkpoint(config: PALSConfig) -> Path | None:
    """The checkpoint that `config.resume_from_checkpoint` means.

    `last` and a run's folder are its newest complete one, and so is `auto`, which starts anew where there is none; a
    checkpoint's own path is that. Of a repository on the Hub, OWNER/NAME, the checkpoint is fetched into
    `config.output_dir`, by default `runs/NAME`. With several processes the main one calls this: another run may just
    be writing a newer one.

    Returns:
        The checkpoint's folder, or None for a new start.

    Raises:
        InputError: there is no complete checkpoint.
    """
    resume, output_dir = config.resume_from_checkpoint, config.output_dir
    if resume == "auto" and not output_dir:
        raise InputError("resume_from_checkpoint auto needs the run's output_dir")
    path = Path(output_dir or ".") if resume in ("last", "auto") else Path(resume)
    if is_hub_id(resume):
        return _fetch(resume, Path(output_dir or f"runs/{path.name}"), config)
    checkpoint = path if is_complete_checkpoint(path) else last_complete_checkpoint(path)
    if checkpoint is None and resume != "auto":
        raise InputError(f"resume_from_checkpoint {resume}: there is no complete checkpoint at {path}")
    return checkpoint


def _fetch(repo_id: str, run_dir: Path, config: PALSConfig) -> Path:
    if _files_of_a_run(run_dir):
        raise InputError(
            f"output_dir {run_dir} already holds a run: use --resume_from_checkpoint last, or another folder for that "
            f"of {repo_id}"
        )
    is_new = not run_dir.exists()
    with claimed(run_dir):
        try:
            return download_checkpoint(repo_id, run_dir, config.hub_revision, config.hub_token)
        except InputError as error:
            if is_new:  # and ours: nobody else writes into what is claimed
                shutil.rmtree(run_dir)
            raise InputError(f"resume_from_checkpoint {repo_id}: there is no such folder, and {error}") from error


def refuse_other_run(run_dir: Path, checkpoint: Path | None, overwrite: bool = False) -> None:
    """One history a folder, unless `overwrite` allows to discard what is there.

    Args:
        run_dir: where a run is to go.
        checkpoint: what it goes on from, or None.
        overwrite: it may replace another run.

    Raises:
        InputError: the folder holds another run, or later checkpoints than `checkpoint`, which would be taken for
            those of the new run; or it cannot be made or written to.
    """
    place = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not place.is_dir():
        raise InputError(f"output_dir {run_dir}: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"output_dir {run_dir}: {place} may not be written to")
    goes_on_here = _goes_on_in(run_dir, checkpoint)
    if goes_on_here and not is_complete_checkpoint(checkpoint):
        raise InputError(f"{checkpoint} is gone: another run has taken output_dir {run_dir} meanwhile")
    if overwrite:
        return
    if not goes_on_here and _files_of_a_run(run_dir):
        raise InputError(
            f"output_dir {run_dir} already holds a run: use --overwrite, --resume_from_checkpoint or another folder"
        )
    replaced = [name for name in ("README.md", *PICTURES) if (run_dir / name).exists()]
    if not goes_on_here and replaced and not (run_dir / CARD_DATA).exists():
        raise InputError(f"output_dir {run_dir} holds {replaced[0]}, of no run: use another folder, or --overwrite it")
    newest = last_complete_checkpoint(run_dir)
    if goes_on_here and newest.name != checkpoint.name:
        raise InputError(
            f"output_dir {run_dir} holds {newest.name}, which is not what the run would go on from: "
            "use --resume_from_checkpoint last, --overwrite to discard it, or another folder"
        )


def refuse_other_training(checkpoint: Path, config: PALSConfig, manifest: FractionManifest | None) -> None:
    """A run goes on with the images and the loss that it began with, also where defaults have changed since.

    Raises:
        InputError: `checkpoint` records others.
    """
    recorded = checkpoint / MANIFEST
    # The name that it notes is that of a folder, which may be another one now.
    if recorded.exists() and _images_of(FractionManifest.load(recorded)) != _images_of(manifest):
        raise InputError(f"{checkpoint} was trained on other images: see {recorded}")
    if not (checkpoint / CARD_DATA).exists():
        return
    card = CardData.load(checkpoint)
    began, now = {"loss": card.loss, **card.loss_settings}, {"loss": config.loss, **loss_settings(config)}
    other = [f"--{name} {value}" for name, value in began.items() if now.get(name) != value]
    if other:
        raise InputError(
            f"{checkpoint} was trained with another loss: go on with {' '.join(other)}, or begin a new run"
        )


def discard_other_run(run_dir: Path, checkpoint: Path | None) -> None:
    """Take away what a run there replaces: what comes after `checkpoint`, or all of another run. Other files stay."""
    if _goes_on_in(run_dir, checkpoint):
        discard_after(checkpoint)
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
