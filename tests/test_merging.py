"""Linear heads and LoRA adapters train in one form, and are scored, saved and resumed without a difference."""

import copy
import sys

import pytest
import torch
from conftest import tiny_mobilenet_v2, tiny_segformer, tiny_upernet
from test_trainer import Examples, config
from torch import nn
from transformers import AutoModelForSemanticSegmentation, UperNetForSemanticSegmentation

from pals_hf import PALSTrainer
from pals_hf.errors import InputError
from pals_hf.merging import TRAINING_WEIGHTS, LinearHead, add_adapters, has_parts_to_merge, merged
from pals_hf.models import backbone_of, build_model

NAMES = dict(enumerate("abcd"))


def with_linear_head(folder):
    tiny_upernet().save_pretrained(folder / "source")
    return build_model(str(folder / "source"), NAMES, head="linear")


def with_adapters(folder):
    pytest.importorskip("peft", reason="needs the extra `lora`")
    model = tiny_segformer()
    add_adapters(model, backbone_of(model), rank=2)
    return model


@pytest.fixture(params=[with_linear_head, with_adapters])
def model(request, tmp_path):
    """A network whose batch statistics, adapters and norms are not those of an initialisation."""
    model = request.param(tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "decode_head.batch_norm" in name:
                parameter.normal_()
        model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


def logits_of(model, images):
    with torch.no_grad():
        return model(images).logits


class TestMerged:
    def test_computes_the_same(self, model):
        images = torch.randn(2, 3, 64, 96)
        apart = logits_of(model, images)
        state = copy.deepcopy(model.state_dict())
        with merged(model):
            assert not has_parts_to_merge(model)
            together = logits_of(model, images)
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
        assert has_parts_to_merge(model)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    def test_is_restored_after_an_error(self, model):
        with pytest.raises(ZeroDivisionError), merged(model):
            1 / 0  # noqa: B018
        assert has_parts_to_merge(model)

    @pytest.mark.parametrize("is_copy", [False, True])
    def test_is_what_is_saved(self, model, is_copy, tmp_path):
        if is_copy:
            model = copy.deepcopy(model)
            model.decode_head.classifier.bias.data += 1
        model.save_pretrained(tmp_path)
        loaded, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
        images = torch.randn(1, 3, 64, 64)
        with merged(model):
            assert torch.equal(logits_of(loaded, images), logits_of(model, images))


def test_a_linear_head_is_linear(tmp_path):
    """Batch norm and a 1x1 convolution: what its features are multiplied by, its logits are."""
    model = with_linear_head(tmp_path)
    assert isinstance(model, UperNetForSemanticSegmentation)
    head = model.decode_head.eval()
    assert sum(p.numel() for p in head.parameters()) == 16 * 2 + 16 * 4 + 4
    maps = torch.randn(2, 1, 16, 5, 7)
    with torch.no_grad():
        first, second = (head([features]) for features in maps)
        torch.testing.assert_close(head([maps.mean(dim=0)]), (first + second) / 2)
        torch.testing.assert_close(head.merge()([maps.mean(dim=0)]), (first + second) / 2, rtol=1e-4, atol=1e-5)


class TestAdapters:
    def test_learn_and_nothing_else_of_the_backbone(self, tmp_path):
        pytest.importorskip("peft", reason="needs the extra `lora`")
        model = tiny_segformer()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        args = config(tmp_path, lora_rank=2, learning_rate=1e-2)
        PALSTrainer(model, args, train_dataset=Examples()).train()
        assert {name for name, p in backbone_of(model).named_parameters() if p.requires_grad} == {
            name for name, _ in backbone_of(model).named_parameters() if "lora_" in name
        }
        after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
        moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert any(name.startswith("decode_head") for name in moved)
        assert not {name for name in moved if not name.startswith("decode_head")}
        adapted = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
        assert len(adapted) > 10
        assert any(module.get_delta_weight("default").abs().max() > 0 for module in adapted)

    def test_need_linear_layers(self):
        pytest.importorskip("peft", reason="needs the extra `lora`")
        model = tiny_mobilenet_v2()
        with pytest.raises(InputError, match="lora_rank adapts linear layers, and MobileNetV2Model has none"):
            add_adapters(model, backbone_of(model), 2)

    def test_need_peft(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(InputError, match=r"lora_rank needs peft\. Install it"):
            add_adapters(nn.Module(), nn.Module(), 2)


class TestTraining:
    @pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}], ids=["linear head", "adapters"])
    def test_resumes_bit_identically(self, settings, tmp_path):
        """A checkpoint holds the weights in both forms."""
        if settings:
            pytest.importorskip("peft", reason="needs the extra `lora`")

        def trainer_in(name):
            torch.manual_seed(0)
            network = tiny_segformer() if settings else with_linear_head(tmp_path)
            args = config(tmp_path / name, **settings, max_steps=2, save_strategy="steps", save_steps=1)
            return PALSTrainer(network, args, train_dataset=Examples())

        whole, resumed = trainer_in("whole"), trainer_in("resumed")
        whole.train()
        assert (tmp_path / "whole" / "checkpoint-1" / TRAINING_WEIGHTS).exists()
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
        for name, tensor in resumed.model.state_dict().items():
            assert torch.equal(tensor, whole.model.state_dict()[name]), name
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "resumed" / "checkpoint-2").eval()
        images = torch.randn(1, 3, 64, 64)
        with merged(resumed.model.eval()):
            assert torch.equal(logits_of(loaded, images), logits_of(resumed.model, images))

    def test_refuses_a_checkpoint_of_another_form(self, tmp_path):
        pytest.importorskip("peft", reason="needs the extra `lora`")
        args = config(tmp_path, save_strategy="steps", save_steps=1)
        PALSTrainer(tiny_segformer(), args, train_dataset=Examples()).train()
        args = config(tmp_path, save_strategy="steps", save_steps=1, lora_rank=2, max_steps=2)
        trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples())
        with pytest.raises(InputError, match=r"it has no training_weights\.safetensors, because it trained without"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    def test_evaluates_what_is_saved(self, model, tmp_path, monkeypatch):
        seen = []
        score = PALSTrainer.prediction_step
        monkeypatch.setattr(
            PALSTrainer,
            "prediction_step",
            lambda self, *args, **kwargs: seen.append(has_parts_to_merge(self.model)) or score(self, *args, **kwargs),
        )
        PALSTrainer(model, config(tmp_path), eval_dataset=Examples()).evaluate()
        assert seen == [False] * 4


def test_freezing_contradicts_adapters(tmp_path):
    with pytest.raises(InputError, match="lora_rank has no effect with freeze_backbone"):
        config(tmp_path, lora_rank=2, freeze_backbone=True)
    with pytest.raises(InputError, match="layer_lr_decay has no effect with freeze_backbone"):
        config(tmp_path, layer_lr_decay=0.9, freeze_backbone=True)


def test_linear_head_of_a_frozen_backbone(tmp_path):
    model = with_linear_head(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    PALSTrainer(model, config(tmp_path, freeze_backbone=True), train_dataset=Examples(size=(64, 64))).train()
    assert isinstance(model.decode_head, LinearHead)
    assert model.decode_head.batch_norm.num_batches_tracked == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
