"""Load the models of others: code that comes with them is never run, and damaged files end in one line.

These functions are the only ones that call the Auto classes of transformers.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    TimmBackboneConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME, cached_file, is_timm_available

from .data.pictures import RGB
from .data.scaling import ATTRIBUTE, channels_of
from .data.transforms import process
from .errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

# Larger numbers are damage or an attack. They would fill the memory before transformers raises an error.
_MAX_LAYERS = 2_000
_MAX_NUMBER = 2**20  # of a config: channels, classes, ...
_MAX_SIDE = 2**12  # of an image processor: the height of its images, ...
_EXPLAINED = (ImportError, OSError, RuntimeError, ValueError)  # errors whose message stands alone


@contextmanager
def loading(failure: str, remedy: str = "") -> Iterator[None]:
    """Turn every error of the block, in which libraries read files of others, into one line.

    Args:
        failure: the beginning of the message, which says what cannot be loaded.
        remedy: the end of the message.

    Raises:
        InputError: the block raised an error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # damaged files make transformers, torch, pickle and safetensors raise any type
        raise InputError(f"{failure}: {_reason(error)}{remedy and f'. {remedy}'}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # its own message tells to switch the protection off
        return "a pickled file is damaged, or contains code, which pals_hf never runs"
    if isinstance(error, RecursionError):
        return "a file of it is nested too deeply"
    if "custom code" in str(error):
        return _CUSTOM_CODE
    if isinstance(error, _EXPLAINED):
        return first_line(error)
    return f"its files do not fit together ({type(error).__name__}: {first_line(error)})"


_CUSTOM_CODE = "it needs custom code (`auto_map`), which pals_hf never runs. Choose another model."


def load_config(name_or_path: str) -> PreTrainedConfig:
    """Load the config of a model from a folder or the Hub.

    Raises:
        InputError: the config cannot be loaded, needs custom code, or describes a network of absurd size.
    """
    with loading(_failure("the model", name_or_path)):
        raw, _ = PreTrainedConfig.get_config_dict(name_or_path)
        _refuse_hostile(raw, _MAX_NUMBER)  # before transformers acts on it
        if (layers := _number_of_layers(raw)) > _MAX_LAYERS:
            raise ValueError(f"its config has {layers} layers, but at most {_MAX_LAYERS} are supported")
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)


def load_network(name_or_path: str, config: PreTrainedConfig, **options: Any) -> tuple[PreTrainedModel, dict]:
    """Load a segmentation network.

    Args:
        name_or_path: a folder, or a name on the Hub.
        config: the result of [`load_config`], which may have been changed.
        options: arguments of `from_pretrained`.

    Returns:
        The network, and which weights are missing or have another shape.

    Raises:
        InputError: the network cannot be loaded.
    """
    with loading(_failure("the model", name_or_path)):
        _refuse_too_large(config)
        network, info = AutoModelForSemanticSegmentation.from_pretrained(
            name_or_path,
            config=config,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
        _refuse_other_layers(network, info)
    return network, info


def new_network(name_or_path: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Build a segmentation network with random weights from the config of `name_or_path`.

    Raises:
        InputError: the config describes no network.
    """
    with loading(_failure("the model", name_or_path)):
        _refuse_too_large(config)
        return AutoModelForSemanticSegmentation.from_config(config, trust_remote_code=False, dtype=torch.float32)


def load_backbone(name_or_path: str, config: PreTrainedConfig, backbone_config: PreTrainedConfig) -> nn.Module:
    """Load a backbone with its weights, in float32.

    Args:
        name_or_path: a folder, or a name on the Hub, with a backbone or a network around it.
        config: the result of [`load_config`].
        backbone_config: the config of the backbone, with the stages that it returns.

    Raises:
        InputError: the weights cannot be loaded, or some of the backbone's are missing.
    """
    with loading(_failure("the model", name_or_path)):
        if config.model_type.startswith("timm") or hasattr(config, "backbone_config"):
            backbone = AutoBackbone.from_config(backbone_config, trust_remote_code=False, dtype=torch.float32)
            weights = _weights_of_backbone(name_or_path, config, backbone_config)
            missing = backbone.load_state_dict(weights, strict=False).missing_keys
        else:  # the class itself, because AutoBackbone asks the Hub for a folder, too
            backbone, info = MODEL_FOR_BACKBONE_MAPPING[type(backbone_config)].from_pretrained(
                name_or_path, config=backbone_config, dtype=torch.float32, output_loading_info=True
            )
            _refuse_other_layers(backbone, info)
            missing = info["missing_keys"]
        # The norms of single stages are new.
        if other := sorted(name for name in missing if "norm" not in name):
            raise ValueError(f"it has no weights for {other[0]} and {len(other) - 1} other parameters of the backbone")
    return backbone


def _weights_of_backbone(
    name_or_path: str, config: PreTrainedConfig, backbone_config: PreTrainedConfig
) -> dict[str, Tensor]:
    """Read the weights of a backbone from a segmentation network around it, or from a model of timm."""
    if hasattr(config, "backbone_config"):
        network, info = load_network(name_or_path, config, dtype=torch.float32)
        weights = network.backbone.state_dict().items()
        return {name: tensor for name, tensor in weights if f"backbone.{name}" not in info["missing_keys"]}
    weights = _read_weights(name_or_path)
    return weights if config.model_type == "timm_backbone" else _weights_of_features(weights, backbone_config)


def timm_backbone_config(name_or_path: str, config: PreTrainedConfig) -> TimmBackboneConfig:
    """Return the config of a backbone of timm, for the config of a model of timm or of such a backbone.

    Raises:
        InputError: timm is not installed or does not know the architecture, or the model has arguments of its own.
    """
    if not is_timm_available():
        raise InputError(f"{name_or_path} is a model of timm. Install timm: pip install 'pals_hf[timm]'")
    with loading(_failure("the model", name_or_path)):
        if config.model_type == "timm_backbone":
            timm_feature_info(config.backbone)
            return config
        timm_feature_info(config.architecture)
        usual = {"in_chans": 3, "img_size": list(timm_image_size(config.architecture))}
    for name, value in (config.model_args or {}).items():
        if name not in ("num_classes", "global_pool") and usual.get(name) != value:
            raise InputError(
                f"{name_or_path} has the model_args {name}={value} in its config.json, which a backbone of timm in "
                "transformers cannot have. Use another model."
            )
    return TimmBackboneConfig(backbone=config.architecture, use_pretrained_backbone=False)


@cache
def timm_feature_info(architecture: str) -> list[dict[str, Any]]:
    """Return the stages of a model of timm: `num_chs` channels, and `reduction`, the stride."""
    import timm

    if not timm.is_model(architecture):  # timm would load other names from the Hub or a folder
        raise ValueError(f"timm has no architecture {architecture!r}")
    with torch.device("meta"):
        return timm.create_model(architecture, features_only=True).feature_info.info


def timm_normalisation(architecture: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of the images that a model of timm was trained on."""
    data = _timm_data(architecture)
    return data["mean"], data["std"]


def timm_image_size(architecture: str) -> tuple[int, int]:
    """Return (height, width) of the images that a model of timm was trained on."""
    return tuple(_timm_data(architecture)["input_size"][1:])


def _timm_data(architecture: str) -> dict[str, Any]:
    import timm

    return timm.data.resolve_data_config(timm.get_pretrained_cfg(architecture).to_dict())


def _read_weights(name_or_path: str) -> dict[str, Tensor]:
    path = cached_file(name_or_path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if path is not None:
        return load_file(path)
    return torch.load(cached_file(name_or_path, WEIGHTS_NAME), map_location="cpu", weights_only=True)


def _weights_of_features(weights: dict[str, Tensor], config: TimmBackboneConfig) -> dict[str, Tensor]:
    """Let timm convert the weights of a whole model to those of the backbone, where layers have other names."""
    import timm

    # transformers saves the models of timm in a wrapper.
    given = {name.removeprefix("timm_model."): tensor for name, tensor in weights.items()}
    options = {"features_only": True, "out_indices": config.out_indices}
    model = timm.create_model(
        config.backbone, pretrained=True, pretrained_cfg_overlay={"state_dict": given}, **options
    )
    return {f"_backbone.{name}": tensor for name, tensor in model.state_dict().items()}


def load_processor(name_or_path: str, what: str = "the image processor of") -> BaseImageProcessor:
    """Load an image processor, and try it on a small picture.

    Args:
        name_or_path: a folder, or a name on the Hub.
        what: what is loaded, for the error message.

    Raises:
        InputError: the image processor cannot be loaded or used. The error's cause is an `OSError` if there is none.
    """
    with loading(_failure(what, name_or_path)):
        processor = AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False)
        _refuse_hostile({name: value for name, value in processor.to_dict().items() if name != ATTRIBUTE}, _MAX_SIDE)
        process(processor, blank_picture(channels_of(processor), 40, 72))
    return processor


def blank_picture(channels: int, height: int, width: int) -> Image.Image | np.ndarray:
    """Return a black picture as an image processor takes it."""
    if channels == RGB:
        return Image.new("RGB", (width, height))
    return np.zeros((height, width, channels), dtype=np.uint8)


def channels_of_network(config: PreTrainedConfig) -> int | None:
    """Return the number of channels of the images that a network takes, or None if its config does not say."""
    counts = (getattr(part, "num_channels", None) for part in (config, *_parts_of(config)))
    return next((count for count in counts if isinstance(count, int)), None)


def with_channels(config: PreTrainedConfig, channels: int) -> PreTrainedConfig:
    """Return a copy of a config for images of another number of channels.

    Raises:
        InputError: the config does not say how many channels its network takes.
    """
    config = copy.deepcopy(config)
    counted = [part for part in (config, *_parts_of(config)) if getattr(part, "num_channels", None) is not None]
    for part in counted:
        part.num_channels = channels
    if channels != RGB and not counted:
        raise InputError(f"{config.model_type} takes images of {RGB} channels only, but channels is {channels}")
    return config


def _parts_of(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    return [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]


def _failure(what: str, name_or_path: str) -> str:
    try:
        is_here = Path(name_or_path).exists()
    except (OSError, ValueError):  # the name is no path
        is_here = False
    return f"cannot load {what} {name_or_path!r}" + ("" if is_here else ": there is no such folder, and the Hub gives")


def _refuse_hostile(value: Any, largest: int, name: str = "") -> None:
    """Refuse a config that asks for custom code, also in a part of it, or that holds a number above `largest`."""
    if isinstance(value, dict):
        if value.get("auto_map"):
            raise ValueError(_CUSTOM_CODE)
        for key, part in value.items():
            _refuse_hostile(part, largest, str(key))
    elif isinstance(value, list | tuple):
        for part in value:
            _refuse_hostile(part, largest, name)
    elif isinstance(value, int | float) and abs(value) > largest:
        raise ValueError(f"{name} is {value:g}, but numbers above {largest} are not supported")


def _number_of_layers(value: Any, name: str = "") -> int:
    """Add up all numbers of layers in a config. Each layer costs time and memory even before it has weights."""
    if isinstance(value, dict):
        return sum(_number_of_layers(part, str(key)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return sum(_number_of_layers(part, name) for part in value)
    if not isinstance(value, int) or isinstance(value, bool) or not re.search(r"depths|layers$|blocks$", name):
        return 0
    if value < (name == "depths"):
        raise ValueError(f"{name} must not be {value}")
    return value


def _refuse_too_large(config: PreTrainedConfig) -> None:
    """Build the network without memory for its weights, and refuse one that the machine cannot hold."""
    with torch.device("meta"):
        network = AutoModelForSemanticSegmentation.from_config(config, trust_remote_code=False)
    needed = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ValueError(
            f"its weights need {needed / 2**30:.1f} GiB, but this machine has {memory / 2**30:.1f} GiB of memory"
        )


def _refuse_other_layers(network: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse weights of another number or size of layers than the config describes.

    A head may be missing, and is replaced if its size does not fit. Other layers would be dropped, or be random.
    """
    missing, mismatched = set(info["missing_keys"]), {name for name, *_ in info["mismatched_keys"]}
    kinds = {_kind(name) for name in network.state_dict().keys() - missing}
    for what, names in (("more", missing), ("fewer", info["unexpected_keys"])):
        if other := sorted(name for name in names if _kind(name) != name and _kind(name) in kinds):
            raise ValueError(f"its config has {what} layers than its weights, see {other[0]}")
    if other := sorted(name for name in mismatched if name.startswith((f"{network.base_model_prefix}.", "backbone."))):
        raise ValueError(f"its config and its weights differ in the size of {other[0]}")


def _kind(name: str) -> str:
    """Return the name of a weight without the numbers of its layers."""
    return re.sub(r"\d+", "#", name)
