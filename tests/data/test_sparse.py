import numpy as np
import pytest
from conftest import NUM_LABELS, RAW_VOID

from pals_hf import load_segmentation_dataset
from pals_hf.data.sparse import BRUSH, label_by_clicks
from pals_hf.errors import InputError


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


def test_depends_on_id_and_seed_only(train):
    first, part, other = (
        label_by_clicks(train, 3),
        label_by_clicks(train.select([5, 2]), 3),
        label_by_clicks(train, 3, 1),
    )
    assert np.array_equal(masks(first)[5], masks(part)[0])
    assert np.array_equal(masks(first)[2], masks(part)[1])
    assert not all(np.array_equal(a, b) for a, b in zip(masks(first), masks(other), strict=True))


def test_no_clicks(train):
    with pytest.raises(InputError, match="label_clicks must be at least 1, got 0"):
        label_by_clicks(train, 0)
