import json
import subprocess
import sys

import pytest
from datasets import Dataset

from pals_hf import train_fraction
from pals_hf.data import FractionManifest, draw_ids
from pals_hf.errors import InputError

MANIFEST = '{"fraction": 1, "seed": 0, "available": 1, "ids": %s}'
IDS = [f"image-{index:03d}" for index in range(367)]


@pytest.fixture
def dataset():
    return Dataset.from_dict({"id": IDS, "value": list(range(len(IDS)))})


def test_fractions_are_nested():
    tenth, third, half, all_ids = (set(draw_ids(IDS, share)) for share in (0.1, 0.3, 0.5, 1.0))
    assert tenth < third < half < all_ids == set(IDS)


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 37), (0.3, 110), (0.5, 184), (1.0, 367), (0.0001, 1)])
def test_count_is_rounded_and_at_least_one(fraction, count):
    assert len(draw_ids(IDS, fraction)) == count


def test_the_draw_is_pinned():
    """These ids are in published manifests: if this fails, every reported split has changed."""
    assert draw_ids(IDS, 0.01) == ["image-315", "image-082", "image-260", "image-015"]
    assert draw_ids(IDS, 0.005, seed=1) == ["image-147", "image-269"]


def test_seeds_are_independent_draws():
    first, second = set(draw_ids(IDS, 0.3, seed=0)), set(draw_ids(IDS, 0.3, seed=1))
    assert first != second
    assert 15 < len(first & second) < 55  # 33 expected of 110 by chance


def test_order_of_the_ids_does_not_matter():
    assert draw_ids(reversed(IDS), 0.3) == draw_ids(IDS, 0.3)


def test_another_process_draws_the_same():
    script = "from pals_hf.data import draw_ids; print(draw_ids([f'image-{i:03d}' for i in range(367)], 0.3))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(draw_ids(IDS, 0.3))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_refuses_a_fraction_out_of_range(fraction):
    with pytest.raises(InputError, match="train_fraction must be above 0 and at most 1"):
        draw_ids(IDS, fraction)


def test_refuses_no_images_and_duplicates():
    with pytest.raises(InputError, match="no images"):
        draw_ids([], 0.5)
    with pytest.raises(InputError, match="'b' occurs more than once"):
        draw_ids(["a", "b", "c", "b"], 0.5)


def test_train_fraction_selects(dataset):
    subset = train_fraction(dataset, 0.1, seed=3)
    assert sorted(subset["id"]) == sorted(draw_ids(IDS, 0.1, seed=3))
    assert subset["value"] == sorted(subset["value"])  # in the order of the data set


def test_manifest_round_trip(dataset, tmp_path):
    manifest = FractionManifest.draw(dataset, 0.1, seed=2)
    path = tmp_path / "train_fraction.json"
    manifest.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    written = json.loads(path.read_text())
    assert (written["fraction"], written["seed"], written["available"], len(written["ids"])) == (0.1, 2, 367, 37)
    loaded = FractionManifest.load(path)
    assert loaded == manifest
    assert loaded.select(dataset)["id"] == train_fraction(dataset, 0.1, seed=2)["id"]


def test_manifest_of_another_data_set(dataset):
    manifest = FractionManifest(0.1, 0, 2, ["image-001", "elsewhere"])
    with pytest.raises(InputError, match=r"1 of 2 images of the manifest are not in the data set, e\.g\. 'elsewhere'"):
        manifest.select(dataset)


@pytest.mark.parametrize(
    "content", [None, "not json", "[1, 2]", '{"fraction": 1}', *(MANIFEST % ids for ids in ("[]", "5"))]
)
def test_unreadable_manifest(tmp_path, content):
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json is not a readable fraction manifest"):
        FractionManifest.load(path)
