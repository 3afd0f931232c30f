"""The tap that finds a network's classifier and reads it."""

import pytest
import torch
from conftest import NUM_LABELS, tiny_segformer, tiny_upernet
from torch import nn
from transformers import (
    Mask2FormerConfig,
)

from pals_hf.errors import InputError
from pals_hf.models import backbone_of
from pals_hf.tap import ClassifierTap, encoder_features, refuse_unsuitable


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
        with pytest.raises(InputError, match="needs a classifier that maps"):
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
            ((torch.zeros(1, 3),), 0, "has the shape"),
        ],
    )
    def test_refuses(self, states, stage, message):
        with pytest.raises(InputError, match=message):
            encoder_features(states, stage, (64, 96), (4, 6), 16)


class TestRefuseUnsuitable:
    def test_by_name(self):
        with pytest.raises(InputError, match="'mask2former' models do not predict one"):
            refuse_unsuitable(Mask2FormerConfig())

    def test_one_class(self):
        with pytest.raises(InputError, match="num_labels=1"):
            refuse_unsuitable(tiny_segformer(num_labels=1).config)
