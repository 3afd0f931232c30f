"""The tap that reads features and logits off a network at the resolution of its classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .errors import InputError
from .functional import Affinity, upsample

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MAX_PREFIX_TOKENS = 16  # class and register tokens in front of those of the patches


@dataclass
class OutputWithAuxiliary(SemanticSegmenterOutput):
    """The outputs of a network, with the logits of its auxiliary head, which it keeps to itself."""

    auxiliary_logits: Tensor | None = None


class Reading(NamedTuple):
    """Features and logits of one forward pass, read by [`ClassifierTap`]."""

    features: Tensor
    """`(B, D, h, w)`, the input of the classifier layer."""
    logits: Tensor
    """`(B, C, h, w)`, its output."""
    resize: nn.Upsample | None = None
    """The fixed interpolation that some heads, like that of DPT, apply behind the classifier."""
    auxiliary_logits: Tensor | None = None
    """`(B, C, h', w')`, the output of the auxiliary head, for networks that have one."""
    auxiliary_weight: float = 0.0
    """The weight of the auxiliary head's loss, from the network's config."""


class ClassifierTap:
    """Read features and logits off a segmentation network at the resolution of its classifier.

    The classifier is the convolution or linear layer with `num_labels` outputs that runs last, auxiliary heads aside.
    Its input gives the features, its output the native logits, before any upsampling. That matters: UperNet upsamples
    its logits to the image, and comparing all pairs of those pixels would cost 256 times as much.

    Use the tap as a context manager around the forward pass; it removes its hooks afterwards:

        >>> tap = ClassifierTap(model)
        >>> with tap:
        ...     model(pixel_values)
        >>> features, logits, *_ = tap.read()

    The tap also reads the logits of an auxiliary head, and adds them to the network's outputs
    ([`OutputWithAuxiliary`]), where DDP has to find every tensor that takes part in a loss.

    Args:
        model: any network with `config.num_labels`. Its hooks also fire when it runs inside DDP or `torch.compile`.
        before_dropout: take the features from before the classifier's dropout, if there is one.

    Raises:
        InputError: no layer fits; the message names the layers that were looked at.
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
                f"{type(model).__name__} has no classifier with num_labels={num_labels} outputs. It has "
                f"{len(layers)} convolutions and linear layers; the last ones with their outputs are {last}"
            )
        modules = list(model.modules())
        self._dropouts = [m for m in modules if isinstance(m, nn.Dropout | nn.Dropout2d)] if before_dropout else []
        self._resizes = [m for m in modules if isinstance(m, nn.Upsample)]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._forget()

    def attach(self) -> None:
        """Register the hooks."""
        listeners = [
            (self.layers.values(), self._hear_classifier),
            (self.auxiliary_layers.values(), self._hear_auxiliary),
            (self._dropouts, self._hear_dropout),
            (self._resizes, self._hear_resize),
            ([self.model] if self.auxiliary_layers else [], self._add_to_outputs),
        ]
        self._handles = [layer.register_forward_hook(hear) for layers, hear in listeners for layer in layers]

    def detach(self) -> None:
        """Remove the hooks."""
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
        """Return the features and logits of the last forward pass, once.

        Raises:
            RuntimeError: there was no forward pass since the last reading.
            InputError: the classifier does not work on a grid of positions.
        """
        if self._last is None:
            raise RuntimeError(f"no forward pass ran through {list(self.layers)} while the tap was attached")
        (layer, features, logits), resize, auxiliary = self._last, self._resize, self._auxiliary
        self._forget()
        if isinstance(layer, nn.Linear):  # channels last
            features, logits = features.movedim(-1, 1), logits.movedim(-1, 1)
        if features.ndim != 4 or features.shape[2:] != logits.shape[2:]:
            raise InputError(
                f"the classifier of {type(self.model).__name__} maps {tuple(features.shape)} to "
                f"{tuple(logits.shape)}, but PALS needs a classifier that maps (B, D, h, w) to (B, C, h, w)"
            )
        weight = getattr(self.model.config, "auxiliary_loss_weight", 0.0) if auxiliary is not None else 0.0
        return Reading(features, logits, resize, auxiliary, weight)


def _is_auxiliary(name: str) -> bool:
    return any(part.startswith("aux") for part in name.split("."))


def read_network(
    network: nn.Module, tap: ClassifierTap, inputs: dict[str, Any], affinity: Affinity | None = None
) -> tuple[Reading, Any]:
    """Run a network once.

    Args:
        network: the network, which may be wrapped.
        tap: the tap of the network itself; for `affinity.source="before_dropout"` one that reads there.
        inputs: `pixel_values` and everything else that the network's forward pass takes.
        affinity: its `source` and `encoder_stage` name the features. Default: the classifier's input. For the source
            `logits` they are the classifier's input too, and it is the loss that compares the logits.

    Returns:
        The reading of the tap, with these features, and the network's outputs.

    Raises:
        InputError: the network does not return its hidden states.
    """
    source = "classifier_input" if affinity is None else affinity.source
    try:
        with tap:
            outputs = network(**inputs, **({"output_hidden_states": True} if source == "encoder" else {}))
    except IndexError as error:  # backbones of timm in transformers
        if source != "encoder":
            raise
        raise InputError("affinity source 'encoder': this network does not return its hidden states") from error
    reading = tap.read()
    if source == "encoder":
        features = encoder_features(
            outputs.hidden_states,
            affinity.encoder_stage,
            inputs["pixel_values"].shape[2:],
            reading.logits.shape[2:],
            patch_size_of(tap.model.config),
        )
        reading = reading._replace(features=features)
    return reading, outputs


def encoder_features(
    hidden_states: tuple[Tensor, ...] | None,
    stage: int,
    image_size: tuple[int, int],
    grid: tuple[int, int],
    patch_size: int | None = None,
) -> Tensor:
    """Lay out one of an encoder's hidden states as `(B, D, h, w)` maps on the classifier's grid.

    Args:
        hidden_states: the output of a network with `output_hidden_states=True`: maps `(B, D, h', w')`, or the tokens
            `(B, L, D)` of a vision transformer, where class and register tokens come first.
        stage: index of the hidden state; -1 is the last.
        image_size: (H, W) of the network's input.
        grid: (h, w) of the classifier.
        patch_size: of a vision transformer, see [`patch_size_of`]; later stages may have merged patches.

    Raises:
        InputError: there is no hidden state of this index, or its tokens do not cover the image.
    """
    if hidden_states is None or not -len(hidden_states) <= stage < len(hidden_states):
        raise InputError(f"encoder_stage {stage}: the network has {len(hidden_states or ())} hidden states")
    features = hidden_states[stage]
    if features.ndim == 3:
        features = _tokens_to_maps(features, image_size, patch_size)
    if features.ndim != 4:
        raise InputError(f"encoder_stage {stage} has the shape {tuple(features.shape)}, not (B, D, h, w)")
    return upsample(features, grid)


def patch_size_of(config: PreTrainedConfig) -> int | None:
    """Return the side of a vision transformer's patches, or None for networks without square patches."""
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
    """Refuse networks that do not predict a distribution over classes at every pixel.

    Raises:
        InputError: the model type is not one of `AutoModelForSemanticSegmentation` (Mask2Former and its like predict
            masks, not pixels), or has fewer than two classes.
    """
    if config.model_type and config.model_type not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES:
        raise InputError(
            f"PALS needs a class distribution at every pixel, and {config.model_type!r} models do not predict one. "
            f"Use one of {', '.join(MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES)}"
        )
    if config.num_labels < 2:
        raise InputError(f"PALS needs at least two classes, but the model has num_labels={config.num_labels}")
