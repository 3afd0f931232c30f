"""Models: building one, its image processor, and the tap that finds a network's classifier layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from httpx2 import HTTPError
from huggingface_hub import _CACHED_NO_EXIST, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.utils import IMAGE_PROCESSOR_NAME

from .errors import InputError, first_line
from .functional import upsample

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel


_MAX_PREFIX_TOKENS = 16  # class and register tokens in front of those of the patches
AFFINITY_SOURCES = ("classifier_input", "before_dropout", "encoder", "logits")


@dataclass
class OutputWithAuxiliary(SemanticSegmenterOutput):
    """What a network returns, and what it keeps to itself: the logits of its auxiliary head."""

    auxiliary_logits: Tensor | None = None


class Reading(NamedTuple):
    """What [`ClassifierTap`] read off one forward pass."""

    features: Tensor
    """`(B, D, h, w)`, the input of the classifier layer."""
    logits: Tensor
    """`(B, C, h, w)`, its output."""
    resize: nn.Upsample | None = None
    """The fixed interpolation that the network's head has behind its classifier, if it has one, as DPT does."""
    auxiliary_logits: Tensor | None = None
    """`(B, C, h', w')`, the output of an auxiliary head, if the network has one."""
    auxiliary_weight: float = 0.0
    """What the network weighs the loss of that head with."""

    def at_output(self, maps: Tensor) -> Tensor:
        """Maps on the classifier's grid, brought to the grid of the head's output."""
        return maps if self.resize is None else self.resize(maps)


class ClassifierTap:
    """Reads features and logits off a segmentation network at its classifier's own resolution.

    The classifier is the convolution or linear layer with `num_labels` outputs that runs last, auxiliary heads aside.
    Its input are the features, its output the native logits - before any upsampling the network does behind it, which
    matters: UperNet upsamples to the image, and comparing all pairs of those pixels would cost 256 times as much.

    Use as a context manager around the forward pass; the hooks are gone afterwards:

        >>> tap = ClassifierTap(model)
        >>> with tap:
        ...     model(pixel_values)
        >>> features, logits, *_ = tap.read()

    Logits of an auxiliary head are read too, and put among the network's outputs ([`OutputWithAuxiliary`]): DDP has
    to find there everything that a loss is taken of.

    Args:
        model: any network with `config.num_labels`. Its hooks also fire when it runs inside DDP or `torch.compile`.
        before_dropout: take the features from before the classifier's dropout, if there is one.

    Raises:
        InputError: no layer fits; the message says which layers were looked at.
    """

    def __init__(self, model: nn.Module, before_dropout: bool = False):
        refuse_unsuitable(model.config)
        num_labels = model.config.num_labels
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        fitting = {name: layer for name, layer in layers if _outputs(layer) == num_labels}
        self.model = model
        self.layers = {name: layer for name, layer in fitting.items() if not _is_auxiliary(name)}
        self.auxiliary_layers = {name: layer for name, layer in fitting.items() if _is_auxiliary(name)}
        if not self.layers:
            last = ", ".join(f"{name} ({_outputs(layer)})" for name, layer in layers[-5:]) or "none"
            raise InputError(
                f"{type(model).__name__} has no classifier with num_labels={num_labels} outputs: looked at "
                f"{len(layers)} convolutions and linear layers, the last of them with their outputs: {last}"
            )
        modules = list(model.modules())
        self._dropouts = [m for m in modules if isinstance(m, nn.Dropout | nn.Dropout2d)] if before_dropout else []
        self._resizes = [m for m in modules if isinstance(m, nn.Upsample)]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._forget()

    def attach(self) -> None:
        """Start listening."""
        listeners = [
            (self.layers.values(), self._hear_classifier),
            (self.auxiliary_layers.values(), self._hear_auxiliary),
            (self._dropouts, self._hear_dropout),
            (self._resizes, self._hear_resize),
            ([self.model] if self.auxiliary_layers else [], self._add_to_outputs),
        ]
        self._handles = [layer.register_forward_hook(hear) for layers, hear in listeners for layer in layers]

    def detach(self) -> None:
        """Stop listening and leave no hook behind."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> ClassifierTap:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _forget(self) -> None:
        self._last: tuple[nn.Module, Tensor, Tensor] | None = None
        self._resize: nn.Upsample | None = None
        self._auxiliary: Tensor | None = None
        self._dropped: tuple[Tensor, Tensor] | None = None

    def _hear_classifier(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        features = inputs[0]
        if self._dropped is not None and self._dropped[1] is features:
            features = self._dropped[0]
        self._last, self._resize, self._dropped = (layer, features, output), None, None

    def _hear_dropout(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._dropped = (inputs[0], output)

    def _hear_resize(self, layer: nn.Upsample, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._last is not None and inputs[0] is self._last[2]:
            self._resize = layer

    def _hear_auxiliary(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._auxiliary = output

    def _add_to_outputs(
        self, model: nn.Module, inputs: tuple[Tensor, ...], outputs: SemanticSegmenterOutput
    ) -> OutputWithAuxiliary:
        return OutputWithAuxiliary(**{**outputs, "auxiliary_logits": self._auxiliary})

    def read(self) -> Reading:
        """What the last forward pass gave, once.

        Raises:
            RuntimeError: there was no forward pass since the last reading.
            InputError: the classifier does not work on a grid of pixels.
        """
        if self._last is None:
            raise RuntimeError(f"no forward pass ran through {list(self.layers)} while the tap was attached")
        (layer, features, logits), resize, auxiliary = self._last, self._resize, self._auxiliary
        self._forget()
        if isinstance(layer, nn.Linear):  # channels last
            features, logits = features.movedim(-1, 1), logits.movedim(-1, 1)
        if features.ndim != 4 or features.shape[2:] != logits.shape[2:]:
            raise InputError(
                f"{type(self.model).__name__}: its classifier maps {tuple(features.shape)} to {tuple(logits.shape)}, "
                "not one grid (B, D, h, w) to another (B, C, h, w)"
            )
        weight = getattr(self.model.config, "auxiliary_loss_weight", 0.0) if auxiliary is not None else 0.0
        return Reading(features, logits, resize, auxiliary, weight)


def _is_auxiliary(name: str) -> bool:
    return any(part.startswith("aux") for part in name.split("."))


def read_network(
    network: nn.Module,
    tap: ClassifierTap,
    inputs: dict[str, Any],
    source: str | None = None,
    stage: int = -1,
    patch_size: int | None = None,
) -> tuple[Reading, Any]:
    """Run a network once.

    Args:
        network: what is called, maybe wrapped.
        tap: of the network itself; for the source `before_dropout` one that reads there.
        inputs: `pixel_values` and whatever else its forward pass takes.
        source: which features, one of [`AFFINITY_SOURCES`]. Default: the classifier's input.
        stage, patch_size: of the source `encoder`, see [`encoder_features`].

    Returns:
        What the tap read, with these features, and the network's outputs.

    Raises:
        InputError: the network does not give its hidden states.
    """
    try:
        with tap:
            outputs = network(**inputs, **({"output_hidden_states": True} if source == "encoder" else {}))
    except IndexError as error:  # backbones of timm in transformers
        if source != "encoder":
            raise
        raise InputError("affinity_source 'encoder': this network does not give its hidden states") from error
    reading = tap.read()
    if source == "logits":
        reading = reading._replace(features=reading.logits)
    elif source == "encoder":
        size, grid = inputs["pixel_values"].shape[2:], reading.logits.shape[2:]
        reading = reading._replace(features=encoder_features(outputs.hidden_states, stage, size, grid, patch_size))
    return reading, outputs


def encoder_features(
    hidden_states: tuple[Tensor, ...] | None,
    stage: int,
    image_size: tuple[int, int],
    grid: tuple[int, int],
    patch_size: int | None = None,
) -> Tensor:
    """One of an encoder's hidden states as `(B, D, h, w)` maps on the classifier's grid.

    Args:
        hidden_states: what a network gives with `output_hidden_states=True`: maps `(B, D, h', w')`, or the tokens
            `(B, L, D)` of a vision transformer, where class and register tokens come first.
        stage: index into them; -1 is the last.
        image_size: (H, W) of the network's input.
        grid: (h, w) of the classifier.
        patch_size: of a vision transformer, see [`patch_size_of`]; later stages may have merged patches.

    Raises:
        InputError: there is no such stage, or it cannot be laid out on the image.
    """
    if hidden_states is None or not -len(hidden_states) <= stage < len(hidden_states):
        raise InputError(f"encoder_stage {stage}: the network has {len(hidden_states or ())} hidden states")
    features = hidden_states[stage]
    if features.ndim == 3:
        features = _tokens_to_maps(features, image_size, patch_size)
    if features.ndim != 4:
        raise InputError(f"encoder_stage {stage} is {tuple(features.shape)}, no map of features (B, D, h, w)")
    return upsample(features, grid)


def patch_size_of(config: PreTrainedConfig) -> int | None:
    """The side of a vision transformer's patches, if the network or its backbone has any that are square."""
    for part in (config, getattr(config, "backbone_config", None)):
        size = getattr(part, "patch_size", None)
        if isinstance(size, list | tuple) and len(set(size)) == 1:
            size = size[0]
        if isinstance(size, int):
            return size
    return None


def _tokens_to_maps(tokens: Tensor, image_size: tuple[int, int], patch_size: int | None) -> Tensor:
    length, grids = tokens.shape[1], []
    for merged in (1, 2, 4, 8) if patch_size else ():
        sides = [n / (patch_size * merged) for n in image_size]
        grids += [[math.floor(n) for n in sides], [math.ceil(n) for n in sides]]
    grids.sort(key=lambda grid: grid[0] * grid[1] != length)  # stable: those that fit without other tokens first
    for height, width in grids:
        if 0 <= length - height * width <= _MAX_PREFIX_TOKENS:
            return tokens[:, length - height * width :].transpose(1, 2).unflatten(2, (height, width))
    raise InputError(
        f"{length} tokens do not cover an image of {image_size[0]}x{image_size[1]} in patches of {patch_size} pixels"
    )


def _outputs(layer: nn.Conv2d | nn.Linear) -> int:
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def refuse_unsuitable(config: PreTrainedConfig) -> None:
    """Refuse, by name, networks that have no distribution over classes at every pixel.

    Raises:
        InputError: the model type is not one of `AutoModelForSemanticSegmentation` (Mask2Former and its like predict
            masks, not pixels), or has fewer than two classes.
    """
    if config.model_type and config.model_type not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES:
        raise InputError(
            f"PALS needs a class distribution at every pixel, which {config.model_type!r} models do not give; "
            f"use one of {', '.join(MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES)}"
        )
    if config.num_labels < 2:
        raise InputError(f"PALS needs at least two classes, the model has num_labels={config.num_labels}")


def build_model(
    name_or_path: str | None, id2label: dict[int, str], output_stride: int | None = None, from_scratch: bool = False
) -> PreTrainedModel:
    """A segmentation network for the given classes, in float32 and without auxiliary heads.

    Args:
        name_or_path: a checkpoint on the Hub or in a folder. A head that does not fit the classes is newly made.
            Without one, a small SegFormer (0.7 M parameters) from scratch.
        id2label: class index to name.
        output_stride: 8, 16 or 32, for networks with a choice (MobileNetV2, MobileViT): 8 and 16 are DeepLab's.
        from_scratch: draw all weights new; of `name_or_path` only its `config.json` is read.

    Raises:
        InputError: the checkpoint cannot be loaded, is no model for PALS, or has no output stride to choose.
    """
    label2id = {name: index for index, name in id2label.items()}
    if name_or_path is None:
        if output_stride is not None:
            raise InputError(f"output_stride {output_stride}: SegFormer has none to choose")
        config = SegformerConfig(
            depths=[2, 2, 2, 2],
            hidden_sizes=[16, 32, 64, 128],
            decoder_hidden_size=128,
            id2label=id2label,
            label2id=label2id,
        )
        return SegformerForSemanticSegmentation(config)
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the model {name_or_path!r}: {first_line(error)}") from error
    config.id2label, config.label2id = id2label, label2id
    if from_scratch:  # not where the weights are from
        config.name_or_path, config._commit_hash = "", None
    refuse_unsuitable(config)
    if output_stride is not None:
        if not hasattr(config, "output_stride"):
            raise InputError(f"output_stride {output_stride}: {config.model_type} has none to choose")
        if output_stride not in (8, 16, 32):
            raise InputError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        config.output_stride = output_stride
    if hasattr(config, "use_auxiliary_head"):
        config.use_auxiliary_head = False
    if from_scratch:
        model = AutoModelForSemanticSegmentation.from_config(config, dtype=torch.float32)
        *_, classifier = ClassifierTap(model).layers  # others may happen to have as many outputs
        _start_new_classifier(model, {f"{classifier}.weight"})
        return model
    try:
        model, info = AutoModelForSemanticSegmentation.from_pretrained(
            name_or_path,
            config=config,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (ImportError, OSError, SafetensorError) as error:
        raise InputError(f"cannot load the model {name_or_path!r}: {first_line(error)}") from error
    _start_new_classifier(model, info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]})
    return model


def _start_new_classifier(model: PreTrainedModel, new_parameters: set[str]) -> None:
    """Initialise a newly made classifier by its fan-in, as torch does.

    transformers draws all weights with deviation 0.02. For a head of 64 channels that is so small that a short
    training does not get it to grow: UperNet's loss after 40 steps is 0.95, and 0.6 from torch's initialisation.
    """
    for name, layer in ClassifierTap(model).layers.items():
        if f"{name}.weight" in new_parameters:
            layer.reset_parameters()


def build_image_processor(name_or_path: str | None, image_size: tuple[int, int] | None = None) -> BaseImageProcessor:
    """The image processor that training, evaluation and, once saved, `pipeline` share.

    Args:
        name_or_path: where the model comes from; its normalisation is kept. Without one, or where the checkpoint
            is known to have none: SegFormer's, with the ImageNet mean and deviation.
        image_size: (height, width) images are resized to; without it they keep their size. What a checkpoint's own
            processor would do to the size - squash, crop, pad - is switched off.

    Raises:
        InputError: the checkpoint's image processor cannot be loaded, or cannot do without changing the size.
    """
    processor = SegformerImageProcessor()
    if name_or_path is not None:
        try:
            processor = AutoImageProcessor.from_pretrained(name_or_path)
        except OSError as error:  # also where there is none
            if not _has_no_processor(name_or_path):
                raise InputError(
                    f"cannot load the image processor of {name_or_path!r}: {first_line(error)}{_remedy(name_or_path)}"
                ) from error
    processor.do_resize = image_size is not None
    if image_size is not None:
        processor.size = type(processor)(size={"height": image_size[0], "width": image_size[1]}).size
    for option in ("do_center_crop", "do_pad", "do_reduce_labels", "keep_aspect_ratio"):
        if getattr(processor, option, None):
            setattr(processor, option, False)
    if getattr(processor, "ensure_multiple_of", None):
        processor.ensure_multiple_of = 1
    _check_size(processor, image_size)
    return processor


def _has_no_processor(name_or_path: str) -> bool:
    """Whether this is known of a checkpoint, which it is not where the Hub is out of reach or fails."""
    if Path(name_or_path).is_dir():
        return not Path(name_or_path, IMAGE_PROCESSOR_NAME).exists()
    try:
        if try_to_load_from_cache(name_or_path, IMAGE_PROCESSOR_NAME) is _CACHED_NO_EXIST:
            return True
        get_hf_file_metadata(hf_hub_url(name_or_path, IMAGE_PROCESSOR_NAME))
    except (HTTPError, OSError, ValueError) as error:
        return isinstance(error, RemoteEntryNotFoundError)
    return False


def _remedy(name_or_path: str) -> str:
    if Path(name_or_path).is_dir():
        return ""
    download = f"`hf download {name_or_path} {IMAGE_PROCESSOR_NAME}`"
    return f"; where the Hub can be reached, {download} fetches it, or notes that there is none"


def _check_size(processor: BaseImageProcessor, image_size: tuple[int, int] | None) -> None:
    """Try the processor on a picture: some have ways of their own to change its size."""
    height, width = 40, 72
    name = type(processor).__name__
    try:
        made = processor(images=Image.new("RGB", (width, height)), return_tensors="pt")["pixel_values"].shape[2:]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{name} cannot resize to image_size {image_size}: {error}") from error
    wanted = (height, width) if image_size is None else tuple(image_size)
    if tuple(made) != wanted:
        raise InputError(f"{name} makes a {height}x{width} image {made[0]}x{made[1]}, not {wanted[0]}x{wanted[1]}")


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The pretrained part of a segmentation network; everything else is its head.

    Raises:
        InputError: the model names no backbone.
    """
    for name in (model.base_model_prefix, "backbone"):
        if name and isinstance(getattr(model, name, None), nn.Module):
            return getattr(model, name)
    raise InputError(f"{type(model).__name__} has no backbone that could be told from its head")
