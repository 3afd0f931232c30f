import json

import pytest
import torch
import transformers
from conftest import NUM_LABELS, tiny_segformer, tiny_upernet
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForSemanticSegmentation,
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
    predict_mask,
    refuse_unsuitable,
)

# (patch, layers, width) of one tiny vision transformer; four stages feed the decoders.
VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
VIT |= {"intermediate_size": 16, "num_labels": NUM_LABELS}
BEIT = {**VIT, "use_auxiliary_head": True, "auxiliary_channels": 8, "auxiliary_num_convs": 1, "pool_scales": [1, 2]}
DPT = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "use_auxiliary_head": True}
OTHERS = {
    "beit": lambda: transformers.BeitForSemanticSegmentation(
        transformers.BeitConfig(**BEIT, out_indices=[1, 2, 3, 4], add_fpn=True)
    ),
    "data2vec-vision": lambda: transformers.Data2VecVisionForSemanticSegmentation(
        transformers.Data2VecVisionConfig(**BEIT, out_indices=[0, 1, 2, 3])
    ),
    "dpt": lambda: transformers.DPTForSemanticSegmentation(
        transformers.DPTConfig(**VIT, **DPT, backbone_out_indices=[0, 1, 2, 3])
    ),
    "mobilevit": lambda: transformers.MobileViTForSemanticSegmentation(
        transformers.MobileViTConfig(
            hidden_sizes=[12, 16, 20],
            neck_hidden_sizes=[8, 8, 16, 16, 32, 32, 32],
            image_size=32,
            aspp_out_channels=16,
            num_labels=NUM_LABELS,
        )
    ),
    "mobilevitv2": lambda: transformers.MobileViTV2ForSemanticSegmentation(
        transformers.MobileViTV2Config(width_multiplier=0.25, image_size=64, num_labels=NUM_LABELS)
    ),
}

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
        outputs, features, logits = read(any_model, images)
        (layer,) = ClassifierTap(any_model).layers.values()
        assert torch.equal(layer(features), logits)
        assert features.shape[2:] == logits.shape[2:]
        assert logits.shape[:2] == (2, NUM_LABELS)
        up = nn.functional.interpolate(logits, size=outputs.logits.shape[2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(up, outputs.logits)

    @pytest.mark.parametrize("architecture", OTHERS)
    def test_reads_every_other_architecture(self, architecture):
        """With auxiliary heads where they have them: theirs is not taken."""
        model = OTHERS[architecture]()
        size = model.config.image_size
        outputs, features, logits = read(model.eval(), torch.randn(2, 3, size, size))
        assert logits.shape[:2] == (2, NUM_LABELS)
        assert features.shape[2:] == logits.shape[2:]
        used = torch.autograd.grad(outputs.logits.sum(), logits, allow_unused=True)[0]
        assert used is not None
        assert used.norm() > 0

    def test_upernet_is_read_before_it_upsamples(self):
        outputs, _, logits = read(tiny_upernet().eval(), torch.randn(1, 3, 64, 96))
        assert outputs.logits.shape[2:] == (64, 96)
        assert logits.shape[2:] == (16, 24)

    def test_gradient_flows_through_what_was_read(self, any_model):
        _, features, logits = read(any_model, torch.randn(2, 3, 64, 64))
        logits.square().sum().backward()
        assert any(p.grad is not None and p.grad.norm() > 0 for p in backbone_of(any_model).parameters())
        assert features.requires_grad

    def test_leaves_auxiliary_heads_alone(self):
        model = tiny_upernet(use_auxiliary_head=True, auxiliary_channels=8, auxiliary_in_channels=16).eval()
        assert list(ClassifierTap(model).layers) == ["decode_head.classifier"]

    def test_another_layer_with_as_many_outputs(self):
        """Here inner layers have num_labels outputs too: the classifier is the one that runs last."""
        model = tiny_segformer(num_labels=16).eval()
        tap = ClassifierTap(model)
        assert len(tap.layers) > 1
        outputs, _, logits = read(model, torch.randn(1, 3, 64, 64))
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
        features, logits = tap.read()
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


def test_predict_mask(any_model, tmp_path):
    any_model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    mask = predict_mask(loaded, build_image_processor(None, (32, 64)), Image.new("L", (50, 30), 90))
    assert mask.shape == (30, 50)
    assert 0 <= mask.min() <= mask.max() < NUM_LABELS
