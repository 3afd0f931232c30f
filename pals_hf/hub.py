"""Pushes to the Hub and downloads from it, with retries and with error messages of one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tenacity
from httpx2 import HTTPError, TransportError
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoints import (
    UNFINISHED,
    clear_unfinished,
    is_complete_checkpoint,
    last_complete_checkpoint,
    publish,
    step_of,
)
from .data.fractions import MANIFEST
from .errors import InputError, PushError, first_line
from .files import read_json
from .model_card import CARD_DATA

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

Result = TypeVar("Result")

MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "preprocessor_config.json"),
    *("training_args.bin", MANIFEST, CARD_DATA, "README.md"),
)
RUN_FILES = (*MODEL_FILES, TRAINER_STATE_NAME, "*_results.json", "*.png")
# Unfinished files and locks, and all folders: checkpoints, trials of a search, other runs, folders of the user.
NOT_OF_THE_RUN = ("_*", "*/*")
LAST_CHECKPOINT = "last-checkpoint"  # the folder that hub_strategy="checkpoint" of transformers uses
# Status codes of transient errors. Commits at the same time give 409 or 412.
_TRANSIENT = (409, 412, 429, 500, 502, 503, 504)
_TRIES = 4
_background = ThreadPoolExecutor(max_workers=1)  # one commit to a branch at a time


def push_command(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    revision: str | None = None,
    leave_out: Sequence[str] = (),
) -> str:
    """Return the command line that pushes a folder later."""
    flags = ["--private"] if private else []
    flags += ["--license", license] if license else []
    flags += ["--revision", revision] if revision else []
    flags += ["--leave_out", *leave_out] if leave_out else []
    return shlex.join(["pals-hf", "push", str(folder), "--repo_id", repo_id, *flags])


def create_repo(
    repo_id: str,
    folder: str | os.PathLike | None,
    private: bool | None = None,
    token: str | None = None,
    *,
    later: str,
) -> str:
    """Create a model repository for a run, unless it exists.

    Args:
        repo_id: NAME or OWNER/NAME.
        folder: the folder of the run, or None if the run has nothing to push yet.
        private: whether a new repository is private.
        token, later: see [`push_folder`].

    Returns:
        The full name of the repository, with its owner.

    Raises:
        PushError: see [`push_folder`].
    """
    create = HfApi(token=token).create_repo
    return _persistently(
        lambda: create(repo_id, private=private, exist_ok=True), repo_id, folder, token, later
    ).repo_id


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    message: str = "Upload model",
    revision: str | None = None,
    token: str | None = None,
    path_in_repo: str | None = None,
    patterns: Sequence[str] = RUN_FILES,
    leave_out: Sequence[str] = (),
    later: str | None = None,
) -> CommitInfo:
    """Push the files of a run or a checkpoint to an existing repository, in one commit.

    Transient errors, like a busy server or a lost connection, are retried after the delay that the server asks for.

    Args:
        folder: the folder of a run or a checkpoint.
        repo_id: OWNER/NAME.
        message: the message of the commit.
        revision: the branch. Default: main.
        token: a token of the Hub. Default: the token of `hf auth login` or of the environment variable HF_TOKEN.
        path_in_repo: the folder in the repository. Default: its root.
        patterns: patterns of files to push. Files that match [`NOT_OF_THE_RUN`] are pushed only with the pattern `*`.
        leave_out: patterns of files that are never pushed.
        later: the command for a later push, for the error message. Default: a command that repeats this push.

    Raises:
        PushError: the push failed. The message says why, and how to push later.
        InputError: a file to push contains the token.
    """
    never = [*leave_out, *(() if "*" in patterns else NOT_OF_THE_RUN)]
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
        token,
        later or push_command(folder, repo_id, revision=revision, leave_out=leave_out),
    )


def push_in_background(folder: str | os.PathLike, repo_id: str, **options: Any) -> Future:
    """Call [`push_folder`] in a background thread, after the pushes that were started before."""
    return _background.submit(push_folder, folder, repo_id, **options)


def download_checkpoint(
    repo_id: str, run_dir: str | os.PathLike, revision: str | None = None, token: str | None = None
) -> Path:
    """Download the newest checkpoint of a repository into a run's folder, to resume from it.

    Args:
        repo_id: the repository of a run with `hub_strategy` "checkpoint" or "all_checkpoints".
        run_dir: the folder in which `checkpoint-STEP` is written.
        revision: the branch or commit. Default: main.
        token: see [`push_folder`].

    Returns:
        The folder of the checkpoint.

    Raises:
        InputError: the repository does not exist, or has no complete checkpoint.
    """
    api, run_dir = HfApi(token=token), Path(run_dir)
    try:
        info = api.model_info(repo_id, revision=revision)

        def step_in(name: str) -> int:
            return step_of(read_json(api.hf_hub_download(repo_id, f"{name}/{TRAINER_STATE_NAME}", revision=info.sha)))

        name = _newest_checkpoint([file.rfilename for file in info.siblings], step_in)
        if name is None:
            raise InputError(
                f"{repo_id} has no checkpoint to resume from. Runs with --hub_strategy checkpoint push one."
            )
        snapshot = Path(api.snapshot_download(repo_id, revision=info.sha, allow_patterns=f"{name}/*")) / name
        step = step_in(name)
    except InputError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = _reason(error, repo_id, token, "read")
        raise InputError(f"no checkpoint of {repo_id} can be downloaded from the Hub: {reason}") from error
    checkpoint = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    written = run_dir / UNFINISHED / checkpoint.name
    clear_unfinished(run_dir)
    shutil.copytree(snapshot, written)
    if not is_complete_checkpoint(written):
        clear_unfinished(run_dir)
        raise InputError(f"{name} of {repo_id} is not a complete checkpoint: the state of the optimizer is missing")
    publish(written, checkpoint)
    clear_unfinished(run_dir)
    return checkpoint


def _newest_checkpoint(paths: Sequence[str], step_of: Callable[[str], int]) -> str | None:
    """Return the folder of the newest checkpoint. After a change of `hub_strategy` a repository has both kinds."""
    folders = {path.split("/")[0] for path in paths if path.endswith(f"/{TRAINER_STATE_NAME}")}
    numbered = [name for name in folders if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", name)]
    newest = max(numbered, key=lambda name: int(name.rsplit("-", 1)[1]), default=None)
    if LAST_CHECKPOINT not in folders:
        return newest
    return newest if newest and int(newest.rsplit("-", 1)[1]) > step_of(LAST_CHECKPOINT) else LAST_CHECKPOINT


def _refuse_tokens(folder: Path, patterns: Sequence[str], never: Sequence[str], token: str | None) -> None:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_pushed = path.is_file() and _matches(name, patterns) and not _matches(name, never)
        if token and is_pushed and path.suffix != ".safetensors" and token.encode() in path.read_bytes():
            raise InputError(
                f"{path} contains your token, so nothing was pushed. Delete the file and revoke the token."
            )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


# ---- Errors and retries ----


def _persistently(
    call: Callable[[], Result], repo_id: str, folder: str | os.PathLike | None, token: str | None, later: str
) -> Result:
    """Call a function of the client, retry transient errors, and turn other errors into a [`PushError`]."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        stop=tenacity.stop_after_attempt(_TRIES),
        wait=_wait,
        reraise=True,
    )
    try:
        return retrying(call)
    except (
        HTTPError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # the errors of the client have no common base class
        times = f", after {_TRIES} attempts" if _is_transient(error) else ""
        reason = f"{_reason(error, repo_id, token, 'write to')}{times}"
        raise PushError(f"the push to {repo_id} failed: {reason}. {_how_to_push(folder, later)}") from error


def _how_to_push(folder: str | os.PathLike | None, later: str) -> str:
    """Return a message that says where the files are, and with which command they can be pushed later."""
    if folder is not None and (Path(folder) / CARD_DATA).exists():
        return f"All files are still in {folder}. Push them later with: {later}"
    checkpoint = None if folder is None else last_complete_checkpoint(folder)
    if checkpoint is not None:
        words = shlex.split(later)
        words[words.index(str(folder))] = str(checkpoint)
        later = shlex.join(words)
        return f"The last checkpoint is {checkpoint}. Push it later with: {later}"
    return f"Nothing was trained. Fix the problem, or train without push_to_hub and push the run later with: {later}"


def _source(error: BaseException) -> BaseException:
    """Return the original error. The client wraps it in a RuntimeError if the upload of a large file fails."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, HTTPError | OSError) else error


def _is_transient(error: BaseException) -> bool:
    error = _source(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # A busy server may also send an HTML page instead of JSON.
    return isinstance(error, TransportError | ConnectionError | TimeoutError | json.JSONDecodeError)


def _wait(state: tenacity.RetryCallState) -> float:
    """Return the seconds to wait: the delay that the server asks for, or else an exponential backoff."""
    error = _source(state.outcome.exception())
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(asked) if asked.isdigit() else tenacity.wait_exponential(multiplier=1, max=30)(state)


def _reason(error: BaseException, repo_id: str, token: str | None, wanted: str) -> str:
    """Return why a repository could not be accessed, and what to do. `wanted` is "read" or "write to"."""
    error = _source(error)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or (status == 401 and not (token or get_token())):
        return "there is no token; log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to use the Hub"
    if status == 401:
        return "the Hub does not accept the token (401); log in with `hf auth login`, or set HF_TOKEN"
    if status == 403 and not isinstance(error, RepositoryNotFoundError):
        return f"the token has no permission to {wanted} {repo_id} (403); use a token with {wanted.split()[0]} access"
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return f"the repository or revision does not exist, or the token has no access to it ({status})"
    if status is not None:
        return f"the Hub answered {status}: {error.server_message or first_line(error)}"
    if isinstance(error, json.JSONDecodeError):
        return "the answer of the Hub is not JSON"
    if isinstance(error, TransportError | ConnectionError | TimeoutError):
        return f"the Hub cannot be reached: {first_line(error)}"
    return " ".join(str(error).split()) or type(error).__name__
