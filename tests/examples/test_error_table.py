"""The error lines that `docs/data.md` shows are those that the data raises."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pals_hf import load_segmentation_dataset
from pals_hf.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
TABLE = PAGE.read_text(encoding="utf-8").split("\n| problem | line |\n|---|---|\n")[1].split("\n\n")[0]
LINES = dict(row.strip("| ").split(" | ") for row in TABLE.splitlines())
IMAGE, MASK = Path("data/train/images/s1.jpg"), Path("data/train/masks/s1.png")


def fill(path, value, size=(32, 48), dtype=np.uint8):
    Image.fromarray(np.full(size, value, dtype=dtype)).save(path, format="png")


def fill_all(value):
    for path in MASK.parent.iterdir():
        fill(path, value)


def truncate(path, count):
    path.write_bytes(path.read_bytes()[:count])


def save_as_jpeg(path):
    Image.open(MASK).save(path, format="jpeg")


def as_other_name():
    save_as_jpeg(MASK.with_suffix(".jpg"))
    MASK.unlink()


def copy_to_validation():
    Path("data/val/images/v1.jpg").write_bytes(IMAGE.read_bytes())


def save_as_pages(path):
    picture = Image.open(path)
    picture.load()
    picture.save(path, format="tiff", save_all=True, append_images=[picture, picture])


def save_bands(count):
    tifffile = pytest.importorskip("tifffile")
    values = np.zeros((32, 48, count), dtype=np.uint8)
    tifffile.imwrite(IMAGE, values, photometric="minisblack", planarconfig="contig")


def save_nan():
    values = np.zeros((32, 48), dtype=np.float32)
    values[7, 5] = np.nan
    Image.fromarray(values).save(IMAGE, format="tiff")


def erase_a_pixel():
    """In masks that hold colours."""
    Path("data/id2label.json").rename("data/old.json")
    colors = {name: [index, 0, 0] for index, name in enumerate("abcd")}
    Path("data/palette.json").write_text(json.dumps(colors))
    for path in Path("data").glob("*/masks/*"):
        mask = Image.new("RGB", (48, 32))
        mask.paste((1, 0, 0), (0, 0, 9, 9))
        mask.putalpha(255)
        mask.save(path)
    mask = Image.open(MASK)
    mask.putpixel((5, 7), (1, 0, 0, 0))
    mask.save(MASK)


BREAK = {
    "truncated JPEG": lambda: truncate(IMAGE, 200),
    "zero-byte file": lambda: truncate(IMAGE, 0),
    "not an image": lambda: IMAGE.write_text("<html>404</html>"),
    "16-bit image among others": lambda: fill(IMAGE, 0, dtype=np.uint16),
    "band that the network lacks": lambda: save_bands(5),
    "pixel that is no number": save_nan,
    "mask as JPEG": as_other_name,
    "JPEG named PNG": lambda: save_as_jpeg(MASK),
    "colour mask": lambda: fill(MASK, 0, (32, 48, 3)),
    "mask larger than image": lambda: fill(MASK, 0, (48, 64)),
    "unknown value": lambda: fill(MASK, 37),
    "image without mask": MASK.unlink,
    "mask without image": IMAGE.unlink,
    "two images of one name": lambda: Image.open(IMAGE).save(IMAGE.with_suffix(".png")),
    "transparent pixel": erase_a_pixel,
    "several pages": lambda: save_as_pages(MASK),
    "other format": IMAGE.with_name("s9.heic").touch,
    "no labels in val": lambda: fill(Path("data/val/masks/v1.png"), 255),
    "empty split": lambda: [path.unlink() for path in IMAGE.parent.iterdir()],
    "one class only": lambda: fill_all(2),
    "training image in val": copy_to_validation,
    "no class names": Path("data/id2label.json").unlink,
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Four training images and one validation image in `data`."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for split, names in (("train", ("s1", "s2", "s3", "s4")), ("val", ("v1",))):
        for name in names:
            for kind, suffix, shape, high in (("images", "jpg", (32, 48, 3), 256), ("masks", "png", (32, 48), 4)):
                path = Path("data", split, kind, f"{name}.{suffix}")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, high, shape, dtype=np.uint8)).save(path)
    Path("data/id2label.json").write_text(json.dumps(["ground", "wall", "sky", "car"]))
    return "data"


@pytest.mark.parametrize("problem", LINES)
def test_line(problem, data):
    load_segmentation_dataset(dataset_dir=data)
    BREAK[problem]()
    with pytest.raises(InputError) as error:
        load_segmentation_dataset(dataset_dir=data)
    assert re.sub(r" \(Set skip_bad_samples to skip this sample.*\)$", "", str(error.value)) == LINES[problem]


def test_every_problem_is_in_the_table():
    assert BREAK.keys() == LINES.keys()
