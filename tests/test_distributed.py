"""Two real processes through `accelerate launch`."""

import json
from pathlib import Path

import pytest
from launching import launch

SCRIPT = Path(__file__).parent / "train_one_step.py"


@pytest.mark.parametrize("loss", ["pals", "pals, every option", "ce"])
def test_a_batch_gives_one_gradient_however_it_is_cut_up(loss, tmp_path):
    """8 images at once = 2 processes x 2 images x 2 accumulation steps, with unevenly void masks."""
    records = {}
    for processes, batch_size, accumulation in ((1, 8, 1), (2, 2, 2)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch(SCRIPT, folder, loss, batch_size, accumulation, processes=processes)
        records[processes] = json.loads((folder / "record.json").read_text())
        assert records[processes].pop("world_size") == processes
    for architecture, values in records[1].items():
        assert records[2][architecture] == pytest.approx(values, rel=1e-4), architecture
