import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from pals_hf.data import EvalTransform, TrainTransform, TransformedDataset, collate
from pals_hf.functional import PADDING_INDEX
from pals_hf.models import build_image_processor

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture
def processor():
    return build_image_processor(None)


def pair(size=(40, 60)):
    """An image whose red channel is 50 times its mask, so that one must follow the other."""
    mask = np.zeros(size, dtype=np.uint8)
    mask[:, size[1] // 3 :] = 1
    mask[size[0] // 2 :] += 2
    image = np.zeros((*size, 3), dtype=np.uint8)
    image[..., 0] = mask * 50
    return Image.fromarray(image), Image.fromarray(mask)


def red(pixel_values):
    return (pixel_values[0] * STD[0] + MEAN[0]) * 255


def test_image_and_mask_move_together(processor):
    transform = TrainTransform(processor, (48, 48), color_jitter=0.0)
    for _ in range(20):
        example = transform(*pair())
        inside = example["labels"] != 255
        expected = example["labels"].float() * 50
        agree = ((red(example["pixel_values"]) - expected).abs() < 2)[inside]
        assert agree.float().mean() > 0.8  # all but the blurred edges


def test_shapes_and_dtypes(processor):
    example = TrainTransform(processor, (48, 64))(*pair())
    assert example["pixel_values"].shape == (3, 48, 64)
    assert example["pixel_values"].dtype == torch.float32
    assert example["labels"].shape == (48, 64)
    assert example["labels"].dtype == torch.int64
    assert set(example["labels"].unique().tolist()) <= {0, 1, 2, 3, 255}


def test_padding_is_void_and_the_mean_colour(processor):
    example = TrainTransform(processor, (100, 100), scale_range=(0.5, 0.5), color_jitter=0.0)(*pair())
    padding = example["labels"] == 255
    assert padding.sum() >= 100 * 100 - 20 * 30
    assert example["pixel_values"][:, padding].abs().max() < 0.02


def test_padding_can_be_told_from_void(processor):
    transform = TrainTransform(processor, (64, 64), (1.0, 1.0), 0.0, padding_index=PADDING_INDEX)
    mask = np.full((32, 48), 255, dtype=np.uint8)
    labels = transform(Image.new("RGB", (48, 32)), Image.fromarray(mask))["labels"]
    assert (labels == 255).sum() == 32 * 48
    assert (labels == PADDING_INDEX).sum() == 64 * 64 - 32 * 48


def test_colour_jitter_changes_the_image_only(processor):
    picture = Image.effect_noise((48, 32), 80).convert("RGB")
    mask = Image.fromarray(np.zeros((32, 48), dtype=np.uint8))
    torch.manual_seed(1)
    jittered = TrainTransform(processor, (24, 24), color_jitter=0.9)(picture, mask)
    torch.manual_seed(1)
    plain = TrainTransform(processor, (24, 24), color_jitter=0.0)(picture, mask)
    assert not torch.equal(jittered["pixel_values"], plain["pixel_values"])
    assert torch.equal(jittered["labels"], plain["labels"])
    assert plain.keys() == {"pixel_values", "labels"}


def test_resizes_to_the_image_size_first():
    processor = build_image_processor(None, (20, 30))
    example = TrainTransform(processor, (20, 30), scale_range=(1.0, 1.0), color_jitter=0.0)(*pair())
    assert not (example["labels"] == 255).any()
    evaluated = EvalTransform(processor)(*pair())
    candidates = (evaluated["pixel_values"], evaluated["pixel_values"].flip(-1))
    # The same resize as for evaluation, up to the rounding of 8-bit pixels and a flip.
    assert min((example["pixel_values"] - candidate).abs().max() for candidate in candidates) < 0.02


def test_evaluation_keeps_the_mask():
    image, mask = pair()
    example = EvalTransform(build_image_processor(None, (20, 30)))(image, mask)
    assert example["pixel_values"].shape == (3, 20, 30)
    assert np.array_equal(example["labels"], mask)


class TestTransformedDataset:
    @pytest.fixture
    def dataset(self, processor):
        images, masks = zip(*(pair() for _ in range(6)), strict=True)
        columns = Dataset.from_dict({"image": list(images), "labels": list(masks)})
        return TransformedDataset(columns, TrainTransform(processor, (32, 32)), seed=7)

    def test_randomness_is_a_function_of_seed_epoch_and_index(self, dataset):
        first = dataset[2]["pixel_values"]
        torch.manual_seed(123)
        _ = dataset[0]
        assert torch.equal(dataset[2]["pixel_values"], first)
        assert not torch.equal(dataset[3]["pixel_values"], first)  # the same picture, another index
        dataset.set_epoch(1)
        assert not torch.equal(dataset[2]["pixel_values"], first)
        dataset.set_epoch(0)
        assert torch.equal(dataset[2]["pixel_values"], first)
        dataset.seed = 8
        assert not torch.equal(dataset[2]["pixel_values"], first)

    def test_leaves_the_global_generator_alone(self, dataset):
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        _ = dataset[0]
        assert torch.equal(torch.rand(3), expected)

    def test_workers_see_the_same_and_follow_the_epoch(self, dataset):
        loader = DataLoader(dataset, batch_size=3, num_workers=2, persistent_workers=True, collate_fn=collate)
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            batches = torch.cat([batch["pixel_values"] for batch in loader])
            assert torch.equal(batches, torch.stack([dataset[index]["pixel_values"] for index in range(6)]))


def test_collate_never_pads():
    same = [{"pixel_values": torch.rand(3, 4, 5), "labels": torch.zeros(8, 9)} for _ in range(2)]
    batch = collate(same)
    assert batch["pixel_values"].shape == (2, 3, 4, 5)
    assert batch["labels"].shape == (2, 8, 9)
    same[1]["labels"] = torch.zeros(7, 9)
    batch = collate(same)
    assert batch["pixel_values"].shape == (2, 3, 4, 5)
    assert [tuple(labels.shape) for labels in batch["labels"]] == [(8, 9), (7, 9)]
