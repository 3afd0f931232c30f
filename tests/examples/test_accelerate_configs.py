"""What cannot run here is at least what Accelerate's own parser takes."""

import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

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


def test_the_job_script_is_valid_shell():
    assert subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=False).returncode == 0
