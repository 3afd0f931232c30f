"""`pals-hf push` with wrong input; `test_hub.py` pushes to a server."""

from launching import call
from trained import save_checkpoint

from pals_hf.cli import push


def test_a_folder_that_is_not_a_finished_run(tmp_path):
    for folder in (tmp_path / "nowhere", save_checkpoint(tmp_path / "model")):
        result = call(push.main, folder, "--repo_id", "someone/streets")
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert str(folder) in result.stderr


def test_arguments_are_required(tmp_path):
    result = call(push.main, tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--repo_id" in result.stderr
