"""What the README shows runs as it stands."""

import re
import sys
from pathlib import Path

import data_sets
import pytest
from datasets import load_dataset

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import run_seg_pals  # noqa: E402

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    code = "\n".join(blocks).replace("max_steps=100", "max_steps=2")
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})
    assert re.search(r"^\['\w+'", capsys.readouterr().out, re.MULTILINE)  # the classes the pipeline found


def data_rows():
    """The flags of the table of data sources."""
    section = README.read_text(encoding="utf-8").split("\n## Data\n")[1].split("\n## ")[0]
    table = section[section.index("| data | flags |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    return [(name, flags.strip("`").split()) for name, flags, _ in rows[1:] if "OWNER" not in flags]


@pytest.mark.parametrize(("name", "flags"), data_rows(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_source_of_the_table(name, flags, folder, tmp_path, monkeypatch):
    """Each command on a fixture in the layout it is for; the Hub is tested with the Hub's own client."""
    monkeypatch.chdir(tmp_path)
    data_sets.cityscapes(tmp_path / "cityscapes")
    data_sets.voc2012(tmp_path, trainaug=True)
    data_sets.ade20k(tmp_path)
    data_sets.camvid(tmp_path / "CamVid")
    data_sets.color_folder(tmp_path / "my_colors")
    data_sets.parquet(tmp_path / "my_parquet")
    load_dataset(str(tmp_path / "my_parquet")).save_to_disk(tmp_path / "my_saved")
    (tmp_path / "my_saved" / "id2label.json").write_text('["ground", "wall", "sky"]')
    folder.rename(tmp_path / "my_data")
    if "my_data" in flags:
        flags = [*flags, "--void_labels", "11"]
    short = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--disable_tqdm", "True"]
    run_seg_pals.main([*flags, *short, "--output_dir", "run", "--crop_size", "32", "32", "--train_count", "2"])
    assert (tmp_path / "run" / "model.safetensors").exists()
