"""Models: building one, its image processor, and the tap that finds a network's classifier layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
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
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .errors import InputError, first_line
from .functional import upsample

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel


class ClassifierTap:
    """Reads features and logits off a segmentation network at its classifier's own resolution.

    The classifier is the convolution or linear layer with `num_labels` outputs that runs last, auxiliary heads aside.
    Its input are the features, its output the native logits - before any upsampling the network does behind it, which
    matters: UperNet upsamples to the image, and comparing all pairs of those pixels would cost 256 times as much.

    Use as a context manager around the forward pass; the hooks are gone afterwards:

        >>> tap = ClassifierTap(model)
        >>> with tap:
        ...     model(pixel_values)
        >>> features, logits = tap.read()

    Args:
        model: any network with `config.num_labels`. Its hooks also fire when it runs inside DDP or `torch.compile`.

    Raises:
        InputError: no layer fits; the message says which layers were looked at.
    """

    def __init__(self, model: nn.Module):
        refuse_unsuitable(model.config)
        num_labels = model.config.num_labels
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        self.model = model
        self.layers = {
            name: layer
            for name, layer in layers
            if _outputs(layer) == num_labels and not any(part.startswith("aux") for part in name.split("."))
        }
        if not self.layers:
            last = ", ".join(f"{name} ({_outputs(layer)})" for name, layer in layers[-5:]) or "none"
            raise InputError(
                f"{type(model).__name__} has no classifier with num_labels={num_labels} outputs: looked at "
                f"{len(layers)} convolutions and linear layers, the last of them with their outputs: {last}"
            )
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._last: tuple[nn.Module, Tensor, Tensor] | None = None

    def attach(self) -> None:
        """Start listening."""
        self._handles = [layer.register_forward_hook(self._listen) for layer in self.layers.values()]

    def detach(self) -> None:
        """Stop listening and leave no hook behind."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> ClassifierTap:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _listen(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._last = (layer, inputs[0], output)

    def read(self) -> tuple[Tensor, Tensor]:
        """Features `(B, D, h, w)` and logits `(B, C, h, w)` of the last forward pass, once.

        Raises:
            RuntimeError: there was no forward pass since the last reading.
            InputError: the classifier does not work on a grid of pixels.
        """
        if self._last is None:
            raise RuntimeError(f"no forward pass ran through {list(self.layers)} while the tap was attached")
        (layer, features, logits), self._last = self._last, None
        if isinstance(layer, nn.Linear):  # channels last
            features, logits = features.movedim(-1, 1), logits.movedim(-1, 1)
        if features.ndim != 4 or features.shape[2:] != logits.shape[2:]:
            raise InputError(
                f"{type(self.model).__name__}: its classifier maps {tuple(features.shape)} to {tuple(logits.shape)}, "
                "not one grid (B, D, h, w) to another (B, C, h, w)"
            )
        return features, logits


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


def build_model(name_or_path: str | None, id2label: dict[int, str]) -> PreTrainedModel:
    """A segmentation network for the given classes, in float32 and without auxiliary heads.

    Args:
        name_or_path: a checkpoint on the Hub or in a folder. A head that does not fit the classes is newly made.
            Without one, a small SegFormer (0.7 M parameters) from scratch.
        id2label: class index to name.

    Raises:
        InputError: the checkpoint cannot be loaded, or is no model for PALS.
    """
    label2id = {name: index for index, name in id2label.items()}
    if name_or_path is None:
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
    refuse_unsuitable(config)
    if hasattr(config, "use_auxiliary_head"):
        config.use_auxiliary_head = False
    try:
        return AutoModelForSemanticSegmentation.from_pretrained(
            name_or_path, config=config, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    except (ImportError, OSError, SafetensorError) as error:
        raise InputError(f"cannot load the model {name_or_path!r}: {first_line(error)}") from error


def build_image_processor(name_or_path: str | None, image_size: tuple[int, int] | None = None) -> BaseImageProcessor:
    """The image processor that training, evaluation and, once saved, `pipeline` share.

    Args:
        name_or_path: where the model comes from; its normalisation is kept. Without one, or where the checkpoint
            has none: SegFormer's, with the ImageNet mean and deviation.
        image_size: (height, width) images are resized to; without it they keep their size. What a checkpoint's own
            processor would do to the size - squash, crop, pad - is switched off.
    """
    processor = SegformerImageProcessor()
    if name_or_path is not None:
        # OSError: the checkpoint has no preprocessor_config.json.
        try:
            processor = AutoImageProcessor.from_pretrained(name_or_path)
        except OSError as error:
            if Path(name_or_path, "preprocessor_config.json").exists():
                raise InputError(f"cannot load the image processor of {name_or_path!r}: {error}") from error
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


@torch.inference_mode()
def predict_mask(model: PreTrainedModel, processor: BaseImageProcessor, image: Image.Image) -> Tensor:
    """Class indices `(H, W)` for one picture at its own size, as evaluation and `pipeline` predict them."""
    pixel_values = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"].to(model.device)
    logits = model(pixel_values=pixel_values).logits
    return upsample(logits, (image.height, image.width))[0].argmax(dim=0).cpu()
