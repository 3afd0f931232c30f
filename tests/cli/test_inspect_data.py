"""`pals-hf inspect` on a sound and on a flawed data set."""

import json
import shutil

import numpy as np
import pytest
from conftest import RAW_VOID, write_pair
from launching import call
from PIL import Image

from pals_hf.cli import inspect_data


def inspect(folder, output, *more):
    return call(inspect_data.main, "--dataset_dir", folder, "--output_dir", output, *more)


@pytest.fixture
def flawed(folder):
    """Break the data set: duplicate, leaked, constant and empty images, and an unknown mask value."""
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        files = {
            name: folder / split / kind / f"{name}.{suffix}"
            for name, split in (("street 1", "train"), ("street 2", "train"), ("alley-0", "val"))
        }
        shutil.copy(files["street 1"], files["street 2"])
        shutil.copy(folder / "train" / kind / f"street 3.{suffix}", files["alley-0"])
    Image.new("RGB", (48, 32), (90, 90, 90)).save(folder / "train" / "images" / "street 4.jpg")
    (folder / "train" / "images" / "street 6.jpg").write_bytes(b"")
    mask = np.array(Image.open(folder / "train" / "masks" / "street 7.png"))
    mask[20, 20] = 99
    Image.fromarray(mask).save(folder / "train" / "masks" / "street 7.png")
    return folder


def test_a_flawed_data_set(flawed, tmp_path):
    output = tmp_path / "report"
    result = inspect(flawed, output, "--void_labels", RAW_VOID, "--fractions", "0.2", "1.0")
    assert result.returncode == 1, result.stderr
    report = json.loads((output / "inspection.json").read_text())
    assert report["images"] == {"train": 5, "validation": 5, "test": 0}
    assert report["refused"].keys() == {"train/street 3", "train/street 6", "train/street 7"}
    assert "the file is empty" in report["refused"]["train/street 6"]
    assert "value 99" in report["refused"]["train/street 7"]
    assert "also validation image 'alley-0'" in report["refused"]["train/street 3"]
    assert report["near_constant"] == {"train": ["street 4"], "validation": []}
    assert report["duplicates"]["train"] == [["street 1", "street 2"]]
    assert report["sizes"]["validation"] == {"48x32": 3, "48x40": 2}
    whole = report["fractions"][1]
    assert (whole["images"], whole["missed"]) == (5, [])
    assert sum(entry["share"] for name, entry in whole["classes"].items() if name != "void") == pytest.approx(1)
    for line in ("street 4 is nearly constant", "street 1, street 2 are identical images", "value 99"):
        assert line in result.stdout
    assert Image.open(output / "inspection.png").width > 200


def test_dark_images_are_no_flaw(folder, tmp_path):
    """A few bright spots on black, as microscopes see them."""
    for path in (folder / "train" / "images").iterdir():
        dark = np.zeros((32, 48, 3), dtype=np.uint8)
        dark[10:12, 20:22] = 20
        dark[0, 0] = int(path.stem[-1])  # no two are the same
        Image.fromarray(dark).save(path, format="png")
    result = inspect(folder, tmp_path / "report", "--void_labels", RAW_VOID)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "report" / "inspection.json").read_text())["near_constant"]["train"] == []


def test_masks_that_are_all_wrong(folder, tmp_path):
    for path in (folder / "train" / "masks").iterdir():
        Image.open(path).convert("RGB").save(path)
    result = inspect(folder, tmp_path / "report", "--void_labels", RAW_VOID)
    assert result.returncode == 2
    assert "8 samples failed a check" in result.stderr
    assert "mode RGB" in result.stderr


def test_a_sound_one_and_its_fractions(tmp_path):
    """One class is in one image only. A random tenth misses it, and a balanced one does not."""
    root = tmp_path / "set"
    for index in range(20):
        write_pair(root / "train", f"{index}", seed=index)
        path = root / "train" / "masks" / f"{index}.png"
        mask = np.array(Image.open(path))
        Image.fromarray(np.where((mask == 3) & (index != 5), 1, mask).astype(np.uint8)).save(path)
    for index in range(2):
        write_pair(root / "val", f"{index}", seed=100 + index)
    (root / "id2label.json").write_text(json.dumps(list("abcd")))
    options = ["--void_labels", RAW_VOID, "--fractions", "0.1"]
    random, balanced = (
        inspect(root, tmp_path / method, *options, "--fraction_method", method) for method in ("random", "balanced")
    )
    assert random.returncode == balanced.returncode == 0, random.stderr
    assert "The 10% fraction has no image of: d" in random.stdout
    assert "has no image of" not in balanced.stdout


def test_a_missing_folder(tmp_path):
    result = inspect(tmp_path / "nowhere", tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"error: {tmp_path / 'nowhere'} is not a folder"
