"""Make pictures of 8 bits of deep ones, by percentiles of the training images that are kept with the model.

For each band, with `low` and `high` the percentiles 0.1 and 99.9 of its values in the training images:

    round(255 * clip((value - low) / (high - low), 0, 1))

So a network sees a deep picture as it would see a file that was converted by this rule. Values of 8 bits stay.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Image
from datasets.features import features
from PIL import Image as PILImage

from ..errors import InputError
from ..files import has_type, read_bytes
from .pictures import MAX_CHANNELS, RGB, Depth, decode_any

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from transformers import BaseImageProcessor

    from .loading import SegmentationData

PERCENTILES = (0.1, 99.9)
ATTRIBUTE = "picture_scaling"  # of an image processor, and so in preprocessor_config.json
_MOST_VALUES = 2**24  # that percentiles are computed from


@dataclass(frozen=True)
class Scaling:
    """How a model reads deep pictures.

    Attributes:
        dtype: the type of the values in the files, like `uint16`.
        channels: the number of channels of the network.
        low, high: the values of each band that become 0 and 255.
    """

    dtype: str
    channels: int
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, processor: BaseImageProcessor) -> Scaling | None:
        """Return the scaling that an image processor keeps, or None if its model reads usual pictures only.

        Raises:
            InputError: somebody else has written the scaling, and it cannot be meant.
        """
        kept = getattr(processor, ATTRIBUTE, None)
        if kept is None:
            return None
        types = {"dtype": str, "channels": int, "low": list[float], "high": list[float]}
        is_whole = isinstance(kept, dict) and kept.keys() == types.keys()
        if not (is_whole and all(has_type(kept[name], wanted) for name, wanted in types.items())):
            raise InputError(f"{ATTRIBUTE} of the image processor must have {', '.join(types)}, got {kept!r:.80}")
        scaling = cls(kept["dtype"], kept["channels"], tuple(kept["low"]), tuple(kept["high"]))
        bands = len(scaling.low)
        is_sound = len(scaling.high) == bands and (bands == scaling.channels or (scaling.channels, bands) == (RGB, 1))
        spans = [high - low for low, high in zip(scaling.low, scaling.high, strict=False)]
        if not (is_sound and bands <= MAX_CHANNELS and all(0 < span < math.inf for span in spans)):
            raise InputError(
                f"{ATTRIBUTE} of the image processor has no range of values per channel, got {kept!r:.80}"
            )
        return scaling

    def keep_in(self, processor: BaseImageProcessor) -> None:
        """Let an image processor keep the scaling, also when it is saved."""
        setattr(processor, ATTRIBUTE, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes in types that JSON has."""
        return asdict(self) | {"low": list(self.low), "high": list(self.high)}

    @property
    def depth(self) -> Depth:
        return Depth(self.dtype, len(self.low))

    def apply(self, values: np.ndarray) -> Picture | np.ndarray:
        """Make a picture of 8 bits.

        Args:
            values: `(H, W, bands)`, of this dtype and number of bands.

        Returns:
            For 3 channels a PIL image in RGB, whose channels are equal if there is one band. For another number of
            channels an array `(H, W, channels)`, uint8.
        """
        scaled = np.empty(values.shape, dtype=np.uint8)
        for band, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            share = np.clip((values[..., band].astype(np.float64) - low) / (high - low), 0, 1)
            scaled[..., band] = np.round(255 * share)
        if self.channels != RGB:
            return scaled
        return PILImage.fromarray(np.ascontiguousarray(np.broadcast_to(scaled, (*scaled.shape[:2], RGB))))

    def read(self, content: bytes, name: str, max_pixels: int | None = None) -> Picture | np.ndarray:
        """Decode an image file by [`decode_any`], and make a picture of 8 bits of it.

        Raises:
            InputError: the file cannot be decoded, or has values of another type or another number of bands.
        """
        values = decode_any(content, name, self.channels, max_pixels)
        depth = Depth.of(values) if isinstance(values, np.ndarray) else "8 bits per channel"
        if depth != self.depth:
            raise InputError(f"{name} has {depth}, but the model was trained on {self.depth}. Save it like these.")
        return self.apply(values)

    def __str__(self) -> str:
        ranges = ", ".join(f"{low:g} to {high:g}" for low, high in zip(self.low, self.high, strict=True))
        if self.dtype == "uint8":
            return f"The images have {self.depth}, which the network sees as they are."
        return (
            f"The images have {self.depth}. The network sees 8 bits of them: 0 to 255 stand for {ranges}, the "
            f"percentiles {PERCENTILES[0]} and {PERCENTILES[1]} of the training images."
        )


def channels_of(processor: BaseImageProcessor) -> int:
    """Return the number of channels of the pictures that an image processor takes: 3 unless it keeps another one."""
    scaling = Scaling.of(processor)
    return RGB if scaling is None else scaling.channels


@dataclass
class DeepImage(Image):
    """The feature of a column of deep pictures: arrays `(H, W, bands)` as stored, or pictures of 8 bits if scaled."""

    channels: int = RGB
    scaling: dict[str, Any] | None = None
    _type: str = field(default="DeepImage", init=False, repr=False)

    def decode_example(self, value: Any, token_per_repo_id: dict | None = None) -> Any:
        if not isinstance(value, dict):
            return value
        name = value["path"] or "the image"
        content = value["bytes"] if value["bytes"] is not None else read_bytes(Path(value["path"]))
        if self.scaling is None:
            return decode_any(content, name, self.channels)
        return Scaling(**self.scaling).read(content, name)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # `datasets` calls the registration of features experimental
    features.register_feature(DeepImage, "DeepImage")


def measure_scaling(images: Dataset, depth: Depth, channels: int) -> Scaling:
    """Compute the percentiles of each band over some images, or of 8 bits return the scaling that changes nothing.

    Memory does not grow with the number of images: of more than 16 million values, evenly spaced pixels are taken.

    Args:
        images: columns `image` with the feature [`DeepImage`], and `class_pixels`.
        depth: the depth of all images.
        channels: the number of channels of the network.

    Raises:
        InputError: a band has the same value in all images.
    """
    if depth.dtype == "uint8":
        return Scaling("uint8", channels, (0.0,) * depth.bands, (255.0,) * depth.bands)
    every = math.ceil(np.sum(images["class_pixels"]) * depth.bands / _MOST_VALUES)
    chosen = (row["image"].reshape(-1, depth.bands)[::every] for row in images.select_columns("image"))
    values = np.concatenate([pixels.copy() for pixels in chosen])  # a view would keep the whole image in memory
    low, high = np.percentile(values, PERCENTILES, axis=0).tolist()
    for band, (lowest, highest) in enumerate(zip(low, high, strict=True), start=1):
        if not 0 < highest - lowest < math.inf:
            raise InputError(
                f"band {band} of the training images cannot be scaled: its percentiles {PERCENTILES[0]} and "
                f"{PERCENTILES[1]} are {lowest:g} and {highest:g}. Leave it out, or convert the images to 8 bits."
            )
    return Scaling(depth.dtype, channels, tuple(low), tuple(high))


def scale_pictures(data: SegmentationData, scaling: Scaling | None = None) -> SegmentationData:
    """Return a data set whose deep pictures are pictures of 8 bits: PIL images, or arrays `(H, W, channels)`.

    Give `scaling` of the result to `build_image_processor`, so that predictions are made on the same pictures. A data
    set of usual pictures is returned as it is.

    Args:
        data: the result of [`load_segmentation_dataset`], with the training images that were chosen.
        scaling: the scaling. Default: by percentiles of the training images, see [`measure_scaling`].

    Raises:
        InputError: see [`measure_scaling`].
    """
    if data.depth is None:
        return data
    scaling = scaling or measure_scaling(data.train, data.depth, data.channels)
    feature = DeepImage(channels=scaling.channels, scaling=scaling.to_dict())
    splits = {
        name: None if split is None else split.cast_column("image", feature)
        for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test))
    }
    return replace(data, **splits, scaling=scaling)
