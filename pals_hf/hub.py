"""To and from the Hub: what of a run is pushed, when a push is tried again, and what is said when it failed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tenacity
from httpx2 import HTTPError, TransportError
from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoints import UNFINISHED, clear_unfinished, is_complete_checkpoint, publish
from .data.fractions import MANIFEST
from .errors import InputError, PushError, first_line

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

Result = TypeVar("Result")

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "preprocessor_config.json")
PUSHED = (
    *MODEL_FILES,
    *("training_args.bin", TRAINER_STATE_NAME, MANIFEST, "*_results.json"),
    *("README.md", "model_card.json", "*.png"),
)
LAST_CHECKPOINT = "last-checkpoint"  # where transformers' hub_strategy="checkpoint" puts one to go on from
_PASSING = (429, 500, 502, 503, 504)
_TRIES = 4


def create_repo(repo_id: str, folder: str | os.PathLike, private: bool | None = None, token: str | None = None) -> str:
    """Make sure that there is a model repository to push a run's folder to.

    Returns:
        Its full name, with the owner.

    Raises:
        PushError: see [`push_folder`].
    """
    create = HfApi(token=token).create_repo
    return _persistently(lambda: create(repo_id, private=private, exist_ok=True), repo_id, folder).repo_id


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    message: str = "Upload model",
    revision: str | None = None,
    token: str | None = None,
    path_in_repo: str | None = None,
    patterns: Sequence[str] = PUSHED,
    leave_out: Sequence[str] = (),
) -> CommitInfo:
    """Push the files of a run, or of a checkpoint, to an existing repository, in one commit.

    What may pass - a busy server, a connection that is cut - is tried again, after the time that the server asks for.
    The folder is only read.

    Args:
        folder: of a run or a checkpoint.
        repo_id: OWNER/NAME.
        message: of the commit.
        revision: branch. Default: main.
        token: by default that of `hf auth login` or of the environment variable HF_TOKEN.
        path_in_repo: folder of the repository. Default: its root.
        patterns: what is pushed. Files and folders whose name begins with an underscore, and checkpoints inside of the
            folder, are not.
        leave_out: patterns of what is not pushed in any case.

    Raises:
        PushError: it was not pushed. One line says why, and how to push it later.
        InputError: a file that would be pushed contains the token.
    """
    never = ["_*", "*/_*", f"{PREFIX_CHECKPOINT_DIR}-*", *leave_out]
    _refuse_tokens(Path(folder), patterns, never, token or get_token())
    upload = HfApi(token=token).upload_folder
    return _persistently(
        lambda: upload(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=message,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=never,
        ),
        repo_id,
        folder,
    )


def push_in_background(folder: str | os.PathLike, repo_id: str, **options: Any) -> Future:
    """[`push_folder`] while other things go on; one after the other."""
    return HfApi().run_as_future(push_folder, folder, repo_id, **options)


def download_checkpoint(repo_id: str, run_dir: str | os.PathLike) -> Path:
    """Fetch the newest checkpoint of a repository into a run's folder, to go on from it.

    Args:
        repo_id: a repository that a run with `hub_strategy` "checkpoint" or "all_checkpoints" pushed to.
        run_dir: gets `checkpoint-STEP`, and the manifest of the training images if there is none yet.

    Raises:
        InputError: there is no such repository or no complete checkpoint in it.
    """
    run_dir = Path(run_dir)
    try:
        paths = HfApi().list_repo_files(repo_id)
        name = _newest_checkpoint(paths)
        if name is None:
            raise InputError(
                f"{repo_id} holds no checkpoint to go on from: it was not pushed with --hub_strategy checkpoint"
            )
        snapshot = Path(snapshot_download(repo_id, allow_patterns=[f"{name}/*", MANIFEST]))
    except (HTTPError, OSError, HFValidationError) as error:
        raise InputError(f"cannot fetch a checkpoint of {repo_id} from the Hub: {_reason(error, repo_id)}") from error
    try:
        step = json.loads((snapshot / name / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{name} of {repo_id}: {TRAINER_STATE_NAME} is damaged: {first_line(error)}") from error
    checkpoint = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    written = run_dir / UNFINISHED / checkpoint.name
    clear_unfinished(run_dir)
    shutil.copytree(snapshot / name, written)
    if not is_complete_checkpoint(written):
        clear_unfinished(run_dir)
        raise InputError(f"{name} of {repo_id} is no complete checkpoint: it lacks the state of the optimizer")
    publish(written, checkpoint)
    clear_unfinished(run_dir)
    if (snapshot / MANIFEST).exists() and not (run_dir / MANIFEST).exists():
        shutil.copy(snapshot / MANIFEST, run_dir / MANIFEST)
    return checkpoint


def _newest_checkpoint(paths: Sequence[str]) -> str | None:
    """The folder of a repository with the newest checkpoint."""
    folders = {path.split("/")[0] for path in paths if path.endswith(f"/{TRAINER_STATE_NAME}")}
    if LAST_CHECKPOINT in folders:
        return LAST_CHECKPOINT
    checkpoints = [name for name in folders if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", name)]
    return max(checkpoints, key=lambda name: int(name.rsplit("-", 1)[1]), default=None)


def _refuse_tokens(folder: Path, patterns: Sequence[str], never: Sequence[str], token: str | None) -> None:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_pushed = path.is_file() and _matches(name, patterns) and not _matches(name, never)
        if token and is_pushed and path.suffix != ".safetensors" and token.encode() in path.read_bytes():
            raise InputError(f"{path} contains your token, so nothing was pushed: delete it, and revoke the token")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


# ---- When it fails ----


def _persistently(call: Callable[[], Result], repo_id: str, folder: str | os.PathLike) -> Result:
    """Call it, and again where what went wrong may pass."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        stop=tenacity.stop_after_attempt(_TRIES),
        wait=_wait,
        reraise=True,
    )
    try:
        return retrying(call)
    except (HTTPError, OSError, HFValidationError) as error:
        is_trained = (Path(folder) / "config.json").exists()
        left = f"Everything is still in {folder}"
        if not is_trained:
            left = "Nothing was trained: mend that, or leave out push_to_hub"
        raise PushError(
            f"not pushed to {repo_id}: {_reason(error, repo_id)}. {left}; push later with: "
            f"python examples/push_checkpoint.py {folder} --repo_id {repo_id}"
        ) from error


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING
    return isinstance(error, TransportError)


def _wait(state: tenacity.RetryCallState) -> float:
    """As long as the server asks for, else longer and longer."""
    error = state.outcome.exception()
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(asked) if asked.isdigit() else tenacity.wait_exponential(multiplier=1, max=30)(state)


def _reason(error: Exception, repo_id: str) -> str:
    """What went wrong with the Hub, and what to do about it."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or (status == 401 and get_token() is None):
        return "there is no token: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if status == 401:
        return "the Hub does not accept the token (401): log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the token may not write to {repo_id} (403): it needs the right to write there"
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return f"there is no such repository or revision, or the token may not see it ({status})"
    if status is not None:
        times = f", {_TRIES} times" if status in _PASSING else ""
        return f"the Hub answered {status}{times}: {error.server_message or first_line(error)}"
    if isinstance(error, HTTPError):
        return f"the Hub cannot be reached, {_TRIES} times: {first_line(error)}"
    return first_line(error)
