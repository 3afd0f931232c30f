import io
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_segformer
from PIL import Image
from torch import nn
from trained import NAMES, patches, save_checkpoint
from transformers import BertConfig, BertForMaskedLM, SegformerForImageClassification, pipeline
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils import logging

from pals_hf.errors import InputError
from pals_hf.functional import upsample
from pals_hf.inference import (
    _starts,
    entropy_map,
    image_logits,
    load_for_inference,
    predict,
    read_pictures,
    window_logits,
)
from pals_hf.models import build_image_processor


class Local(nn.Module):
    """A network without context: the logits at a position depend only on the pixels of this position."""

    def __init__(self, stride):
        super().__init__()
        self.pool, self.head = nn.AvgPool2d(stride), nn.Conv2d(3, 4, 1)

    def forward(self, pixel_values):
        return SemanticSegmenterOutput(logits=self.head(self.pool(pixel_values)))


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("window", [(32, 32), (16, 48), (32, 100)])
def test_windows_change_nothing_for_a_network_without_context(stride, window):
    pixels = torch.randn(2, 3, 64, 96)
    network = Local(stride).eval()
    assert torch.allclose(window_logits(network, pixels, window, 0.5), network(pixels).logits, atol=1e-6)


def test_one_window_is_the_whole_image():
    network, pixels = tiny_segformer().eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = network(pixel_values=pixels).logits
    assert torch.equal(window_logits(network, pixels, (64, 96)), expected)
    assert torch.equal(window_logits(network, pixels, (100, 200)), expected)


def test_off_the_grid_the_logits_have_the_size_of_the_image():
    network, pixels = tiny_segformer().eval(), torch.randn(1, 3, 66, 95)
    assert window_logits(network, pixels, (32, 32)).shape == (1, 4, 66, 95)


def test_windows_of_the_docstring():
    """Evenly spaced windows lie on the grid or not: both examples, at a sixteenth of their size."""
    network, pixels = Local(4).eval(), torch.randn(1, 3, 64, 128)
    assert _starts(2048, 1024, 1 / 3) == [0, 512, 1024]
    assert window_logits(network, pixels, (64, 64)).shape == (1, 4, 16, 32)
    assert _starts(2048, 768, 1 / 3) == [0, 427, 853, 1280]
    assert window_logits(network, pixels, (48, 48)).shape == (1, 4, 64, 128)


@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.9])
def test_windows_cover_everything_and_overlap_enough(overlap):
    for whole in range(1, 80):
        for part in range(1, whole + 1, 7):
            starts = _starts(whole, part, overlap)
            assert starts[0] == 0
            assert starts[-1] + part == whole
            steps = [b - a for a, b in pairwise(starts)]
            assert all(0 < step <= max(1, part * (1 - overlap)) + 1 for step in steps)
            assert all(step <= part for step in steps)


def mask_of_pipeline(folder, image):
    """What `pipeline` finds, as class indices."""
    indices = {name: index for index, name in NAMES.items()}
    found = pipeline("image-segmentation", model=str(folder), device="cpu")(image)
    mask = np.full((image.height, image.width), 255)
    for part in found:
        mask[np.asarray(part["mask"]) > 0] = indices[part["label"]]
    return torch.from_numpy(mask)


class TestPredict:
    def test_is_what_pipeline_predicts(self, any_model, tmp_path):
        model, processor = load_for_inference(str(save_checkpoint(tmp_path, any_model)), "cpu")
        for image in (patches(75, 50), patches(48, 32).convert("L"), patches(31, 90).quantize(7)):
            (found,) = predict(model, processor, [image])
            assert torch.equal(found.mask, mask_of_pipeline(tmp_path, image))
            assert len(found.mask.unique()) > 1

    def test_in_half_precision_too(self, tmp_path):
        save_checkpoint(tmp_path, tiny_segformer())
        model, _ = load_for_inference(str(tmp_path), "cpu")
        model.to(torch.bfloat16).save_pretrained(tmp_path)
        loaded, processor = load_for_inference(str(tmp_path), "cpu")
        assert loaded.dtype == torch.bfloat16
        image = patches(75, 50)
        assert torch.equal(predict(loaded, processor, [image])[0].mask, mask_of_pipeline(tmp_path, image))

    @pytest.mark.parametrize("sizes", [[(64, 48)] * 3, [(64, 48), (40, 90), (64, 48)]])
    def test_a_batch_is_its_images_one_by_one(self, sizes, tmp_path):
        model, _ = load_for_inference(str(save_checkpoint(tmp_path)), "cpu")
        processor = build_image_processor(None)  # keeps sizes as they are
        images = [patches(*size, seed) for seed, size in enumerate(sizes)]
        for image, found in zip(images, predict(model, processor, images), strict=True):
            (alone,) = predict(model, processor, [image])
            assert found.mask.shape == (image.height, image.width)
            assert (found.mask == alone.mask).float().mean() > 0.999
            assert torch.allclose(found.entropy, alone.entropy, atol=1e-4)

    def test_windows_lie_on_what_the_processor_makes(self, tmp_path):
        model, processor = load_for_inference(str(save_checkpoint(tmp_path, image_size=(64, 96))), "cpu")
        image = patches(200, 100)
        (found,) = predict(model, processor, [image], window=(32, 48), overlap=0.5)
        pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
        expected = upsample(window_logits(model, pixel_values, (32, 48), 0.5), (100, 200))
        assert torch.equal(found.mask, expected.argmax(dim=1)[0])
        assert not torch.equal(found.mask, predict(model, processor, [image])[0].mask)


class TestImageLogits:
    def test_a_flip_is_the_mean_of_both_views(self):
        network, pixels = tiny_segformer().eval(), torch.randn(2, 3, 32, 64)
        with torch.no_grad():
            straight = network(pixel_values=pixels).logits
            mirrored = network(pixel_values=pixels.flip(3)).logits.flip(3)
        found = image_logits(network, pixels, flip=True)
        assert not torch.allclose(straight, mirrored, atol=1e-7)
        assert torch.allclose(found, (straight + mirrored) / 2)
        assert torch.allclose(image_logits(network, pixels.flip(3), flip=True).flip(3), found, atol=1e-6)

    def test_flips_and_windows_together_change_nothing_without_context(self):
        network, pixels = Local(4).eval(), torch.randn(1, 3, 64, 96)
        found = image_logits(network, pixels, window=(32, 48), flip=True)
        assert torch.allclose(found, network(pixels).logits, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 12), (300, 517)])
def test_entropy_map(size):
    logits = 3 * torch.randn(2, 5, 8, 12)
    p = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(dim=1)
    assert torch.allclose(entropy_map(logits, size), -(p * p.log()).sum(dim=1), atol=1e-5)


class TestReadPictures:
    def test_turned_images_are_turned_upright(self, tmp_path):
        image = patches(60, 40)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise by a quarter
        image.save(tmp_path / "turned.png", exif=exif)
        (found,) = read_pictures(tmp_path / "turned.png")
        assert np.array_equal(np.asarray(found), np.rot90(np.asarray(image), -1))

    def test_all_frames_of_an_animation_but_one_page_of_a_document(self, tmp_path):
        frames = [Image.new("RGB", (20, 10), color) for color in ("red", "lime", "blue")]
        for name in ("a.gif", "a.png", "a.webp", "a.tif"):
            frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        for name in ("a.gif", "a.png", "a.webp"):
            found = [frame.getpixel((3, 3)) for frame in read_pictures(tmp_path / name)]
            assert found == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
        assert len(list(read_pictures(tmp_path / "a.tif"))) == 1

    @pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
    def test_any_mode_becomes_rgb(self, mode, tmp_path):
        patches(9, 9).convert(mode).save(tmp_path / "a.tif")
        (found,) = read_pictures(tmp_path / "a.tif")
        assert (found.mode, found.size) == ("RGB", (9, 9))

    def test_what_cannot_be_read(self, tmp_path):
        whole = io.BytesIO()
        patches(90, 90).save(whole, "jpeg")
        contents = {"empty.jpg": b"", "cut.jpg": whole.getvalue()[:2000], "text.png": b"no image"}
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        Image.fromarray(np.zeros((5, 5), dtype=np.uint16)).save(tmp_path / "deep.png")
        reasons = {
            "empty.jpg": "the file is empty",
            "cut.jpg": "image file is truncated",
            "text.png": "its format is not known",
            "deep.png": "images with more than 8 bits per channel",
            "none.png": "No such file",
        }
        for name, reason in reasons.items():
            with pytest.raises(InputError, match=f"{name} is not a readable image: .*{reason}"):
                list(read_pictures(tmp_path / name))


class TestLoading:
    @pytest.fixture
    def broken(self, tmp_path):
        """Folders that are no segmentation model, each in its own way."""
        good = save_checkpoint(tmp_path / "good")
        for name in ("no_processor", "cut", "other_classes"):
            shutil.copytree(good, tmp_path / name)
        (tmp_path / "no_processor" / "preprocessor_config.json").unlink()
        weights = tmp_path / "cut" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        config = tmp_path / "other_classes" / "config.json"
        config.write_text(config.read_text().replace('"3": "car"', '"3": "car", "4": "tree"'))
        shutil.copytree(good, tmp_path / "classifier")
        SegformerForImageClassification(tiny_segformer().config).save_pretrained(tmp_path / "classifier")
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        BertForMaskedLM(BertConfig(**sizes, vocab_size=20)).save_pretrained(tmp_path / "language")
        shutil.copytree(good, tmp_path / "one_class")
        tiny_segformer(num_labels=1).save_pretrained(tmp_path / "one_class")
        return tmp_path

    def test_what_is_no_trained_segmentation_model(self, broken, caplog):
        reasons = {
            "nowhere": "cannot load the model '.*nowhere': there is no such folder",
            "no_processor": "cannot load the model .*preprocessor_config.json",
            "cut": "cannot load the model .*cut'",
            "classifier": "not a trained segmentation model: it has no weights for decode_head",
            "other_classes": r"not a trained segmentation model: it has no weights for decode_head\.classifier",
            "language": "cannot load the model .*BertConfig",
            "one_class": "num_labels=1, but at least 2",
        }
        verbosity = logging.get_verbosity()
        for name, reason in reasons.items():
            with pytest.raises(InputError, match=reason) as raised:
                load_for_inference(str(broken / name))
            assert "\n" not in str(raised.value)
        assert not caplog.records  # one line is all there is to read
        assert logging.get_verbosity() == verbosity

    def test_a_device_that_is_not_there(self, tmp_path):
        save_checkpoint(tmp_path)
        for device in ("warp", "cuda:99"):
            with pytest.raises(InputError, match=f"device '{device}' cannot be used"):
                load_for_inference(str(tmp_path), device)
