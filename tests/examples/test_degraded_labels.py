import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import NUM_LABELS, RAW_VOID

from pals_hf import load_segmentation_dataset
from pals_hf.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import degraded_labels
from degraded_labels import BLOCK, BRUSH, label_by_clicks, mislabel


@pytest.fixture
def train(folder):
    return load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID]).train


def masks(dataset):
    return [np.array(example["labels"]) for example in dataset]


def test_a_click_paints_around_itself_what_has_its_class(train):
    for dense, sparse in zip(masks(train), masks(label_by_clicks(train, 1)), strict=True):
        rows, columns = np.nonzero(sparse != 255)
        assert 1 <= len(rows) <= BRUSH**2
        assert np.ptp(rows) < BRUSH
        assert np.ptp(columns) < BRUSH
        assert len(np.unique(sparse[rows, columns])) == 1
        assert np.array_equal(sparse[rows, columns], dense[rows, columns])
        label, centre = sparse[rows[0], columns[0]], (rows, columns)
        box = tuple(slice(axis.min(), axis.max() + 1) for axis in centre)
        assert np.array_equal(sparse[box] == label, dense[box] == label)


def test_void_is_never_labelled_and_many_clicks_label_all(train):
    everything = label_by_clicks(train, 10_000)
    assert all(np.array_equal(a, b) for a, b in zip(masks(train), masks(everything), strict=True))
    assert everything["class_pixels"] == train["class_pixels"]


def test_counts_follow(train):
    sparse = label_by_clicks(train, 4)
    for mask, counts in zip(masks(sparse), sparse["class_pixels"], strict=True):
        assert counts == [*(int((mask == label).sum()) for label in range(NUM_LABELS)), int((mask == 255).sum())]
        assert sum(counts[:-1]) <= 4 * BRUSH**2


@pytest.mark.parametrize(("worse", "how_much"), [(label_by_clicks, 3), (mislabel, 0.5)])
def test_depends_on_id_and_seed_only(worse, how_much, train):
    first, part, other = (
        worse(train, how_much),
        worse(train.select([5, 2]), how_much),
        worse(train, how_much, 1),
    )
    assert np.array_equal(masks(first)[5], masks(part)[0])
    assert np.array_equal(masks(first)[2], masks(part)[1])
    assert not all(np.array_equal(a, b) for a, b in zip(masks(first), masks(other), strict=True))


def test_hashes_follow(train):
    sparse = label_by_clicks(train, 4)
    hashes = [hashlib.sha256(f"{mask.shape} ".encode() + mask.tobytes()).hexdigest() for mask in masks(sparse)]
    assert sparse["labels_sha256"] == hashes
    assert sparse["image_sha256"] == train["image_sha256"]
    everything = label_by_clicks(train, 10_000)
    assert everything["labels_sha256"] == train["labels_sha256"]


@pytest.mark.parametrize("lost", [[], ["image_sha256", "labels_sha256"]])
def test_the_cache_tells_masks_apart(lost, train):
    """Made of the same images, one after the other; so are the same images in another order."""
    train = train.remove_columns(lost)
    few, many = (mislabel(label_by_clicks(train, clicks), 1.0) for clicks in (1, 50))
    assert all((a != 255).sum() < (b != 255).sum() for a, b in zip(masks(few), masks(many), strict=True))
    for order in ([5, 2], [2, 5]):
        assert label_by_clicks(train.select(order), 1)["id"] == [train["id"][index] for index in order]


def test_no_clicks(train):
    with pytest.raises(InputError, match="label_clicks must be at least 1, got 0"):
        label_by_clicks(train, 0)


def test_a_block_is_taken_for_another_class_of_its_mask(train):
    """With a share of 1 everywhere: what was most frequent in a block is one other class now, the rest stays."""
    for good, wrong in zip(masks(train), masks(mislabel(train, 1.0)), strict=True):
        for top in range(0, good.shape[0], BLOCK):
            for left in range(0, good.shape[1], BLOCK):
                before, after = (mask[top : top + BLOCK, left : left + BLOCK] for mask in (good, wrong))
                labels, counts = np.unique(before[before != 255], return_counts=True)
                most = labels[counts.argmax()]
                assert np.array_equal(before[before != most], after[before != most])
                (taken_for,) = np.unique(after[before == most])
                assert taken_for != most
                assert taken_for in good


def test_a_share_of_the_blocks(train):
    changed = [np.mean(good != wrong) for good, wrong in zip(masks(train), masks(mislabel(train, 0.3)), strict=True)]
    assert 0 < np.mean(changed) < 0.6
    counted = mislabel(train, 0.3)["class_pixels"][0]
    assert counted == [int((masks(mislabel(train, 0.3))[0] == label).sum()) for label in (*range(NUM_LABELS), 255)]


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_no_share(share, train):
    with pytest.raises(InputError, match=f"label_noise must be above 0 and at most 1, got {share}"):
        mislabel(train, share)


def test_masks_of_one_class_stay(folder):
    generator = np.random.default_rng(0)
    plain = np.full((40, 40), 2, dtype=np.uint8)
    assert np.array_equal(degraded_labels._mislabelled(plain, generator, 1.0), plain)
