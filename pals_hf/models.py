"""Build a segmentation model and its image processor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from httpx2 import HTTPError
from huggingface_hub import _CACHED_NO_EXIST, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME, logging

from .backbones import HEADS, build_around_backbone, is_backbone
from .data.pictures import RGB
from .data.scaling import ATTRIBUTE, Scaling, channels_of
from .data.transforms import process
from .errors import InputError
from .pretrained import (
    blank_picture,
    channels_of_network,
    load_config,
    load_network,
    load_processor,
    new_network,
    timm_normalisation,
    with_channels,
)
from .tap import ClassifierTap, refuse_unsuitable

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

logger = logging.get_logger(__name__)


def build_model(
    name_or_path: str | None,
    id2label: dict[int, str],
    output_stride: int | None = None,
    from_scratch: bool = False,
    channels: int = RGB,
    head: str | None = None,
    head_channels: int | None = None,
) -> PreTrainedModel:
    """Build a segmentation network for the given classes, in float32 and without auxiliary heads.

    Args:
        name_or_path: a checkpoint on the Hub or in a folder. A head of the same classes is kept, and its outputs are
            put into the order of `id2label` by their names. Any other head is replaced by a new one. A bare backbone
            of transformers or timm gets a new head. Default: a small SegFormer (0.7 M parameters) with random weights.
        id2label: class index to name.
        output_stride: 8, 16 or 32, for MobileNetV2 and MobileViT. DeepLab uses 8 and 16.
        from_scratch: draw all weights at random, and read only `config.json` of `name_or_path`.
        channels: number of channels of the images. The first layer of a checkpoint for RGB is adapted, see
            [`adapt_kernel`].
        head: "upernet", "linear" or "dpt": use only the backbone of the checkpoint, and build a new head on it, see
            [`build_around_backbone`]. Default: the checkpoint's own kind of head, and "upernet" for a bare backbone.
        head_channels: width of the new head. Default: a width that suits the backbone.

    Raises:
        InputError: the checkpoint cannot be loaded or is no model for PALS, its output stride or its number of
            channels cannot be chosen, or the head does not fit the backbone.
    """
    label2id = {name: index for index, name in id2label.items()}
    if head not in (None, *HEADS):
        raise InputError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    if name_or_path is None:
        if head is not None or head_channels is not None:
            raise InputError("head and head_channels need a backbone: name it by model_name_or_path")
        if output_stride is not None:
            raise InputError(f"output_stride {output_stride} cannot be chosen for the default network, a SegFormer")
        config = SegformerConfig(
            depths=[2, 2, 2, 2],
            hidden_sizes=[16, 32, 64, 128],
            decoder_hidden_size=128,
            id2label=id2label,
            label2id=label2id,
            num_channels=channels,
        )
        return SegformerForSemanticSegmentation(config)
    config = load_config(name_or_path)
    if head is not None or is_backbone(config):
        if output_stride is not None:
            raise InputError(f"output_stride {output_stride} cannot be chosen for {name_or_path} with a new head")
        model = build_around_backbone(name_or_path, config, head or "upernet", id2label, head_channels, from_scratch)
        if channels != RGB:
            if head == "linear":
                raise InputError(f"head linear is for {RGB} channels, but channels is {channels}. Use head upernet")
            model = _adapt_to_channels(name_or_path, model, channels)
        _start_new_classifier(model, {f"{classifier_of(model)[0]}.weight"})
        return model
    if head_channels is not None:
        raise InputError(f"head_channels needs a new head, but {name_or_path} has one. Choose a head, or leave it out")
    names = config.id2label
    config.id2label, config.label2id = id2label, label2id
    if from_scratch:  # not where the weights are from
        config.name_or_path, config._commit_hash = "", None
    refuse_unsuitable(config)
    if output_stride is not None:
        if not hasattr(config, "output_stride"):
            raise InputError(f"output_stride {output_stride} cannot be chosen for {config.model_type}")
        if output_stride not in (8, 16, 32):
            raise InputError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        config.output_stride = output_stride
    if hasattr(config, "calibration_temperature"):
        del config.calibration_temperature  # training ends what a calibration has done
    if hasattr(config, "use_auxiliary_head"):
        config.use_auxiliary_head = False
    given = channels_of_network(config) or RGB
    if channels != given and given != RGB and not from_scratch:
        raise InputError(
            f"{name_or_path} takes images of {given} channels, but channels is {channels}. Use --channels {given}, or "
            "a checkpoint for RGB images."
        )
    if from_scratch:
        model = new_network(name_or_path, with_channels(config, channels))
        _start_new_classifier(model, {f"{classifier_of(model)[0]}.weight"})
        return model
    model, info = load_network(name_or_path, config, dtype=torch.float32)
    if channels != given:
        model = _adapt_to_channels(name_or_path, model, channels)
    new = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}
    classifier = f"{classifier_of(model)[0]}.weight"
    if classifier not in new and not match_classes(model, names, id2label):
        if all(name == f"LABEL_{index}" for index, name in names.items()):
            logger.warning("%s does not name its classes. Its head is kept, in the order of the data.", name_or_path)
        else:
            other = f"{name_or_path} has a head for other classes ({listed(names)})"
            logger.warning("%s. The training starts with a new head.", other)
            new.add(classifier)
    _start_new_classifier(model, new)
    return model


def _adapt_to_channels(name_or_path: str, model: PreTrainedModel, channels: int) -> PreTrainedModel:
    """Return the same network for images of another number of channels than RGB."""
    adapted = new_network(name_or_path, with_channels(model.config, channels)).eval()
    weights = model.state_dict()
    for name, weight in adapted.state_dict().items():
        if weight.shape != weights[name].shape:
            weights[name] = adapt_kernel(weights[name], channels)
    adapted.load_state_dict(weights)
    return adapted


def adapt_kernel(kernel: Tensor, channels: int) -> Tensor:
    """Return the kernel of a convolution of RGB for another number of channels, by the rule of timm.

    For one channel the kernels of the three colours are added up. For more, they repeat - R, G, B, R, ... - and are
    multiplied by 3 / `channels`, so that the layer's output keeps its scale.

    Args:
        kernel: `(out, 3, h, w)`.
        channels: number of channels.

    Returns:
        `(out, channels, h, w)`.
    """
    if channels == 1:
        return kernel.sum(dim=1, keepdim=True)
    return kernel[:, torch.arange(channels) % RGB] * (RGB / channels)


def match_classes(model: PreTrainedModel, names: dict[int, str], id2label: dict[int, str]) -> bool:
    """Put the outputs of a network into the order of a data set's classes, which are matched by name.

    Args:
        model: the network. Its classifier and `config.id2label` are changed, if the classes are the same.
        names: the class of each output of the network. Blanks around a name do not count.
        id2label: the classes of the data set.

    Returns:
        Whether the classes are the same, in whatever order.
    """
    given, wanted = ([names[index].strip() for index in sorted(names)] for names in (names, id2label))
    if given != wanted:
        if len(set(given)) < len(given) or set(given) != set(wanted):
            return False
        order = [given.index(name) for name in wanted]
        _, layer = classifier_of(model)
        with torch.no_grad():
            for parameter in layer.parameters(recurse=False):
                parameter.copy_(parameter[order])
    model.config.id2label, model.config.label2id = dict(id2label), {name: index for index, name in id2label.items()}
    return True


def refuse_other_classes(checkpoint: str, model: PreTrainedModel, id2label: dict[int, str]) -> None:
    """Match the classes of a trained network to those of a data set ([`match_classes`]).

    Raises:
        InputError: the classes differ; the message lists both.
    """
    names = model.config.id2label
    if not match_classes(model, names, id2label):
        raise InputError(
            f"{checkpoint} predicts the classes {listed(names)}, but the data set has {listed(id2label)}. Choose a "
            "checkpoint of the same classes, or name the classes of the data set alike."
        )


def listed(names: dict[int, str]) -> str:
    """Return the classes with their indices, for a message."""
    return ", ".join(f"{index}: {names[index]}" for index in sorted(names))


def classifier_of(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Return the name and the layer of the classifier. Layers before it may happen to have as many outputs."""
    *_, classifier = ClassifierTap(model).layers.items()
    return classifier


def _start_new_classifier(model: PreTrainedModel, new_parameters: set[str]) -> None:
    """Initialise a new classifier by its fan-in, as torch does.

    transformers draws all weights with a standard deviation of 0.02. For a head of 64 channels these weights are too
    small to grow in a short training: the loss of UperNet after 40 steps is 0.95, and 0.6 with torch's initialisation.
    """
    for name, layer in ClassifierTap(model).layers.items():
        if f"{name}.weight" in new_parameters:
            layer.reset_parameters()


def build_image_processor(
    name_or_path: str | None, image_size: tuple[int, int] | None = None, scaling: Scaling | None = None
) -> BaseImageProcessor:
    """Build the image processor that training, evaluation and, once saved, `pipeline` share.

    Args:
        name_or_path: the model's checkpoint, whose normalisation is kept. Default, and for checkpoints that have no
            image processor: that of SegFormer, with the mean and deviation of ImageNet. It also stands in for image
            processors that cannot serve `pipeline("image-segmentation")`, with their normalisation.
        image_size: (height, width) that images are resized to. Default: images keep their size. Resizing, cropping
            and padding by the checkpoint's own processor are switched off.
        scaling: how the model reads deep pictures, which the image processor keeps, see [`data.scale_pictures`]. For
            other than 3 channels, the means and deviations of RGB repeat, or are averaged for one channel.

    Raises:
        InputError: the checkpoint's image processor cannot be loaded, or cannot do without changing the size.
    """
    processor = SegformerImageProcessor()
    if name_or_path is not None:
        try:
            processor = load_processor(name_or_path)
        except InputError as error:
            if not (isinstance(error.__cause__, OSError) and _has_no_processor(name_or_path)):
                raise InputError(f"{error}{_remedy(name_or_path)}") from error
            processor = _processor_of_timm(name_or_path) or processor
    if not hasattr(processor, "post_process_semantic_segmentation"):
        processor = _with_normalisation_of(processor)
    processor.do_resize = image_size is not None
    if image_size is not None:
        processor.size = type(processor)(size={"height": image_size[0], "width": image_size[1]}).size
    for option in ("do_center_crop", "do_pad", "do_reduce_labels", "keep_aspect_ratio"):
        if getattr(processor, option, None):
            setattr(processor, option, False)
    if getattr(processor, "ensure_multiple_of", None):
        processor.ensure_multiple_of = 1
    if scaling is None:
        vars(processor).pop(ATTRIBUTE, None)
    else:
        scaling.keep_in(processor)
    _normalise_channels(processor, RGB if scaling is None else scaling.channels)
    _check_size(processor, image_size)
    return processor


def _normalise_channels(processor: BaseImageProcessor, channels: int) -> None:
    """Give an image processor a mean and a deviation for each channel, by the rule of [`adapt_kernel`]."""
    for name in ("image_mean", "image_std"):
        given = getattr(processor, name, None)
        if given is not None and len(given) != channels:
            one = [sum(given) / len(given)]
            setattr(processor, name, one if channels == 1 else [given[index % RGB] for index in range(channels)])
    if channels != RGB:
        for option in ("do_convert_rgb", "do_flip_channel_order"):  # of RGB only
            if getattr(processor, option, None):
                setattr(processor, option, False)


def _with_normalisation_of(other: BaseImageProcessor) -> SegformerImageProcessor:
    """Return an image processor for segmentation with the normalisation of one for another task, or of timm's."""
    timm = getattr(other, "data_config", None)
    if timm is not None:
        return SegformerImageProcessor(image_mean=timm["mean"], image_std=timm["std"])
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample")
    return SegformerImageProcessor(**{name: getattr(other, name) for name in names if hasattr(other, name)})


def _processor_of_timm(name_or_path: str) -> SegformerImageProcessor | None:
    """Return an image processor with the normalisation that timm knows for a backbone of its own, if it is one."""
    config = load_config(name_or_path)
    config = getattr(config, "backbone_config", None) or config
    if config.model_type != "timm_backbone":
        return None
    mean, std = timm_normalisation(config.backbone)
    return SegformerImageProcessor(image_mean=mean, image_std=std)


def _has_no_processor(name_or_path: str) -> bool:
    """Tell whether a checkpoint has no image processor. False if the Hub cannot be reached to find out."""
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
    if Path(name_or_path).exists():
        return ""
    download = f"`hf download {name_or_path} {IMAGE_PROCESSOR_NAME}`"
    return f". On a machine that reaches the Hub, {download} fetches the file, or records that it does not exist"


def _check_size(processor: BaseImageProcessor, image_size: tuple[int, int] | None) -> None:
    """Try the processor on a picture, because some processors change its size in ways of their own."""
    height, width = 40, 72
    name = type(processor).__name__
    try:
        made = process(processor, blank_picture(channels_of(processor), height, width)).shape[2:]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{name} cannot resize to image_size {image_size}: {error}") from error
    wanted = (height, width) if image_size is None else tuple(image_size)
    if tuple(made) != wanted:
        raise InputError(f"{name} makes a {height}x{width} image {made[0]}x{made[1]}, not {wanted[0]}x{wanted[1]}")


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """Return the pretrained part of a segmentation network. Everything else is its head.

    Raises:
        InputError: the model names no backbone.
    """
    for name in (model.base_model_prefix, "backbone"):
        if name and isinstance(getattr(model, name, None), nn.Module):
            return getattr(model, name)
    raise InputError(f"the backbone of {type(model).__name__} cannot be told from its head")
