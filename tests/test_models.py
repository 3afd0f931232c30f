import json

import pytest
import torch
from architectures import BUILDERS, SIZE
from conftest import NUM_LABELS, tiny_segformer, tiny_upernet
from huggingface_hub import constants
from PIL import Image
from transformers import (
    MobileNetV2ImageProcessor,
    SegformerImageProcessor,
)

from pals_hf.errors import InputError
from pals_hf.models import (
    adapt_kernel,
    backbone_of,
    build_image_processor,
    build_model,
)
from pals_hf.pretrained import channels_of_network
from pals_hf.tap import ClassifierTap

NAMES = {index: f"class {index}" for index in range(NUM_LABELS)}


class TestBuildModel:
    def test_from_scratch(self):
        model = build_model(None, NAMES)
        assert model.config.id2label == NAMES
        assert model.config.label2id["class 2"] == 2
        assert sum(p.numel() for p in model.parameters()) < 1e6

    def test_makes_a_new_head_where_it_does_not_fit(self, any_model, tmp_path):
        any_model.save_pretrained(tmp_path)
        same, other = build_model(str(tmp_path), NAMES), build_model(str(tmp_path), dict(enumerate("abcdefg")))
        for name, parameter in any_model.state_dict().items():
            assert torch.equal(same.state_dict()[name], parameter)
            is_classifier = name.rpartition(".")[0] in ClassifierTap(other).layers
            assert is_classifier or torch.equal(other.state_dict()[name], parameter)
        assert other.config.num_labels == 7

    def test_a_head_of_the_same_classes_in_another_order(self, any_model, tmp_path):
        names = ["sky", "road", "car", "bed "]  # with a blank, as in the names of ADE20K on the Hub
        any_model.config.id2label = dict(enumerate(names))
        any_model.save_pretrained(tmp_path)
        wanted = ["bed", "car", "sky", "road"]
        model = build_model(str(tmp_path), dict(enumerate(wanted)))
        images = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            before, after = any_model.eval()(images).logits, model.eval()(images).logits
        assert torch.equal(after, before[:, [3, 2, 0, 1]])
        assert model.config.id2label == dict(enumerate(wanted))
        assert model.config.label2id["sky"] == 2

    def test_a_head_of_other_classes_is_not_kept(self, any_model, tmp_path, caplog):
        any_model.config.id2label = dict(enumerate("abcd"))
        any_model.save_pretrained(tmp_path)
        with caplog.at_level("WARNING"):
            model = build_model(str(tmp_path), dict(enumerate("abcx")))
        assert "has a head for other classes (0: a, 1: b, 2: c, 3: d). The training starts with a new" in caplog.text
        name, layer = list(ClassifierTap(model).layers.items())[-1]
        assert not torch.equal(layer.weight, any_model.state_dict()[f"{name}.weight"])

    def test_a_new_classifier_is_initialised_by_its_fan_in(self, any_model, tmp_path):
        any_model.save_pretrained(tmp_path)
        model = build_model(str(tmp_path), dict(enumerate("abcdefg")))
        (layer,) = [layer for layer in ClassifierTap(model).layers.values() if layer.weight.shape[0] == 7][-1:]
        # Torch's own initialisation: uniform between -1 and 1 over the root of the fan-in.
        weight, bound = layer.weight.detach(), layer.weight[0].numel() ** -0.5
        assert weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.3)

    def test_from_scratch_needs_a_config_only(self, any_model, tmp_path):
        any_model.config.save_pretrained(tmp_path)
        first, second = (build_model(str(tmp_path), dict(enumerate("abcdefg")), from_scratch=True) for _ in range(2))
        assert type(first) is type(any_model)
        assert first.config.num_labels == 7
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        assert not all(torch.equal(one, other) for one, other in pairs)  # drawn, not loaded

    def test_from_scratch_draws_a_classifier_and_nothing_else_anew(self, tmp_path):
        """A backbone whose layers happen to have as many outputs keeps the initialisation of its architecture."""
        tiny_segformer(initializer_range=0.001).config.save_pretrained(tmp_path)
        model = build_model(str(tmp_path), dict(enumerate("abcdefgh")), from_scratch=True)
        spread = {name: layer.weight.std() for name, layer in ClassifierTap(model).layers.items()}
        assert len(spread) > 1
        assert [name for name, deviation in spread.items() if deviation > 0.01] == ["decode_head.classifier"]

    def test_from_scratch_forgets_where_the_architecture_is_from(self, tmp_path):
        tiny_segformer().save_pretrained(tmp_path)
        assert build_model(str(tmp_path), NAMES).config.name_or_path == str(tmp_path)
        assert build_model(str(tmp_path), NAMES, from_scratch=True).config.name_or_path == ""

    def test_builds_without_auxiliary_heads(self, tmp_path):
        tiny_upernet(use_auxiliary_head=True, auxiliary_channels=8, auxiliary_in_channels=16).save_pretrained(tmp_path)
        assert build_model(str(tmp_path), NAMES).auxiliary_head is None

    @pytest.mark.parametrize("architecture", [name for name in BUILDERS if "auxiliary" not in name])
    def test_a_network_for_other_channels(self, architecture, tmp_path):
        """Equal channels give the logits that equal colours give: the adapted kernel adds up to the same."""
        rgb = BUILDERS[architecture]().eval()
        rgb.save_pretrained(tmp_path)
        adapted = build_model(str(tmp_path), NAMES, channels=6).eval()
        assert channels_of_network(adapted.config) == 6
        grey = torch.rand(1, 1, SIZE, SIZE)
        with torch.no_grad():
            found, expected = (
                network(pixel_values=grey.expand(1, channels, SIZE, SIZE)).logits
                for network, channels in ((adapted, 6), (rgb, 3))
            )
        assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())

    def test_a_saved_network_for_other_channels(self, tmp_path):
        rgb = tiny_segformer().eval()
        rgb.save_pretrained(tmp_path / "rgb")
        adapted = build_model(str(tmp_path / "rgb"), NAMES, channels=1).eval()
        assert adapted.config.name_or_path == str(tmp_path / "rgb")
        adapted.save_pretrained(tmp_path / "grey")
        again = build_model(str(tmp_path / "grey"), NAMES, channels=1)
        pairs = zip(adapted.state_dict().values(), again.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        grey = torch.rand(1, 1, 32, 32)
        with torch.no_grad():
            assert torch.allclose(
                adapted(pixel_values=grey).logits, rgb(pixel_values=grey.expand(1, 3, 32, 32)).logits, atol=1e-5
            )
        with pytest.raises(InputError, match=r"takes images of 1 channels, but channels is 3\. Use --channels 1, or"):
            build_model(str(tmp_path / "grey"), NAMES)
        drawn = build_model(str(tmp_path / "grey"), NAMES, from_scratch=True, channels=2)
        assert drawn.config.num_channels == 2

    def test_the_default_network_for_other_channels(self):
        assert (
            build_model(None, NAMES, channels=5)(pixel_values=torch.rand(1, 5, 32, 32)).logits.shape[1] == NUM_LABELS
        )

    @pytest.mark.parametrize("channels", [1, 2, 4, 7])
    def test_a_kernel_is_adapted_as_timm_does(self, channels):
        manipulate = pytest.importorskip("timm.models._manipulate")
        kernel = torch.randn(8, 3, 4, 4)
        assert torch.allclose(adapt_kernel(kernel, channels), manipulate.adapt_input_conv(channels, kernel))

    def test_half_precision_checkpoints_train_in_float32(self, tmp_path):
        tiny_segformer().half().save_pretrained(tmp_path)
        assert {p.dtype for p in build_model(str(tmp_path), NAMES).parameters()} == {torch.float32}

    def test_refuses(self, tmp_path):
        with pytest.raises(InputError, match=r"cannot load the model 'nobody/nothing'"):
            build_model("nobody/nothing", NAMES)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mask2former"}))
        with pytest.raises(InputError, match="mask2former"):
            build_model(str(tmp_path), NAMES)


class TestBuildImageProcessor:
    def test_keeps_the_size_unless_told(self):
        image = Image.new("RGB", (50, 30))
        assert build_image_processor(None)(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 30, 50)
        resized = build_image_processor(None, (16, 24))(image, return_tensors="pt")["pixel_values"]
        assert resized.shape == (1, 3, 16, 24)

    def test_keeps_the_normalisation_of_a_checkpoint(self, tmp_path):
        SegformerImageProcessor(image_mean=[0.1, 0.2, 0.3], size={"height": 512, "width": 512}).save_pretrained(
            tmp_path
        )
        processor = build_image_processor(str(tmp_path), (16, 24))
        assert list(processor.image_mean) == [0.1, 0.2, 0.3]
        assert processor(Image.new("RGB", (50, 30)), return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 24)

    def test_switches_off_what_would_change_the_size(self, tmp_path):
        MobileNetV2ImageProcessor(do_center_crop=True).save_pretrained(tmp_path)
        processor = build_image_processor(str(tmp_path))
        assert processor(Image.new("RGB", (50, 30)), return_tensors="pt")["pixel_values"].shape == (1, 3, 30, 50)

    def test_a_checkpoint_without_one(self, tmp_path):
        tiny_segformer().save_pretrained(tmp_path)
        assert isinstance(build_image_processor(str(tmp_path)), SegformerImageProcessor)

    def test_one_that_cannot_be_had_is_not_guessed(self, tmp_path, monkeypatch):
        """The cache has the network; the Hub, which knows whether there is a processor, is out of reach."""
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        commit, repository = "a" * 40, tmp_path / "models--someone--streets"
        tiny_segformer().config.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        with pytest.raises(InputError, match="cannot load the image processor of 'someone/streets'") as stop:
            build_image_processor("someone/streets")
        assert "`hf download someone/streets preprocessor_config.json`" in str(stop.value)
        none = repository / ".no_exist" / commit / "preprocessor_config.json"  # as the client notes what it was told
        none.parent.mkdir(parents=True)
        none.touch()
        assert isinstance(build_image_processor("someone/streets"), SegformerImageProcessor)
        SegformerImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(repository / "snapshots" / commit)
        none.unlink()
        assert list(build_image_processor("someone/streets").image_mean) == [0.1, 0.2, 0.3]

    @pytest.mark.parametrize("name", ["nobody/nothing", "no/such/folder"])
    def test_of_nothing(self, name):
        with pytest.raises(InputError, match=f"cannot load the image processor of '{name}'"):
            build_image_processor(name)


def test_backbone_and_head_share_no_parameter(any_model):
    backbone = {id(p) for p in backbone_of(any_model).parameters()}
    head = {id(p) for p in ClassifierTap(any_model).layers.popitem()[1].parameters()}
    assert backbone
    assert not backbone & head


def test_no_backbone_to_be_told():
    model = tiny_segformer()
    model.base_model_prefix = "elsewhere"
    with pytest.raises(InputError, match="cannot be told from its head"):
        backbone_of(model)
