import json

import pytest
import torch
from conftest import NUM_LABELS, tiny_segformer, tiny_upernet
from huggingface_hub import constants
from PIL import Image
from torch import nn
from transformers import (
    Mask2FormerConfig,
    MobileNetV2ImageProcessor,
    SegformerImageProcessor,
)

from pals_hf.errors import InputError
from pals_hf.models import (
    ClassifierTap,
    backbone_of,
    build_image_processor,
    build_model,
    encoder_features,
    refuse_unsuitable,
)

NAMES = {index: f"class {index}" for index in range(NUM_LABELS)}


def read(model, images):
    tap = ClassifierTap(model)
    with tap:
        outputs = model(pixel_values=images)
    return outputs, *tap.read()


class TestClassifierTap:
    def test_reads_the_input_and_output_of_the_classifier(self, any_model):
        any_model.eval()
        images = torch.randn(2, 3, 64, 96)
        outputs, features, logits, *_ = read(any_model, images)
        (layer,) = ClassifierTap(any_model).layers.values()
        assert torch.equal(layer(features), logits)
        assert features.shape[2:] == logits.shape[2:]
        assert logits.shape[:2] == (2, NUM_LABELS)
        up = nn.functional.interpolate(logits, size=outputs.logits.shape[2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(up, outputs.logits)

    def test_upernet_is_read_before_it_upsamples(self):
        outputs, _, logits, *_ = read(tiny_upernet().eval(), torch.randn(1, 3, 64, 96))
        assert outputs.logits.shape[2:] == (64, 96)
        assert logits.shape[2:] == (16, 24)

    def test_gradient_flows_through_what_was_read(self, any_model):
        _, features, logits, *_ = read(any_model, torch.randn(2, 3, 64, 64))
        logits.square().sum().backward()
        assert any(p.grad is not None and p.grad.norm() > 0 for p in backbone_of(any_model).parameters())
        assert features.requires_grad

    def test_leaves_auxiliary_heads_alone(self):
        model = tiny_upernet(use_auxiliary_head=True, auxiliary_channels=8, auxiliary_in_channels=16).eval()
        assert list(ClassifierTap(model).layers) == ["decode_head.classifier"]

    def test_before_dropout(self):
        model = tiny_segformer(classifier_dropout_prob=0.5).train()
        tap = ClassifierTap(model, before_dropout=True)
        with tap:
            model(pixel_values=torch.randn(2, 3, 64, 96))
        features = tap.read().features
        with (plain := ClassifierTap(model)):
            model(pixel_values=torch.randn(2, 3, 64, 96))
        dropped = plain.read().features
        assert (dropped == 0).float().mean() > (features == 0).float().mean() + 0.2

    def test_before_a_dropout_that_is_not_there(self):
        model = tiny_upernet().eval()
        images = torch.randn(1, 3, 64, 96)
        with (before := ClassifierTap(model, before_dropout=True)), (after := ClassifierTap(model)):
            model(pixel_values=images)
        assert torch.equal(before.read().features, after.read().features)

    def test_another_layer_with_as_many_outputs(self):
        """Here inner layers have num_labels outputs too: the classifier is the one that runs last."""
        model = tiny_segformer(num_labels=16).eval()
        tap = ClassifierTap(model)
        assert len(tap.layers) > 1
        outputs, _, logits, *_ = read(model, torch.randn(1, 3, 64, 64))
        assert torch.equal(logits, outputs.logits)

    def test_channels_last_linear_classifier(self):
        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.config = tiny_segformer().config
                self.head = nn.Linear(5, NUM_LABELS)

            def forward(self, pixel_values):
                return self.head(pixel_values)

        tap = ClassifierTap(network := Network())
        with tap:
            output = network(torch.randn(2, 6, 7, 5))
        features, logits, *_ = tap.read()
        assert features.shape == (2, 5, 6, 7)
        assert torch.equal(logits, output.movedim(-1, 1))

    def test_leaves_no_hook_behind_even_after_an_error(self, any_model):
        tap = ClassifierTap(any_model)
        with tap:
            assert all(layer._forward_hooks for layer in tap.layers.values())
        with pytest.raises((RuntimeError, ValueError)), tap:
            any_model(pixel_values=torch.randn(1, 7, 64, 64))
        assert not any(layer._forward_hooks for layer in tap.layers.values())

    def test_reads_once(self):
        model = tiny_segformer()
        tap = ClassifierTap(model)
        with tap:
            model(pixel_values=torch.randn(1, 3, 32, 32))
        tap.read()
        with pytest.raises(RuntimeError, match="no forward pass"):
            tap.read()

    def test_says_what_it_looked_at(self):
        model = tiny_segformer()
        model.decode_head.classifier = nn.Identity()
        with pytest.raises(InputError, match=r"num_labels=4 outputs.*decode_head\.linear_fuse \(16\)"):
            ClassifierTap(model)

    def test_refuses_a_classifier_without_a_grid(self):
        model = tiny_segformer()
        tap = ClassifierTap(model)
        with tap:
            model.decode_head.classifier(torch.randn(16, 5, 5))
        with pytest.raises(InputError, match="not one grid"):
            tap.read()


class TestEncoderFeatures:
    def test_maps_are_brought_to_the_grid(self):
        states = (torch.randn(2, 5, 8, 12), torch.randn(2, 7, 4, 6))
        assert encoder_features(states, -1, (64, 96), (16, 24)).shape == (2, 7, 16, 24)
        assert torch.equal(encoder_features(states, 0, (64, 96), (8, 12)), states[0])

    @pytest.mark.parametrize(
        ("image_size", "patch_size", "grid", "prefix"),
        [
            ((64, 96), 16, (4, 6), 0),
            ((64, 96), 16, (4, 6), 9),
            ((180, 240), 14, (12, 17), 2),  # no multiple of the patch
            ((200, 200), 16, (12, 12), 1),
            ((64, 96), 4, (8, 12), 0),  # patches merged once, as in Swin
            ((60, 96), 4, (8, 12), 0),
        ],
    )
    def test_tokens_are_laid_out_on_the_image(self, image_size, patch_size, grid, prefix):
        maps = torch.randn(2, 5, *grid)
        tokens = torch.cat([torch.zeros(2, prefix, 5), maps.flatten(2).transpose(1, 2)], dim=1)
        assert torch.equal(encoder_features((tokens,), 0, image_size, grid, patch_size), maps)

    @pytest.mark.parametrize(
        ("states", "stage", "message"),
        [
            (None, 0, "the network has 0 hidden states"),
            ((torch.zeros(1, 2, 3, 3),), 1, "encoder_stage 1: the network has 1 hidden states"),
            ((torch.zeros(1, 300, 3),), 0, "300 tokens do not cover an image of 64x96 in patches of 16 pixels"),
            ((torch.zeros(1, 3),), 0, "no map of features"),
        ],
    )
    def test_refuses(self, states, stage, message):
        with pytest.raises(InputError, match=message):
            encoder_features(states, stage, (64, 96), (4, 6), 16)


class TestRefuseUnsuitable:
    def test_by_name(self):
        with pytest.raises(InputError, match="'mask2former' models do not give; use one of beit"):
            refuse_unsuitable(Mask2FormerConfig())

    def test_one_class(self):
        with pytest.raises(InputError, match="num_labels=1"):
            refuse_unsuitable(tiny_segformer(num_labels=1).config)


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
    with pytest.raises(InputError, match="no backbone"):
        backbone_of(model)
