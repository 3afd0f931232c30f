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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation, PreTrainedConfig

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
