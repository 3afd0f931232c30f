"""The real client against a stand-in of the Hub on loopback: what is pushed comes back, whatever happens on the way.

With PALS_HF_TESTS_ON_REAL_HUB=1 and HF_TOKEN, the round trips run against the real Hub, in private repositories that
are deleted afterwards; what only a server can see, and the faults, are left out.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import hub
import pytest
from conftest import tiny_segformer
from huggingface_hub import close_session, get_session
from launching import launcher
from test_checkpoints import write_checkpoint
from test_trainer import config

from pals_hf import PALSTrainer
from pals_hf.checkpoints import step_of
from pals_hf.hub import (
    NOT_OF_THE_RUN,
    RUN_FILES,
    _how_to_push,
    _matches,
    _newest_checkpoint,
    _persistently,
    push_command,
)
from pals_hf.models import build_image_processor

CLIENT = Path(__file__).parent / "hub_client.py"
IS_REAL = "PALS_HF_TESTS_ON_REAL_HUB" in os.environ
only_on_loopback = pytest.mark.skipif(IS_REAL, reason="a server that fails on command")


@pytest.fixture(name="server")
def _server():
    if IS_REAL:
        yield None
        return
    yield from hub.serving()


def as_user(server, what, folder):
    """Run a part of hub_client.py as a user of this Hub; what it returned, and printed."""
    if server is None:
        environment = {**os.environ, "HF_HOME": str(folder / "home"), "PALS_HF_TESTS_ON_LOOPBACK": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
    else:
        environment = hub.environment(server.endpoint, str(folder / "home"))
    command = list(map(str, [sys.executable, CLIENT, what, folder]))
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert environment["HF_TOKEN"] not in result.stdout + result.stderr
    return json.loads((folder / "result.json").read_text()), result.stdout


def no_token_in(files):
    assert not any(hub.TOKEN.encode() in content for content in files.values())


def test_a_model(server, tmp_path):
    result, _ = as_user(server, "push_and_load_a_model", tmp_path)
    assert result["labels"]
    if IS_REAL:
        return
    repository = server.repositories["model", "maintainer/street-model"]
    assert repository.private
    assert len(repository.commits) == 5  # an empty one, and twice the network and the processor
    files = server.files("maintainer/street-model")
    assert files.keys() >= {"model.safetensors", "config.json", "preprocessor_config.json"}
    assert len(files["model.safetensors"]) > hub.LFS_FROM
    no_token_in(files)
    assert sum(call.startswith("PUT /_lfs/") for call in server.calls) == 2  # both weights, as large files


def test_a_data_set(server, tmp_path):
    result, _ = as_user(server, "push_and_load_a_data_set", tmp_path)
    assert result == {"train": 4, "validation": 2, "fraction": 2, "streamed": 4, "same revision": True}


def test_a_run(server, tmp_path):
    """It pushes its checkpoints and its results; its card is followed, and another machine goes on from it."""
    result, said = as_user(server, "train_and_push", tmp_path)
    assert "pushed: " in said
    assert result["found"]
    assert result["steps"] == [1, 2, 3, 4, 5, 6]
    assert result["history"][:4] == result["first history"]
    root = {name for name in result["files"] if "/" not in name} - {".gitattributes"}
    assert root == {
        *("model.safetensors", "config.json", "preprocessor_config.json", "training_args.bin"),
        *("train_fraction.json", "trainer_state.json", "train_results.json", "eval_results.json", "all_results.json"),
        *("README.md", "model_card.json", "curves.png", "predictions.png"),
    }
    assert {name.split("/")[0] for name in result["files"]} - root <= {"last-checkpoint", ".gitattributes"}
    assert {f"last-checkpoint/{name}" for name in ("optimizer.pt", "train_fraction.json")} <= set(result["files"])
    assert f"output_dir {tmp_path / 'run'} already holds a run" in result["again"]
    if IS_REAL:
        return
    repository = server.repositories["model", "maintainer/trained"]
    assert repository.private
    for _, files in repository.commits:
        no_token_in(files)
    assert (tmp_path / "run" / "README.md").read_bytes() == server.files("maintainer/trained")["README.md"]


def test_only_files_of_the_run_itself_are_pushed():
    """`*` of a pattern means folders too, and a run's folder may hold others, or the data."""
    ours = ["model.safetensors", "README.md", "eval_results.json", "curves.png"]
    others = ["_lock", "other/model.safetensors", "train/masks/7.png", "run-2/checkpoint-4/README.md"]
    pushed = [n for n in ours + others if _matches(n, RUN_FILES) and not _matches(n, NOT_OF_THE_RUN)]
    assert pushed == ours


@pytest.mark.parametrize(
    ("folders", "newest"),
    [
        ([], None),
        (["last-checkpoint"], "last-checkpoint"),
        (["checkpoint-200", "checkpoint-1000"], "checkpoint-1000"),
        (["checkpoint-80", "last-checkpoint"], "last-checkpoint"),
        (["checkpoint-200", "last-checkpoint"], "checkpoint-200"),
    ],
)
def test_the_newest_checkpoint_of_either_kind(folders, newest):
    paths = ["README.md", *(f"{folder}/trainer_state.json" for folder in folders)]
    assert _newest_checkpoint(paths, {"last-checkpoint": 100}.__getitem__) == newest


@pytest.mark.parametrize("step", ["../../../x", "1", -1, 1.5, None, True, [1], {"a": 1}])
def test_the_step_of_a_checkpoint_is_no_path(step):
    with pytest.raises(ValueError, match="is not a number of steps"):
        step_of({"global_step": step})
    assert step_of({"global_step": 7}) == 7


def test_the_command_to_push_later_names_the_checkpoint(tmp_path, monkeypatch):
    """Whatever the folder is called: `.` is also in the name of the program."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "checkpoint-3")
    said = _how_to_push(Path(), push_command(".", "o/n"))
    assert said.endswith("Push it later with: pals-hf push checkpoint-3 --repo_id o/n")


@only_on_loopback
def test_faults(server, tmp_path):
    """What may pass is tried again; the rest ends in one line, and the run is as it was."""
    state = json.dumps({"global_step": "../../evil"}).encode()
    hostile = {"last-checkpoint/trainer_state.json": state, "last-checkpoint/scheduler.pt": b"", "../x/y.json": b""}
    server.repositories["model", "maintainer/hostile"] = hub.Repository(commits=[("a" * 40, hostile)])
    results, _ = as_user(server, "push_through_faults", tmp_path)
    assert results.pop("a step that is a path").endswith(
        "trainer_state.json has global_step='../../evil', which is not a number of steps"
    )
    assert not list(tmp_path.rglob("*evil*"))
    assert hub.TOKEN not in json.dumps(results)
    sha256, run = results.pop("sha256"), tmp_path / "run"
    assert results.pop("processor").startswith("cannot load the image processor of 'maintainer/c': ")
    assert results.pop("checkpoint") == (
        "no checkpoint of maintainer/c can be downloaded from the Hub: "
        "the token has no permission to read maintainer/c (403); use a token with read access"
    )
    names = results.pop("names")
    assert re.fullmatch(
        r"maintainer/c: id2label\.json cannot be downloaded \(.+\)\. Give the class names with id2label\.", names
    )
    for what in ("a page for JSON", "500 once", "503", "cut in a large file", "cut while committing"):
        assert results[what]["code"] == 0, results[what]
        repo_id = results[what]["lines"][0].split("/", 3)[3]
        assert hashlib.sha256(server.files(repo_id)["model.safetensors"]).hexdigest() == sha256
        no_token_in(server.files(repo_id))
    assert results["503"]["seconds"] >= 2
    forbidden = "the token has no permission to write to maintainer/b (403); use a token with write access"
    reasons = {
        "401": ("a", "the Hub does not accept the token (401); log in with `hf auth login`, or set HF_TOKEN"),
        "403": ("b", forbidden),
        "403 for a large file": ("b", forbidden),
        "a card it refuses": ("b", "Invalid metadata in README.md. - license must be one of ..."),
        "500 for long": ("d", "the Hub answered 500: injected 500, after 4 attempts"),
        "no token": ("h", "there is no token; log in with `hf auth login`, or set HF_TOKEN"),
    }
    for what, (name, reason) in reasons.items():
        later = f"Push them later with: pals-hf push {run} --repo_id maintainer/{name}"
        if what == "401":
            later += " --private --leave_out predictions.png '*.bin'"
        (line,) = results[what]["lines"]
        assert line == f"error: the push to maintainer/{name} failed: {reason}. All files are still in {run}. {later}"
        assert results[what]["code"] == 1
        assert ("model", f"maintainer/{name}") not in server.repositories or not server.files(f"maintainer/{name}")
    assert results["a token in a file"]["code"] == 2
    assert "train_results.json contains your token" in results["a token in a file"]["lines"][0]


@only_on_loopback
@pytest.mark.slow
def test_two_processes_push_once(server, tmp_path):
    script = Path(__file__).parents[1] / "examples" / "run_seg_pals.py"
    flags = ["--train_count", "4", "--max_steps", "2", "--save_steps", "1", "--per_device_train_batch_size", "2"]
    flags += ["--push_to_hub", "True", "--hub_model_id", "maintainer/both", "--hub_always_push", "True"]
    environment = hub.environment(server.endpoint, str(tmp_path / "home")) | {"ACCELERATE_USE_CPU": "true"}
    command = [*launcher(script, processes=2), *flags, "--output_dir", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("pushed: ") == 1
    assert (
        len(server.repositories["model", "maintainer/both"].commits) == 1 + 2 + 1
    )  # at the start, the saves, the end
    assert server.calls.count("POST /api/repos/create") == 1
    no_token_in(server.files("maintainer/both"))


@only_on_loopback
@pytest.mark.slow
@pytest.mark.parametrize("replaced", [[], ["model_card.json"]])
def test_no_network(tmp_path, replaced):
    """A run that is to push does not start; one that is finished stays as it is, and is not what could be pushed."""
    for name in replaced:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).write_text("{}")
    environment = hub.environment("http://127.0.0.1:9", str(tmp_path / "home"))
    script = Path(__file__).parents[1] / "examples" / "run_seg_pals.py"
    flags = [
        "--max_steps",
        "1",
        "--push_to_hub",
        "True",
        "--hub_model_id",
        "maintainer/a",
        "--output_dir",
        tmp_path / "run",
        "--overwrite",
    ]
    command = list(map(str, [sys.executable, script, *flags]))
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "error: the push to maintainer/a failed: the Hub cannot be reached: [Errno 111] Connection refused, after 4 "
        "attempts. Nothing was trained. Fix the problem, or train without push_to_hub and push the run later with: "
        f"pals-hf push {tmp_path / 'run'} --repo_id maintainer/a"
    )
    assert [path.name for path in tmp_path.glob("run/*")] == replaced
    assert (tmp_path / "run").exists() is bool(replaced)


@only_on_loopback
def test_ctrl_c_during_a_push(server, tmp_path):
    """It ends at once, though the Hub never answers, and though the client pushes in threads of its own."""
    run = tmp_path / "run"
    PALSTrainer(tiny_segformer(), config(run), processing_class=build_image_processor(None)).save_model()
    server.faults = [hub.Fault("PUT", "/_lfs/", is_silent=True)]
    command = [sys.executable, "-c", "from pals_hf.cli import main; main()", "push", run]
    with subprocess.Popen(
        [*command, "--repo_id", "street"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=hub.environment(server.endpoint, str(tmp_path / "home")),
    ) as push:
        while not any("/_lfs/" in call for call in server.calls):
            assert push.poll() is None, push.stdout.read()
            time.sleep(0.05)
        push.send_signal(signal.SIGINT)
        printed, _ = push.communicate(timeout=20)
    assert push.returncode == 130
    assert printed.splitlines()[-1] == "stopped by SIGINT"
    assert "Traceback" not in printed


def test_a_server_that_stops_answering_is_given_up():
    close_session()  # maybe of another test
    assert get_session().timeout.read is None  # as the client sets it
    try:
        assert _persistently(lambda: 1, "a/b", None, None, "later") == 1
        assert 60 <= get_session().timeout.read <= 600
    finally:
        close_session()
