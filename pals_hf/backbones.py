"""A segmentation network around a bare backbone of transformers or timm: its head, its stages, its learning rates."""

from __future__ import annotations

import copy
import math
import re
from typing import TYPE_CHECKING, NamedTuple

from torch import nn
from transformers import Tipsv2DptConfig, UperNetConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)

from .errors import InputError
from .merging import use_linear_head
from .pretrained import load_backbone, loading, new_network, timm_backbone_config, timm_feature_info
from .sizes import size_multiple

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HEADS = ("upernet", "linear", "dpt")
NUM_STAGES = 4
WIDTHS = (64, 512)  # the smallest and the largest number of channels that a head gets by default

# The only DPT of transformers around other backbones reads a class token, register tokens and then the patches. These
# backbones return them so.
_DPT_BACKBONES = ("dinov2", "dinov2_with_registers", "tipsv2_vision_model")
_TIMM = ("timm_backbone", "timm_wrapper")


class Rates(NamedTuple):
    """Learning rates of a published recipe."""

    learning_rate: float
    """Peak learning rate of the backbone."""
    head_lr_multiplier: float
    """The head learns at this multiple."""
    source: str
    """Where they are from."""


_UNIMATCH = Rates(5e-6, 40.0, "UniMatch V2 (Yang et al. 2024), DINOv2 with DPT on Pascal VOC2012, batches of 32")
_SWIN = Rates(6e-5, 1.0, "Swin (Liu et al. 2021), UPerNet on ADE20K, batches of 16")
_CONVNEXT = Rates(1e-4, 1.0, "ConvNeXt (Liu et al. 2022), UPerNet on ADE20K, batches of 16")
_BEIT = Rates(3e-5, 1.0, "MMSegmentation's BEiT (Bao et al. 2022), UPerNet on ADE20K, batches of 16")
LORA_RATES = Rates(5e-4, 1.0, "peft's example of semantic segmentation with LoRA, batches of 4")
_RATES = {
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit", "tipsv2_vision_model"), _UNIMATCH),
    **dict.fromkeys(("swin", "swinv2", "maskformer-swin"), _SWIN),
    **dict.fromkeys(("convnext", "convnextv2", "dinov3_convnext"), _CONVNEXT),
    "beit": _BEIT,
}


def published_rates(config: PreTrainedConfig) -> Rates | None:
    """Return the learning rates that a backbone of this kind is published with, or None for other kinds.

    Args:
        config: config of the segmentation network, or of its backbone.
    """
    return _RATES.get((getattr(config, "backbone_config", None) or config).model_type)


def is_backbone(config: PreTrainedConfig) -> bool:
    """Return whether a config is that of a bare backbone, which has no class for segmentation."""
    kind = config.model_type
    return kind in _TIMM or (
        kind in MODEL_FOR_BACKBONE_MAPPING_NAMES and kind not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
    )


def build_around_backbone(
    name_or_path: str,
    config: PreTrainedConfig,
    head: str,
    id2label: dict[int, str],
    head_channels: int | None = None,
    from_scratch: bool = False,
) -> PreTrainedModel:
    """Build a segmentation network around a backbone. Its class is one of transformers.

    Args:
        name_or_path: the checkpoint of the backbone, or of a segmentation network with a backbone, on the Hub or in a
            folder.
        config: its config.
        head: "upernet" on four stages (Xiao et al. 2018); "linear" on the last one, see [`LinearHead`]; "dpt" on four
            layers of a plain vision transformer (Ranftl et al. 2021).
        id2label: class index to name.
        head_channels: width of the head, see [`default_width`]. A linear head has none.
        from_scratch: draw all weights at random.

    Raises:
        InputError: there is no such backbone, its weights cannot be loaded, or the head does not fit; the message
            names the heads that do.
    """
    backbone_config = _backbone_config(name_or_path, config)
    if head == "dpt" and backbone_config.model_type not in _DPT_BACKBONES:
        raise InputError(
            f"head dpt does not fit {name_or_path}: transformers has it for {', '.join(_DPT_BACKBONES)}, not for "
            f"{backbone_config.model_type}. Use head upernet or linear."
        )
    if head == "linear" and head_channels is not None:
        raise InputError("head_channels has no effect with head linear. Leave it out.")
    with loading(f"no network can be built around {name_or_path}"):  # configs of others raise any type
        stages = _stages(backbone_config)
        backbone_config.out_indices = stages[-1:] if head == "linear" else stages
        network_config = _network_config(backbone_config, head, id2label, head_channels)
    network = new_network(name_or_path, network_config)
    if not from_scratch:
        network.backbone = load_backbone(name_or_path, config, network.config.backbone_config)
        network.config.name_or_path = name_or_path
        network.config._commit_hash = getattr(config, "_commit_hash", None)
    if head == "linear":
        use_linear_head(network)
    return network


def _backbone_config(name_or_path: str, config: PreTrainedConfig) -> PreTrainedConfig:
    inner = getattr(config, "backbone_config", None)  # a segmentation network with a backbone
    config = config if inner is None else copy.deepcopy(inner)  # its stages will be others
    if config.model_type in _TIMM:
        return timm_backbone_config(name_or_path, config)
    if config.model_type not in MODEL_FOR_BACKBONE_MAPPING_NAMES:
        own = config.model_type in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
        raise InputError(
            f"{name_or_path} is of the type {config.model_type!r}, which transformers has not as a backbone. "
            + ("Leave head out: it has a head of its own." if own else _alternatives())
        )
    return config


def _alternatives() -> str:
    return f"Use a model of timm, or one of {', '.join(sorted(MODEL_FOR_BACKBONE_MAPPING_NAMES))}."


def _stages(config: PreTrainedConfig) -> list[int]:
    """Return the indices of four stages: the last ones, or evenly spaced layers of a plain vision transformer.

    Stages finer than a quarter of the image cost much time for little.
    """
    if config.model_type == "timm_backbone":
        strides = [stage["reduction"] for stage in timm_feature_info(config.backbone)]
        if len(set(strides)) == 1:
            return _evenly_spaced(len(strides), first=0)
        return [index for index, stride in enumerate(strides) if stride >= 4][-NUM_STAGES:]
    layers = len(config.stage_names) - 1
    if size_multiple(config) > 1:
        return _evenly_spaced(layers, first=1)
    return list(range(layers + 1))[-NUM_STAGES:]


def _evenly_spaced(layers: int, first: int) -> list[int]:
    """Return up to four of the indices `first` to `first + layers - 1`, of which the last one is always one."""
    return sorted({first - 1 + math.ceil(layers * part / NUM_STAGES) for part in range(1, NUM_STAGES + 1)})


def _network_config(
    backbone_config: PreTrainedConfig, head: str, id2label: dict[int, str], head_channels: int | None
) -> UperNetConfig | Tipsv2DptConfig:
    shared = {
        "backbone_config": backbone_config,
        "id2label": id2label,
        "label2id": {name: index for index, name in id2label.items()},
    }
    if head == "linear":
        return UperNetConfig(**shared, hidden_size=2 * len(id2label), pool_scales=[], use_auxiliary_head=False)
    width = head_channels or default_width(_last_channels(backbone_config))
    if head == "upernet":
        return UperNetConfig(**shared, hidden_size=width, use_auxiliary_head=False)
    channels = backbone_config.hidden_size
    backbone_config.apply_layernorm, backbone_config.reshape_hidden_states = True, False
    backbone_config.num_register_tokens = getattr(backbone_config, "num_register_tokens", 0)
    necks = [max(1, channels // part) for part in (8, 4, 2, 1)]
    return Tipsv2DptConfig(**shared, neck_hidden_sizes=necks, fusion_hidden_size=head_channels or width // 2)


def default_width(channels: int) -> int:
    """Return the width of a UperNet for a backbone with this number of channels in its last stage.

    It is the largest power of two up to half of the channels, between 64 and 512, and half of that for DPT: 64 for
    DINOv2-S and 128 for DINOv2-B, as in UniMatch V2.
    """
    low, high = WIDTHS
    return min(high, max(low, 2 ** ((channels // 2).bit_length() - 1)))


def _last_channels(config: PreTrainedConfig) -> int:
    if config.model_type == "timm_backbone":
        return timm_feature_info(config.backbone)[config.out_indices[-1]]["num_chs"]
    sizes = getattr(config, "hidden_sizes", None)
    return sizes[-1] if sizes else config.hidden_size


def layer_scales(backbone: nn.Module, decay: float) -> dict[int, float]:
    """Return the factor of the learning rate for each parameter of a backbone, by its id.

    The layers of a plain vision transformer, or the stages of another network, are numbered from the image: 0 for the
    embeddings or the stem, then 1 to L. Layer l has the factor `decay ** (L + 1 - l)`, as in BEiT (Bao et al. 2022)
    and, for stages, in ConvNeXt (Liu et al. 2022). What follows the last layer, like norms, belongs to it.

    Args:
        backbone: a backbone of transformers or timm.
        decay: factor from one layer to the one before it.
    """
    layers: dict[str, int] = {}
    depths = {}
    for name, parameter in backbone.named_parameters():
        found = _LAYER.match(name)
        depths[id(parameter)] = layers.setdefault(found[0], len(layers) + 1) if found else len(layers)
    return {key: decay ** (len(layers) + 1 - depth) for key, depth in depths.items()}


# Like encoder.layer.0, layers_0 or layer1, but not conv1. The norms of single stages come after all layers.
_LAYER = re.compile(r"(?!hidden_states_norms|.*stem).*?([._]|layer|stage)\d+(?=[._])")
