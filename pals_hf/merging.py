"""Parts of a network that train in another form than they are saved in: a linear head, and LoRA adapters.

Such a part has a counterpart in the network's own class, with the same outputs. [`merged`] puts the counterparts in
place, for saving and for evaluation, so that what is scored is what is saved, and loads without this package or peft.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, UperNetConfig

TRAINING_WEIGHTS = "training_weights.safetensors"  # of a checkpoint: the weights in the form in which they train


class LinearHead(nn.Module):
    """Batch norm and a 1x1 convolution on the last feature map, as DINOv2 (Oquab et al. 2023) is evaluated.

    It takes the place of the head of a `UperNetForSemanticSegmentation` with one stage, no pooling and twice as many
    hidden channels as classes. That head can compute the same function in evaluation mode: its ReLUs pass on positive
    and negative logits in separate channels, and its classifier subtracts them.

    Args:
        config: the config of that network.
        in_channels: channels of the last feature map.
    """

    def __init__(self, config: UperNetConfig, in_channels: int):
        super().__init__()
        self.config = config
        self.batch_norm = nn.BatchNorm2d(in_channels)
        self.classifier = nn.Conv2d(in_channels, config.num_labels, kernel_size=1)

    def forward(self, feature_maps: list[Tensor]) -> Tensor:
        """Return logits `(B, C, h, w)` from the last of the maps `(B, D, h, w)`."""
        return self.classifier(self.batch_norm(feature_maps[-1]))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Return the head of UperNet that computes the same logits in evaluation mode."""
        from transformers.models.upernet.modeling_upernet import UperNetHead

        norm, kernel = self.batch_norm, self.classifier.weight[:, :, 0, 0]
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = kernel * scale
        bias = self.classifier.bias + kernel @ (norm.bias - norm.running_mean * scale)
        head = UperNetHead(self.config, in_channels=[norm.num_features]).to(kernel.device, kernel.dtype).eval()
        for parameter in head.parameters():
            parameter.requires_grad_(False).zero_()
        for module in (head.bottleneck, head.fpn_bottleneck):
            # With this variance and eps, the norm divides by 1.
            module.batch_norm.weight.fill_(1)
            module.batch_norm.running_var.fill_(1 - module.batch_norm.eps)
        head.bottleneck.conv.weight[:, :, 1, 1] = torch.cat([weight, -weight])
        head.bottleneck.batch_norm.bias.copy_(torch.cat([bias, -bias]))
        identity = torch.eye(len(bias), device=kernel.device, dtype=kernel.dtype)
        head.fpn_bottleneck.conv.weight[:, :, 1, 1] = torch.block_diag(identity, identity)
        head.classifier.weight[:, :, 0, 0] = torch.cat([identity, -identity], dim=1)
        return head


def use_linear_head(model: PreTrainedModel) -> None:
    """Replace the head of a UperNet with one stage by a new [`LinearHead`]. It is saved as a head of UperNet."""
    model.decode_head = LinearHead(model.config, model.backbone.channels[-1])
    _save_merged(model)


def add_adapters(model: PreTrainedModel, backbone: nn.Module, rank: int) -> None:
    """Add LoRA adapters (Hu et al. 2022) to all linear layers of a backbone, whose own weights are frozen.

    The scale of an adapter is 1 (alpha = rank), as in the example of peft for semantic segmentation.

    Args:
        model: the segmentation network, which is saved with merged weights from now on.
        backbone: its backbone.
        rank: rank of the adapters.

    Raises:
        InputError: peft is not installed, or the backbone has no linear layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("lora_rank needs peft. Install it: pip install 'pals_hf[lora]'") from error
    layers = [name for name, module in backbone.named_modules() if type(module) is nn.Linear]
    if not layers:
        raise InputError(
            f"lora_rank adapts linear layers, and {type(backbone).__name__} has none. Use a vision transformer or "
            "ConvNeXt, or leave lora_rank out."
        )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), backbone)
    _save_merged(model)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Put the parts of a network in place that it is saved with, and restore those that it trains with at the end."""
    swapped = []
    try:
        for parent in list(model.modules()):
            for name, part in parent._modules.items():
                if is_mergeable(part):
                    parent._modules[name] = _merge(part)
                    swapped.append((parent, name, part))
        yield
    finally:
        for parent, name, part in swapped:
            parent._modules[name] = part


def has_parts_to_merge(model: nn.Module) -> bool:
    """Return whether a network trains in another form than it is saved in."""
    return any(is_mergeable(module) for module in model.modules())


def is_mergeable(module: nn.Module | None) -> bool:
    """Return whether a module is a [`LinearHead`] or a layer with a LoRA adapter."""
    return isinstance(module, LinearHead) or hasattr(module, "get_delta_weight")


@torch.no_grad()
def _merge(part: nn.Module) -> nn.Module:
    if isinstance(part, LinearHead):
        return part.merge()
    base = part.get_base_layer()
    layer = copy.copy(base)
    layer._parameters = dict(base._parameters)
    delta = part.get_delta_weight(part.active_adapters[0]).to(base.weight.dtype)
    layer.weight = nn.Parameter(base.weight + delta, requires_grad=False)
    return layer


def _save_merged(model: PreTrainedModel) -> None:
    model.save_pretrained = MethodType(_save_pretrained, model)  # a method, so that a deep copy saves itself


def _save_pretrained(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    with merged(model):
        type(model).save_pretrained(model, *args, **kwargs)


def save_training_weights(model: nn.Module, folder: Path) -> None:
    """Write the weights that a training resumes from, beside the merged ones."""
    if has_parts_to_merge(model):
        tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / TRAINING_WEIGHTS)


def load_training_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights that [`save_training_weights`] has written.

    Raises:
        FileNotFoundError, RuntimeError, SafetensorError: there are none, or they are of another network.
    """
    if not (folder / TRAINING_WEIGHTS).exists():
        raise FileNotFoundError(f"it has no {TRAINING_WEIGHTS}, because it trained without lora_rank and linear head")
    model.load_state_dict(load_file(folder / TRAINING_WEIGHTS, device="cpu"))
