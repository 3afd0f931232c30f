"""Pictures of predictions, uncertainty, training curves and calibration."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .data import IGNORE_INDEX
from .data.pictures import to_rgb
from .files import write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    Picture = Image.Image | np.ndarray

_GAP = 4
_FONT_SIZE = 12
_LONGEST = 80  # characters of a name in a legend
_TALLEST = 2**15  # rows of a picture whose font grows: beside a strip of a million rows, it would fill the memory
_TITLE_HEIGHT = 18
_MIN_ROW_HEIGHT = 120  # smaller images are enlarged
_LINES = 40  # lines of a legend beside a large picture, whose font grows with the picture
_OPACITY = 0.5  # opacity of the class colours in an overlay
# Colours from certain (dark) to uncertain (bright), evenly spaced and linearly interpolated.
_HEAT = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)], dtype=float)


def palette(num_labels: int, own: Sequence[tuple[int, int, int]] | None = None) -> np.ndarray:
    """Return one RGB colour per class, uint8 `(256, 3)`, and black for unlabelled pixels.

    Args:
        num_labels: the number of classes.
        own: colours of the classes. Default: the Pascal VOC colour map from its second entry on.
    """
    colors = np.zeros((256, 3), dtype=np.uint8)
    if own is not None:
        colors[:num_labels] = own
        return colors
    for index in range(num_labels):
        value = index + 1
        for bit in range(8):
            colors[index] |= np.array([value >> channel & 1 for channel in range(3)], dtype=np.uint8) << (7 - bit)
            value >>= 3
    colors[IGNORE_INDEX] = 0
    return colors


def prediction_sheet(
    rows: Sequence[
        tuple[Image.Image | np.ndarray, Image.Image] | tuple[Image.Image | np.ndarray, Image.Image, Tensor]
    ],
    id2label: dict[int, str],
    path: str | os.PathLike,
    own_colors: Sequence[tuple[int, int, int]] | None = None,
) -> None:
    """Write a picture with the columns image, truth and prediction, or image and truth, and a legend of the classes.

    Args:
        rows: image of 8 bits (a PIL image or an array `(H, W, C)`), mask of class indices and optionally predicted
            class indices `(H, W)`, for each row.
        id2label: maps class indices to names.
        path: the PNG file to write.
        own_colors: colours of the classes. Default: see [`palette`].
    """
    rows = [(to_rgb(image), *masks) for image, *masks in rows]
    colors, font = palette(len(id2label), own_colors), ImageFont.load_default(size=_FONT_SIZE)
    scale = max(1, -(-_MIN_ROW_HEIGHT // rows[0][0].height))
    sizes = [(row[0].width * scale, row[0].height * scale) for row in rows]
    column, columns = max(width for width, _ in sizes), len(rows[0])
    names = legend((name, colors[index]) for index, name in [*id2label.items(), (IGNORE_INDEX, "void")])
    height = _TITLE_HEIGHT + max(sum(tall + _GAP for _, tall in sizes), names.height)
    sheet = Image.new("RGB", (columns * (column + _GAP) + names.width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, title in enumerate(("image", "truth", "prediction")[:columns]):
        draw.text((index * (column + _GAP) + 2, 2), title, fill="black", font=font)
    y = _TITLE_HEIGHT
    for (image, *masks), size in zip(rows, sizes, strict=True):
        pictures = [
            image,
            *(Image.fromarray(colors[np.asarray(mask, dtype=np.uint8)]) for mask in masks),
        ]
        for index, picture in enumerate(pictures):
            method = Image.Resampling.BILINEAR if index == 0 else Image.Resampling.NEAREST
            sheet.paste(picture.resize(size, method), (index * (column + _GAP), y))
        y += size[1] + _GAP
    sheet.paste(names, (columns * (column + _GAP), _TITLE_HEIGHT))
    write_result(path, sheet)


def legend(entries: Iterable[tuple[str, Sequence[int]]], font_size: int = _FONT_SIZE) -> Image.Image:
    """Return an RGB picture that lists names beside squares of their colours."""
    entries, font = [(_shortened(name), color) for name, color in entries], ImageFont.load_default(size=font_size)
    line = _TITLE_HEIGHT * font_size // _FONT_SIZE
    width = 2 * line + math.ceil(max((font.getlength(name) for name, _ in entries), default=0))
    picture = Image.new("RGB", (width, line * len(entries)), "white")
    draw = ImageDraw.Draw(picture)
    for index, (name, color) in enumerate(entries):
        top = index * line + line // 9
        draw.rectangle([_GAP, top, _GAP + font_size, top + font_size], fill=tuple(int(value) for value in color))
        draw.text((_GAP + font_size + line // 3, index * line), name, fill="black", font=font)
    return picture


def _shortened(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


def overlay(
    image: Picture,
    mask: np.ndarray | Tensor,
    id2label: dict[int, str],
    own_colors: Sequence[tuple[int, int, int]] | None = None,
) -> Image.Image:
    """Return a picture blended with the colours of its classes, and a legend of the classes in it.

    Args:
        image: the picture of 8 bits, a PIL image or an array `(H, W, C)`.
        mask: class indices `(H, W)`.
        id2label: maps class indices to names.
        own_colors: colours of the classes. Default: see [`palette`].
    """
    colors, mask = palette(len(id2label), own_colors), np.asarray(mask, dtype=np.uint8)
    covered = Image.blend(to_rgb(image), Image.fromarray(colors[mask]), _OPACITY)
    return _beside_legend(covered, [(id2label[index], colors[index]) for index in np.unique(mask).tolist()])


def index_picture(
    mask: np.ndarray | Tensor, num_labels: int, own_colors: Sequence[tuple[int, int, int]] | None = None
) -> Image.Image:
    """Return class indices `(H, W)` as a palette picture: its pixel values are the indices, shown in class colours."""
    picture = Image.fromarray(np.asarray(mask, dtype=np.uint8))
    picture.putpalette(palette(num_labels, own_colors).tobytes())
    return picture


def heat_map(uncertainty: np.ndarray | Tensor) -> Image.Image:
    """Return values `(H, W)` from 0 (dark) to 1 (bright) as a picture with a scale."""
    scale = [(f"{value:.2f}", _heat(np.array(value))) for value in (1.0, 0.75, 0.5, 0.25, 0.0)]
    return _beside_legend(Image.fromarray(_heat(np.asarray(uncertainty))), scale)


def _heat(values: np.ndarray) -> np.ndarray:
    """Map values from 0 to 1 to colours, uint8 `(..., 3)`."""
    steps = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(values, steps, channel) for channel in _HEAT.T], axis=-1).round().astype(np.uint8)


def _beside_legend(picture: Image.Image, entries: Sequence[tuple[str, Sequence[int]]]) -> Image.Image:
    grown = max(_FONT_SIZE, picture.height // _LINES) if picture.height <= _TALLEST else _FONT_SIZE
    names = legend(entries, grown)
    both = Image.new("RGB", (picture.width + names.width, max(picture.height, names.height)), "white")
    both.paste(picture, (0, 0))
    both.paste(names, (picture.width, 0))
    return both


def training_curves(log_history: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """Write a picture of the training loss and the validation mIoU over the steps.

    A curve with fewer than two points is left out. Needs matplotlib (extra `plots`).

    Args:
        log_history: entries of `trainer.state.log_history`.
        path: the picture to write.
    """
    from matplotlib.figure import Figure

    titles = {"loss": "training loss", "eval_mean_iou": "validation mIoU"}
    curves = {
        title: [(entry["step"], entry[key]) for entry in log_history if entry.get(key) is not None]
        for key, title in titles.items()
    }
    drawn = {title: points for title, points in curves.items() if len(points) > 1}
    figure = Figure(figsize=(4 * max(1, len(drawn)), 3), layout="constrained")
    for axis, (title, points) in zip(
        figure.subplots(1, max(1, len(drawn)), squeeze=False)[0], drawn.items(), strict=False
    ):
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None)
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    _write_figure(figure, path)


def reliability_diagram(networks: Mapping[str, Sequence[Sequence[float | None]]], path: str | os.PathLike) -> None:
    """Write a picture of accuracy against confidence. Needs matplotlib (extra `plots`).

    Args:
        networks: by the name of the network, for each bin the share of pixels, their mean confidence and their
            accuracy, as in `eval_reliability`.
        path: the picture to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for name, bins in networks.items():
        filled = [(confidence, hits) for share, confidence, hits in bins if share]
        axis.plot(*zip(*filled, strict=True), marker=".", label=name)
    if len(networks) > 1:
        axis.legend()
    axis.set(xlabel="confidence", ylabel="accuracy", title="calibration")
    _write_figure(figure, path)


def _write_figure(figure: Figure, path: str | os.PathLike) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix.removeprefix(".") or "png", dpi=110)
    write_result(path, picture.getvalue())
