"""What cannot run here is at least what Accelerate's own parser takes."""

import json
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from conftest import RAW_VOID
from launching import launch

RECORDER = Path(__file__).parents[1] / "cli" / "record_ranks.py"
FOLDER = Path(__file__).parents[2] / "examples" / "accelerate_configs"
KINDS = {
    "cpu": (DistributedType.NO, 1),
    "one_gpu": (DistributedType.NO, 1),
    "several_gpus": (DistributedType.MULTI_GPU, 4),
    "several_machines": (DistributedType.MULTI_GPU, 8),
    "fsdp2": (DistributedType.FSDP, 4),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, 4),
}


def test_all_are_known():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_is_read_by_accelerate(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == KINDS[name]
    assert config.use_cpu is (name == "cpu")


def test_one_process_without_a_gpu(folder, tmp_path):
    """The config that can run anywhere, as the examples' README says it."""
    output = tmp_path / "run"
    data = ["--dataset_dir", folder, "--void_labels", RAW_VOID, "--crop_size", 32, 32, "--output_dir", output]
    launch(RECORDER, tmp_path, *data, "--max_steps", 1, "--disable_tqdm", "True", config=FOLDER / "cpu.yaml")
    record = json.loads((tmp_path / "rank-0.json").read_text())
    assert record["world_size"] == 1
    assert len(set(record["trained_on"])) == 8
    assert (output / "eval_results.json").exists()


def test_the_job_script_is_valid_shell():
    assert subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=False).returncode == 0
