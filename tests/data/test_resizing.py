import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pals_hf.data import TrainTransform, TransformedDataset, load_segmentation_dataset, resizing
from pals_hf.errors import InputError
from pals_hf.models import build_image_processor

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from degraded_labels import label_by_clicks


def test_training_sees_the_same_pixels(folder, monkeypatch):
    data = load_segmentation_dataset(dataset_dir=folder, void_labels=[11]).train
    processor = build_image_processor(None, (20, 30))
    cached = resizing.cache_resized(data, processor)
    assert cached[0]["image"].size == (30, 20)
    transform = TrainTransform(processor, (16, 16))
    for plain, fast in zip(TransformedDataset(data, transform), TransformedDataset(cached, transform), strict=True):
        assert plain.keys() == fast.keys()
        assert all(torch.equal(plain[name], fast[name]) for name in ("pixel_values", "labels"))
    monkeypatch.setattr(resizing, "_resize_pair", lambda *_, **__: pytest.fail("resized again"))
    assert resizing.cache_resized(data, processor)["id"] == data["id"]
    with pytest.raises(pytest.fail.Exception):
        resizing.cache_resized(data, build_image_processor(None, (24, 30)))


@pytest.mark.parametrize("lost", [[], ["id", "image_sha256", "labels_sha256"]])
def test_the_cache_tells_masks_apart(lost, folder):
    data = load_segmentation_dataset(dataset_dir=folder, void_labels=[11]).train.select(range(3))
    sparse, processor = label_by_clicks(data, 2).remove_columns(lost), build_image_processor(None, (32, 48))
    dense = resizing.cache_resized(data.remove_columns(lost), processor)
    for labels, resized in ((data["labels"], dense), (sparse["labels"], resizing.cache_resized(sparse, processor))):
        assert [np.array(mask).tolist() for mask in resized["labels"]] == [np.array(mask).tolist() for mask in labels]


def test_needs_a_size(folder):
    data = load_segmentation_dataset(dataset_dir=folder, void_labels=[11]).train
    with pytest.raises(InputError, match="Set image_size"):
        resizing.cache_resized(data, build_image_processor(None))
