import json
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from pals_hf import load_segmentation_dataset, train_fraction
from pals_hf.data import FractionManifest, draw_balanced_ids, draw_ids
from pals_hf.errors import InputError

MANIFEST = (
    '{"dataset": "", "fingerprint": "", "method": "random", "fraction": 1, "seed": 0, "available": 1, "ids": %s, '
    '"class_pixels": {}}'
)
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
    assert (written["fraction"], written["seed"], written["available"], len(written["ids"])) == (37 / 367, 2, 367, 37)
    loaded = FractionManifest.load(path)
    assert loaded == manifest
    assert loaded.select(dataset)["id"] == train_fraction(dataset, 0.1, seed=2)["id"]


def test_manifest_of_another_data_set(dataset):
    manifest = FractionManifest("", "", "random", 0.1, 0, 2, ["image-001", "elsewhere"], {})
    with pytest.raises(InputError, match=r"1 of 2 images of the manifest are not in the data set, e\.g\. 'elsewhere'"):
        manifest.select(dataset)


@pytest.mark.parametrize(
    "content",
    [None, "not json", "[1, 2]", '{"fraction": 1}', *(MANIFEST % ids for ids in ("[]", "5", "[[1]]", "[" * 50_000))],
)
def test_unreadable_manifest(tmp_path, content):
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json is not a readable fraction manifest"):
        FractionManifest.load(path)


def test_a_changed_manifest_is_refused(dataset, tmp_path):
    path = tmp_path / "manifest.json"
    FractionManifest.draw(dataset, 0.1).save(path)
    path.write_text(path.read_text().replace(IDS[315], IDS[0]))
    with pytest.raises(InputError, match="was changed after it was written"):
        FractionManifest.load(path)


@pytest.mark.parametrize(("count", "method"), [(0, "random"), (368, "random"), (-1, "balanced")])
def test_refuses_a_count_out_of_range(dataset, count, method):
    dataset = dataset.add_column("class_pixels", [[1, 1, 0]] * len(IDS))
    with pytest.raises(
        InputError, match=rf"train_count must be between 1 and 367 \(the number of images\), got {count}"
    ):
        FractionManifest.draw(dataset, count=count, method=method)


def test_by_count(dataset):
    assert FractionManifest.draw(dataset, count=37).ids == draw_ids(IDS, 0.1)
    with pytest.raises(InputError, match="exactly one of fraction and count"):
        FractionManifest.draw(dataset, 0.1, count=37)
    with pytest.raises(InputError, match="exactly one of fraction and count"):
        FractionManifest.draw(dataset)


def test_methods(dataset):
    with pytest.raises(InputError, match="fraction_method must be one of random, balanced, got"):
        FractionManifest.draw(dataset, 0.1, method="best")
    with pytest.raises(InputError, match="needs the column class_pixels"):
        FractionManifest.draw(dataset, 0.1, method="balanced")


class TestBalanced:
    def test_every_class_as_early_as_possible(self):
        """Class 2 is in one image, class 1 in three, class 0 in all."""
        ids = [f"i{n}" for n in range(20)]
        pixels = [[100, 5 * (n in (3, 7, 11)), n == 13] for n in range(20)]
        for seed in range(5):
            drawn = draw_balanced_ids(ids, pixels, count=6, seed=seed)
            assert drawn[0] == "i13"
            assert drawn[1] in {"i3", "i7", "i11"}
            assert {"i3", "i7", "i11"} <= set(drawn)

    def test_an_image_with_several_missing_classes_is_preferred(self):
        pixels = [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0]]
        assert draw_balanced_ids("abcd", pixels, count=1) == ["c"]

    def test_manifest(self, folder):
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[11])
        record = {"name": data.name, "id2label": data.id2label}
        manifest = FractionManifest.draw(data.train, count=3, method="balanced", **record)
        assert manifest.class_pixels.keys() == {"ground", "wall", "sky", "car", "void"}
        labels = np.stack(manifest.select(data.train)["labels"])
        assert list(manifest.class_pixels.values()) == [int((labels == v).sum()) for v in (0, 1, 2, 3, 255)]
        assert (manifest.dataset, manifest.method, manifest.available) == ("data set", "balanced", 8)

    @given(
        st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=30),
        st.integers(0, 5),
        st.randoms(),
    )
    def test_properties(self, pixels, seed, random):
        ids = [f"image {n}" for n in range(len(pixels))]
        whole = draw_balanced_ids(ids, pixels, 1.0, seed)
        assert sorted(whole) == sorted(ids)
        for count in range(1, len(ids) + 1):
            assert draw_balanced_ids(ids, pixels, count=count, seed=seed) == whole[:count]  # nested
        shuffled = list(zip(ids, pixels, strict=True))
        random.shuffle(shuffled)
        assert draw_balanced_ids(*zip(*shuffled, strict=True), 1.0, seed) == whole  # of no order
        occurring = [label for label in range(4) if any(row[label] for row in pixels)]
        covered = whole[: len(occurring)]  # at most one image a class is needed
        assert all(any(pixels[ids.index(id)][label] for id in covered) for label in occurring)


@given(
    st.sets(st.text(min_size=1), min_size=1, max_size=40), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.integers()
)
def test_random_draws_are_nested_and_of_the_asked_size(ids, first, second, seed):
    smaller, larger = (draw_ids(ids, share, seed) for share in sorted((first, second)))
    assert larger[: len(smaller)] == smaller
    assert len(larger) == max(1, int(max(first, second) * len(ids) + 0.5))


class TestPublishedLists:
    """Lines as CPS, U2PL and UniMatch publish them."""

    CITY = "aachen/aachen_000000_000019"

    @pytest.mark.parametrize(
        ("line", "meant"),
        [
            ("2007_000032", "2007_000032"),
            ("JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png", "2007_000032"),
            ("JPEGImages/2007_000032.jpg\tSegmentationClassAug/2007_000032.png", "2007_000032"),
            ("/JPEGImages/2007_000032.jpg", "2007_000032"),
            (f"leftImg8bit/train/{CITY}_leftImg8bit.png gtFine/train/{CITY}_gtFine_labelTrainIds.png", CITY),
            (f"train/{CITY}_leftImg8bit.png", CITY),
            (f"{CITY}_leftImg8bit.png", CITY),
            (CITY, CITY),
            ("aachen_000000_000019", CITY),
            ("my street 1", "my street 1"),
            ("images/my street 1.jpg", "my street 1"),
        ],
    )
    def test_lines(self, tmp_path, line, meant):
        known = Dataset.from_dict({"id": ["2007_000032", "2007_000033", self.CITY, "my street 1", "night/7"]})
        path = tmp_path / "labeled.txt"
        path.write_text(f"{line}\n\nnight/7\n")
        manifest = FractionManifest.load(path, known, name="some set")
        assert manifest.ids == [meant, "night/7"]
        assert (manifest.method, manifest.seed, manifest.fraction, manifest.dataset) == ("list", None, 0.4, "some set")

    def test_unknown_and_ambiguous_images(self, tmp_path):
        known = Dataset.from_dict({"id": ["day/7", "night/7"]})
        path = tmp_path / "labeled.txt"
        for line, message in (
            ("dusk", r"line 1: 'dusk' is not in the data set"),
            ("7", "matches both 'day/7' and 'night/7'"),
            ("", "lists no images"),
        ):
            path.write_text(line)
            with pytest.raises(InputError, match=message):
                FractionManifest.load(path, known)
