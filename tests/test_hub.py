"""The real client against a stand-in of the Hub on loopback: what is pushed comes back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub
import pytest

loopback_hub = pytest.fixture(hub.serving)
CLIENT = Path(__file__).parent / "hub_client.py"


def as_user(loopback_hub, what, folder, token=hub.TOKEN):
    """Run a part of hub_client.py as a user of this Hub."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_ENDPOINT": loopback_hub.endpoint,
        "HF_TOKEN": token,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "PALS_HF_TESTS_ON_LOOPBACK": "1",
    }
    environment.pop("HF_DATASETS_CACHE", None)
    command = [sys.executable, CLIENT, what, folder]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert token not in result.stdout + result.stderr
    return json.loads((folder / "result.json").read_text())


def test_a_model(loopback_hub, tmp_path):
    result = as_user(loopback_hub, "push_and_load_a_model", tmp_path)
    assert result["labels"]
    repository = loopback_hub.repositories["model", "maintainer/street-model"]
    assert repository.private
    assert len(repository.commits) == 5  # an empty one, and twice the network and the processor
    files = loopback_hub.files("maintainer/street-model")
    assert files.keys() >= {"model.safetensors", "config.json", "preprocessor_config.json"}
    assert len(files["model.safetensors"]) > hub.LFS_FROM
    assert not any(hub.TOKEN.encode() in content for content in files.values())
    assert sum(call.startswith("PUT /_lfs/") for call in loopback_hub.calls) == 2  # both weights, as large files


def test_a_data_set(loopback_hub, tmp_path):
    result = as_user(loopback_hub, "push_and_load_a_data_set", tmp_path)
    assert result == {"train": 4, "validation": 2, "streamed": 4}
