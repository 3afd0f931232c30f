import numpy as np
import pytest
import torch

from pals_hf.data import TrainTransform, TransformedDataset, load_segmentation_dataset
from pals_hf.data.balance import WEIGHTINGS, class_weights, rare_classes
from pals_hf.errors import InputError
from pals_hf.models import build_image_processor

PIXELS = [[600, 100, 0, 0], [200, 0, 100, 0]]


class TestClassWeights:
    @pytest.mark.parametrize("method", WEIGHTINGS)
    def test_mean_over_pixels_is_one(self, method):
        totals, weights = np.sum(PIXELS, axis=0), np.array(class_weights(PIXELS, method))
        assert (totals * weights).sum() == pytest.approx(totals.sum())
        assert weights[3] == 1  # does not occur

    def test_inverse(self):
        weights = class_weights(PIXELS, "inverse")
        assert weights[:3] == pytest.approx([1000 / 3 / 800, 1000 / 3 / 100, 1000 / 3 / 100])

    def test_median_frequency(self):
        """Shares among the pixels of the images that show a class: 0.8, 1/7 and 1/3."""
        weights = class_weights(PIXELS, "median_frequency")
        assert weights[1] / weights[0] == pytest.approx(0.8 * 7)
        assert weights[2] / weights[0] == pytest.approx(0.8 * 3)

    def test_effective_number(self):
        weights = class_weights(PIXELS, "effective_number", effective_beta=0.99)
        effective = [(1 - 0.99**n) / 0.01 for n in (800, 100, 100)]
        assert weights[1] / weights[0] == pytest.approx(effective[0] / effective[1])

    def test_refuses(self):
        with pytest.raises(InputError, match="class_weighting must be one of none, inverse"):
            class_weights(PIXELS, "best")
        with pytest.raises(InputError, match="need labelled pixels"):
            class_weights([[0, 0]], "inverse")


def test_rare_classes():
    assert rare_classes([[95, 0, 5], [90, 9, 1]]) == [1, 2]
    assert rare_classes([[50, 50]]) == []


class TestRareClasses:
    """Crops of one image, wide with its rare class at the right edge."""

    @pytest.fixture
    def dataset(self, folder):
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[11]).train
        mask = np.zeros((32, 48), dtype=np.uint8)
        mask[10:12, 46:] = 3
        return data, mask

    def transform(self, **options):
        return TrainTransform(
            build_image_processor(None), (16, 16), scale_range=(1.0, 1.0), rare_classes=[3], **options
        )

    def shares(self, transform, image, mask, draws=60):
        from PIL import Image

        labels = [transform(image, Image.fromarray(mask))["labels"] for _ in range(draws)]
        return np.mean([(crop == 3).any().item() for crop in labels])

    def test_crops_are_laid_around_a_rare_class(self, dataset):
        data, mask = dataset
        image = data[0]["image"]
        assert self.shares(self.transform(), image, mask) < 0.3
        assert self.shares(self.transform(rare_crop=1.0), image, mask) == 1.0
        assert 0.3 < self.shares(self.transform(rare_crop=0.5), image, mask) < 0.9

    def test_crops_with_padding_keep_their_size(self, dataset):
        data, mask = dataset
        transform = TrainTransform(build_image_processor(None), (40, 30), (0.5, 1.5), rare_classes=[3], rare_crop=1.0)
        for _ in range(20):
            from PIL import Image

            result = transform(data[0]["image"], Image.fromarray(mask))
            assert result["labels"].shape == (40, 30)
            assert (result["labels"] == 3).any()

    def test_an_image_without_rare_classes(self, dataset):
        data, mask = dataset
        assert self.shares(self.transform(rare_crop=1.0), data[0]["image"], np.zeros_like(mask), draws=3) == 0

    def test_copy_paste_brings_pixels_with_their_labels(self, folder):
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[11]).train
        whole = {"crop_size": (32, 48), "scale_range": (1.0, 1.0), "color_jitter": 0.0, "rare_classes": [3]}
        plain = TrainTransform(build_image_processor(None), **whole)
        pasting = TrainTransform(build_image_processor(None), **whole, copy_paste=1.0)
        image, donor = data[0], data[1]
        torch.manual_seed(3)
        (_, before), (_, other) = (plain._crop(row["image"], row["labels"]) for row in (image, donor))
        torch.manual_seed(3)
        after = pasting(image["image"], image["labels"], (donor["image"], donor["labels"]))
        pasted = other == 3
        assert 0 < pasted.sum() < pasted.numel()
        assert torch.equal(after["labels"], torch.where(pasted, other, before).long())
        # In these images the colour follows the class, so what was pasted is as bright as its label says.
        brightness = after["pixel_values"].mean(dim=0)
        assert brightness[pasted].mean() > brightness[(before == 0) & ~pasted].mean() + 1

    def test_donors_show_a_rare_class_and_are_drawn_by_seed(self, folder):
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[11]).train
        transform = TrainTransform(build_image_processor(None), (16, 16), rare_classes=[3], copy_paste=0.5)
        first, second = (TransformedDataset(data, transform, seed=4) for _ in range(2))
        assert all(torch.equal(first[i]["labels"], second[i]["labels"]) for i in range(8))
        without = TransformedDataset(data, TrainTransform(build_image_processor(None), (16, 16)), seed=4)
        assert any(not torch.equal(first[i]["labels"], without[i]["labels"]) for i in range(8))
