"""To and from the Hub: what of a run is pushed, when a push is tried again, and what is said when it failed."""

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

from .checkpoints import UNFINISHED, clear_unfinished, is_complete_checkpoint, last_complete_checkpoint, publish
from .data.fractions import MANIFEST
from .errors import InputError, PushError, first_line
from .model_card import CARD_DATA

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

Result = TypeVar("Result")

MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "preprocessor_config.json"),
    *("training_args.bin", MANIFEST, CARD_DATA, "README.md"),
)
RUN_FILES = (*MODEL_FILES, TRAINER_STATE_NAME, "*_results.json", "*.png")
# Unfinished or locked things, and all folders: checkpoints, trials of a search, other runs, the user's own.
NOT_OF_THE_RUN = ("_*", "*/*")
LAST_CHECKPOINT = "last-checkpoint"  # where transformers' hub_strategy="checkpoint" puts one to go on from
# What may pass, among it commits that crossed each other.
_PASSING = (409, 412, 429, 500, 502, 503, 504)
_TRIES = 4
_background = ThreadPoolExecutor(max_workers=1)  # commits to a branch must not cross


def push_command(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    revision: str | None = None,
    leave_out: Sequence[str] = (),
) -> str:
    """The command line that pushes a folder later."""
    flags = ["--private"] if private else []
    flags += ["--license", license] if license else []
    flags += ["--revision", revision] if revision else []
    flags += ["--leave_out", *leave_out] if leave_out else []
    return shlex.join(["python", "examples/push_checkpoint.py", str(folder), "--repo_id", repo_id, *flags])


def create_repo(
    repo_id: str,
    folder: str | os.PathLike | None,
    private: bool | None = None,
    token: str | None = None,
    *,
    later: str,
) -> str:
    """Make sure that there is a model repository to push a run's folder to.

    Args:
        repo_id: NAME or OWNER/NAME.
        folder: of the run, None before it has anything to push.
        private: whether a new repository is private.
        token, later: see [`push_folder`].

    Returns:
        Its full name, with the owner.

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
        patterns: what is pushed; but never [`NOT_OF_THE_RUN`], unless all files (`*`) of a checkpoint are asked for.
        leave_out: patterns of what is not pushed in any case.
        later: the command that the error names. Default: that of this push.

    Raises:
        PushError: it was not pushed. One line says why, and how to push it later.
        InputError: a file that would be pushed contains the token.
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
    """[`push_folder`] while other things go on, one after the other."""
    return _background.submit(push_folder, folder, repo_id, **options)


def download_checkpoint(
    repo_id: str, run_dir: str | os.PathLike, revision: str | None = None, token: str | None = None
) -> Path:
    """Fetch the newest checkpoint of a repository into a run's folder, to go on from it.

    Args:
        repo_id: a repository that a run with `hub_strategy` "checkpoint" or "all_checkpoints" pushed to.
        run_dir: gets `checkpoint-STEP`.
        revision: branch or commit. Default: main.
        token: see [`push_folder`].

    Raises:
        InputError: there is no such repository or no complete checkpoint in it.
    """
    api, run_dir = HfApi(token=token), Path(run_dir)
    try:
        info = api.model_info(repo_id, revision=revision)

        def step_of(name: str) -> int:
            state = api.hf_hub_download(repo_id, f"{name}/{TRAINER_STATE_NAME}", revision=info.sha)
            return json.loads(Path(state).read_text(encoding="utf-8"))["global_step"]

        name = _newest_checkpoint([file.rfilename for file in info.siblings], step_of)
        if name is None:
            raise InputError(
                f"{repo_id} holds no checkpoint to go on from: runs with --hub_strategy checkpoint push one"
            )
        snapshot = Path(api.snapshot_download(repo_id, revision=info.sha, allow_patterns=f"{name}/*")) / name
        step = step_of(name)
    except InputError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = _reason(error, repo_id, token, "read")
        raise InputError(f"cannot fetch a checkpoint of {repo_id} from the Hub: {reason}") from error
    checkpoint = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    written = run_dir / UNFINISHED / checkpoint.name
    clear_unfinished(run_dir)
    shutil.copytree(snapshot, written)
    if not is_complete_checkpoint(written):
        clear_unfinished(run_dir)
        raise InputError(f"{name} of {repo_id} is no complete checkpoint: it lacks the state of the optimizer")
    publish(written, checkpoint)
    clear_unfinished(run_dir)
    return checkpoint


def _newest_checkpoint(paths: Sequence[str], step_of: Callable[[str], int]) -> str | None:
    """The folder of a repository with the newest checkpoint; both kinds are there after a change of `hub_strategy`."""
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
            raise InputError(f"{path} contains your token, so nothing was pushed: delete it, and revoke the token")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


# ---- When it fails ----


def _persistently(
    call: Callable[[], Result], repo_id: str, folder: str | os.PathLike | None, token: str | None, later: str
) -> Result:
    """Call it, and again where what went wrong may pass."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        stop=tenacity.stop_after_attempt(_TRIES),
        wait=_wait,
        reraise=True,
    )
    try:
        return retrying(call)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # the client has no base of its own for them
        times = f", {_TRIES} times" if _may_pass(error) else ""
        reason = f"{_reason(error, repo_id, token, 'write to')}{times}"
        raise PushError(f"not pushed to {repo_id}: {reason}. {_what_is_left(folder, later)}") from error


def _what_is_left(folder: str | os.PathLike | None, later: str) -> str:
    if folder is not None and (Path(folder) / CARD_DATA).exists():
        return f"Everything is still in {folder}; push it later with: {later}"
    checkpoint = None if folder is None else last_complete_checkpoint(folder)
    if checkpoint is not None:
        words = shlex.split(later)
        words[words.index(str(folder))] = str(checkpoint)
        later = shlex.join(words)
        return f"The last checkpoint is {checkpoint}; push it later with: {later}"
    return f"Nothing was trained: mend that, or train without push_to_hub, and push then with: {later}"


def _source(error: BaseException) -> BaseException:
    """What the client wrapped: it raises a RuntimeError of its own where a large file could not be sent."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, HTTPError | OSError) else error


def _may_pass(error: BaseException) -> bool:
    error = _source(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # A server in trouble also answers with a page where the client looks for JSON.
    return isinstance(error, TransportError | ConnectionError | TimeoutError | json.JSONDecodeError)


def _wait(state: tenacity.RetryCallState) -> float:
    """As long as the server asks for, else longer and longer."""
    error = _source(state.outcome.exception())
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(asked) if asked.isdigit() else tenacity.wait_exponential(multiplier=1, max=30)(state)


def _reason(error: BaseException, repo_id: str, token: str | None, wanted: str) -> str:
    """What went wrong when one wanted to "read" or to "write to" a repository of the Hub, and what to do about it."""
    error = _source(error)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or (status == 401 and not (token or get_token())):
        return "there is no token: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if status == 401:
        return "the Hub does not accept the token (401): log in with `hf auth login`, or set HF_TOKEN"
    if status == 403 and not isinstance(error, RepositoryNotFoundError):
        return f"the token may not {wanted} {repo_id} (403): it needs the right to {wanted.split()[0]} there"
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return f"there is no such repository or revision, or the token may not see it ({status})"
    if status is not None:
        return f"the Hub answered {status}: {error.server_message or first_line(error)}"
    if isinstance(error, json.JSONDecodeError):
        return "the Hub answered with something that is no JSON"
    if isinstance(error, TransportError | ConnectionError | TimeoutError):
        return f"the Hub cannot be reached: {first_line(error)}"
    return " ".join(str(error).split()) or type(error).__name__
