"""Small data sets of deep pictures, and the same pictures as a user converts them by the documented rule."""

import io
import json
import struct
import zlib

import numpy as np
from PIL import Image

CLASSES = ["ground", "wall", "sky"]
SIZE = (32, 48)


def png(values):
    """A PNG of 16 bits, grey or in colour, which PIL does not write."""
    height, width, bands = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values, **options):
    """A TIFF; of more than one band, they are the samples of a pixel unless the options say otherwise."""
    import tifffile

    if values.shape[2] == 1:
        values = values[..., 0]
    kind = {"photometric": "rgb" if values.shape[-1] == 3 and values.ndim == 3 else "minisblack"}
    kind |= {"planarconfig": "contig"} if values.ndim == 3 else {}
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{**kind, **options})
    return file.getvalue()


def values_of(dtype, bands, seed, size=SIZE):
    """A picture whose values follow the classes of its mask, with a few much brighter pixels."""
    generator = np.random.default_rng(seed)
    mask = np.zeros(size, dtype=np.uint8)
    for label in range(1, len(CLASSES)):
        top, left = generator.integers(0, size[0] - 12), generator.integers(0, size[1] - 16)
        mask[top : top + 12, left : left + 16] = label
    high = 60 if dtype == "uint8" else 900
    values = mask[..., None].astype(int) * high + generator.integers(0, high // 2, (*size, bands))
    if dtype != "uint8":
        values[generator.random(size) < 0.0005] = 30000
    return values.astype(dtype), mask


def write_folder(root, dtype="uint16", bands=1, encode=tiff, suffix="tif", train=4, validation=2):
    """Write a data set, and return the values of its images by split and name."""
    pictures = {}
    for split, count in (("train", train), ("val", validation)):
        for index in range(count):
            values, mask = values_of(dtype, bands, [len(split), index])
            write_pair(root, split, f"{split} {index}", encode(values), suffix, mask)
            pictures[split, f"{split} {index}"] = values
    (root / "id2label.json").write_text(json.dumps(CLASSES))
    return pictures


def write_pair(root, split, name, content, suffix, mask):
    for kind in ("images", "masks"):
        (root / split / kind).mkdir(parents=True, exist_ok=True)
    (root / split / "images" / f"{name}.{suffix}").write_bytes(content)
    Image.fromarray(mask).save(root / split / "masks" / f"{name}.png")


def scale_by_hand(values, pictures):
    """The rule of the documentation, on the training images among the pictures."""
    train = np.concatenate(
        [picture.reshape(-1, picture.shape[2]) for (split, _), picture in pictures.items() if split == "train"]
    )
    low, high = np.percentile(train, [0.1, 99.9], axis=0)
    return np.round(255 * np.clip((values.astype(float) - low) / (high - low), 0, 1)).astype(np.uint8)


def convert_folder(root, target, pictures):
    """Write the pictures as files of 8 bits, beside the same masks."""
    for (split, name), values in pictures.items():
        scaled = scale_by_hand(values, pictures)
        content = io.BytesIO()
        Image.fromarray(scaled if scaled.shape[2] == 3 else scaled[..., 0]).save(content, "png")
        mask = np.asarray(Image.open(root / split / "masks" / f"{name}.png"))
        write_pair(target, split, name, content.getvalue(), "png", mask)
    (target / "id2label.json").write_text(json.dumps(CLASSES))
