"""Pictures of a run: predictions beside the truth, and the training curves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .data import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor

_GAP = 4
_TITLE_HEIGHT = 18
_MIN_ROW_HEIGHT = 120  # small images are enlarged, so that a sheet can be looked at


def palette(num_labels: int, own: Sequence[tuple[int, int, int]] | None = None) -> np.ndarray:
    """One colour per class, uint8 `(256, 3)`; void is black.

    The data set's own colours, if it has any; else the Pascal VOC colour map from its second entry on.
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
    rows: Sequence[tuple[Image.Image, Image.Image] | tuple[Image.Image, Image.Image, Tensor]],
    id2label: dict[int, str],
    path: str | os.PathLike,
    own_colors: Sequence[tuple[int, int, int]] | None = None,
) -> None:
    """Write a picture of rows image | truth | prediction, or image | truth, with a legend of the classes.

    Args:
        rows: (image, mask of class indices, predicted class indices `(H, W)`) of each picture, or the first two.
        id2label: class index to name.
        path: the PNG to write.
        own_colors: colours of the classes, if the data set has its own.
    """
    colors, font = palette(len(id2label), own_colors), ImageFont.load_default(size=12)
    scale = max(1, -(-_MIN_ROW_HEIGHT // rows[0][0].height))
    sizes = [(row[0].width * scale, row[0].height * scale) for row in rows]
    column, legend_width = max(width for width, _ in sizes), 130
    height = max(_TITLE_HEIGHT + sum(tall + _GAP for _, tall in sizes), _TITLE_HEIGHT * (len(id2label) + 2))
    columns = len(rows[0])
    sheet = Image.new("RGB", (columns * (column + _GAP) + legend_width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, title in enumerate(("image", "truth", "prediction")[:columns]):
        draw.text((index * (column + _GAP) + 2, 2), title, fill="black", font=font)
    y = _TITLE_HEIGHT
    for (image, *masks), size in zip(rows, sizes, strict=True):
        pictures = [
            image.convert("RGB"),
            *(Image.fromarray(colors[np.asarray(mask, dtype=np.uint8)]) for mask in masks),
        ]
        for index, picture in enumerate(pictures):
            method = Image.Resampling.BILINEAR if index == 0 else Image.Resampling.NEAREST
            sheet.paste(picture.resize(size, method), (index * (column + _GAP), y))
        y += size[1] + _GAP
    for line, (index, name) in enumerate([*id2label.items(), (IGNORE_INDEX, "void")]):
        x, top = columns * (column + _GAP) + 4, _TITLE_HEIGHT * (line + 1)
        draw.rectangle([x, top + 2, x + 12, top + 14], fill=tuple(colors[index].tolist()))
        draw.text((x + 18, top), name, fill="black", font=font)
    sheet.save(path)


def training_curves(log_history: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """Write a picture of training loss and validation mIoU over the steps. Needs matplotlib (extra `plots`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    for axis, key, title in zip(
        figure.subplots(1, 2), ("loss", "eval_mean_iou"), ("training loss", "validation mIoU"), strict=True
    ):
        points = [(entry["step"], entry[key]) for entry in log_history if entry.get(key) is not None]
        axis.plot(*zip(*points, strict=True) if points else ([], []), marker="." if len(points) < 40 else None)
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
