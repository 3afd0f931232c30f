"""Images and masks of every kind, and the cache of the checks."""

import contextlib
import errno
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import RAW_VOID, load_folder, rewrite_mask
from deep_pictures import png
from launching import time_limit
from PIL import Image as PILImage
from PIL import ImageOps

from pals_hf.data import EvalTransform, checking, stream_segmentation_dataset
from pals_hf.errors import InputError
from pals_hf.models import build_image_processor


def grey_png(values, bits):
    """A grey PNG of few bits, which PIL reads but does not write."""
    packed = np.zeros((values.shape[0], values.shape[1] * bits // 8), dtype=np.uint8)
    for place in range(8 // bits):
        packed |= values[:, place :: 8 // bits] << (8 - bits * (place + 1))
    lines = b"".join(b"\0" + row.tobytes() for row in packed)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_void_is_mapped_once_and_classes_are_kept(folder):
    raw = np.array(PILImage.open(folder / "train" / "masks" / "street 0.png"))
    labels = np.array(load_folder(folder).train[0]["labels"])
    assert np.array_equal(labels, np.where(raw == RAW_VOID, 255, raw))
    assert (raw == RAW_VOID).any()


@pytest.mark.parametrize("mode", ["P", "I;16", "P, 4 bits", "L, 4 bits", "L, 2 bits", "1"])
def test_masks_keep_their_indices_in_every_mode(folder, mode):
    """PIL stretches grey of 2 and 4 bits to 0..255, and shows a bit as True."""
    path = folder / "train" / "masks" / "street 0.png"
    raw = np.array(PILImage.open(path))
    if mode in ("L, 2 bits", "1"):
        raw = raw % (4 if mode.startswith("L") else 2)
    expected = np.where(raw == RAW_VOID, 255, raw)
    mask = PILImage.fromarray(raw)
    if mode.startswith("P"):
        mask.putpalette(list(range(255, -1, -1)) * 3)  # colours say nothing about the index
        mask.save(path, bits=4 if "4" in mode else 8)
    elif mode == "I;16":
        PILImage.fromarray(raw.astype(np.uint16)).save(path)
    elif mode == "1":
        PILImage.fromarray(raw.astype(bool)).save(path)
    else:
        path.write_bytes(grey_png(raw, bits=int(mode[3])))
    assert np.array_equal(np.array(load_folder(folder).train[0]["labels"]), expected)


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "L", "P", "LA", "1"])
def test_images_of_every_mode(folder, mode):
    path = folder / "train" / "images" / "street 0.jpg"
    picture = PILImage.open(path).convert(mode)
    picture.save(path, format="jpeg" if mode == "CMYK" else "png")
    data = load_folder(folder)
    transform = EvalTransform(build_image_processor(None))
    assert transform(data.train[0]["image"], data.train[0]["labels"])["pixel_values"].shape == (3, 32, 48)


@pytest.mark.parametrize(("kind", "dtype"), [("png", "<u2"), ("tiff", ">u2"), ("tiff", "<i4"), ("tiff", "<f4")])
def test_an_image_of_more_than_8_bits(folder, kind, dtype):
    path = folder / "train" / "images" / "street 0.jpg"
    PILImage.fromarray(np.zeros((32, 48), dtype=dtype)).save(path, format=kind)
    with pytest.raises(
        InputError, match=r"'street 1' has 8 bits per channel, but image 'street 0' has \w+ values in 1 "
    ):
        load_folder(folder)
    with pytest.raises(InputError, match=r"street 0\.jpg: images with more than 8 bits per channel .* by a stream"):
        stream_segmentation_dataset(dataset_dir=folder, void_labels=[11])


def tiff(values, photometric=1, bits=None):
    """An uncompressed big-endian grey TIFF, which PIL does not write."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder(">")).tobytes()
    bits = bits or values.itemsize * 8
    short = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height}
    entries = [struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in short.items()]
    entries += [struct.pack(">HHII", tag, 4, 1, value) for tag, value in ((273, 8), (279, len(data)))]
    entries.sort()
    directory = struct.pack(">H", len(entries)) + b"".join(entries) + struct.pack(">I", 0)
    return b"MM\0*" + struct.pack(">I", 8 + len(data)) + data + directory


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_masks_as_big_endian_tiff(folder, bits):
    """PIL stretches 4 bits to 0..255, and has a mode of its own for 16 bits."""
    path = folder / "train" / "masks" / "street 0.png"
    raw = np.array(PILImage.open(path))
    packed = raw[:, ::2] << 4 | raw[:, 1::2] if bits == 4 else raw.astype(f"u{bits // 8}")
    content = tiff(packed, bits=bits)
    if bits == 4:
        content = content.replace(struct.pack(">HHIHH", 256, 3, 1, 24, 0), struct.pack(">HHIHH", 256, 3, 1, 48, 0))
    path.unlink()
    path.with_suffix(".tif").write_bytes(content)
    assert np.array_equal(np.array(load_folder(folder).train[0]["labels"]), np.where(raw == RAW_VOID, 255, raw))


def test_a_mask_that_stores_white_as_zero(folder):
    """ImageJ's inverting lookup table: PIL turns the values around, other programs do not."""
    path = folder / "train" / "masks" / "street 0.png"
    path.write_bytes(tiff(np.array(PILImage.open(path)), photometric=0))
    with pytest.raises(InputError, match=r"street 0\.png: this TIFF stores white as zero"):
        load_folder(folder)


@pytest.mark.parametrize(("kind", "suffix"), [("images", "jpg"), ("masks", "png")])
def test_a_file_of_several_pages(folder, kind, suffix):
    path = folder / "train" / kind / f"street 0.{suffix}"
    picture = PILImage.open(path)
    picture.load()
    picture.save(path, format="tiff", save_all=True, append_images=[picture, picture])
    with pytest.raises(InputError, match=rf"street 0\.{suffix} has 3 pages or frames, but must have one"):
        load_folder(folder)


def test_smaller_copies_of_a_page_do_not_count(folder):
    """Overviews, as GDAL adds them."""
    path = folder / "train" / "images" / "street 0.jpg"
    picture = PILImage.open(path)
    small = picture.resize((24, 16))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    picture.save(path, format="tiff", save_all=True, append_images=[small])
    assert load_folder(folder).train[0]["image"].size == (48, 32)


def test_palettes_that_differ_between_the_masks(folder):
    """Whether in one split or in two."""
    for split, name, colors in (("train", "street 1", (0, 0, 255)), ("val", "alley-1", (255, 0, 0))):
        path = folder / split / "masks" / f"{name}.png"
        mask = PILImage.open(path)
        mask.putpalette([0, 0, 0, *colors, *range(40, 240)])
        mask.save(path)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(
            InputError, match=r"alley-1\.png shows the value 1 in the colour \(255, 0, 0\), but .*street 1"
        ):
            load_folder(folder)


def test_an_image_of_16_bits_per_colour(folder):
    """PIL keeps the upper 8 bits of a colour PNG, which are nothing but zeros in a dark picture of 12 bits."""
    pytest.importorskip("imagecodecs")
    (folder / "train" / "images" / "street 0.jpg").write_bytes(png(np.zeros((32, 48, 3), dtype=np.uint16)))
    with pytest.raises(
        InputError, match=r"'street 1' has 8 bits per channel, but image 'street 0' has uint16 values in 3 "
    ):
        load_folder(folder)
    with pytest.raises(
        InputError,
        match=r"street 0\.jpg: images with more than 8 bits per channel \(16 bits, mode RGB\) .* by a stream",
    ):
        stream_segmentation_dataset(dataset_dir=folder, void_labels=[11])


def test_an_exif_rotated_image_is_turned(folder):
    """The mask is drawn on the picture as it is shown."""
    path = folder / "train" / "images" / "street 0.jpg"
    upright = PILImage.open(path)
    exif = PILImage.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    upright.rotate(90, expand=True).save(path, exif=exif, quality=95)
    assert load_folder(folder).train[0]["image"].size == (48, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mask_has_a_note", [True, False])
def test_a_mask_is_turned_like_its_image(folder, orientation, mask_has_a_note):
    """A mask drawn on the stored pixels: with a note of its own, or as large as the stored image."""
    if orientation < 5 and not mask_has_a_note:
        pytest.skip("nothing tells how such a mask was drawn")
    image_path, mask_path = (
        folder / "train" / kind / f"street 0.{suffix}" for kind, suffix in (("images", "jpg"), ("masks", "png"))
    )
    expected = np.array(load_folder(folder).train[0]["labels"])
    back = {v: k for k, v in {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.items()}[orientation]
    for path in (image_path, mask_path):
        picture = PILImage.open(path)
        picture.load()
        picture.getexif()[0x0112] = back
        stored, exif = ImageOps.exif_transpose(picture), PILImage.Exif()
        if path is image_path or mask_has_a_note:
            exif[0x0112] = orientation
        stored.save(path, exif=exif, **({"quality": 95} if path is image_path else {}))
    example = load_folder(folder).train[0]
    assert example["image"].size == (48, 32)
    assert np.array_equal(np.array(example["labels"]), expected)


def test_counts_pixels_and_hashes_contents(folder):
    data = load_folder(folder)
    labels = np.array(data.train[2]["labels"])
    assert data.train[2]["class_pixels"] == [*(int((labels == label).sum()) for label in range(4)), 48]
    before = data.train[2]
    rewrite_mask(folder, lambda mask: np.where(mask == 1, 2, mask))
    after = load_folder(folder).train
    assert after[2]["labels_sha256"] == before["labels_sha256"]
    assert after[0]["labels_sha256"] != data.train[0]["labels_sha256"]
    assert after["image_sha256"] == data.train["image_sha256"]


def test_looks_at_the_files_once(folder, monkeypatch):
    expected = load_folder(folder)
    monkeypatch.setattr(checking, "_check_pair", lambda *_: pytest.fail("checked again"))
    data = load_folder(folder)
    assert [np.array(m).tobytes() for m in data.train["labels"]] == [
        np.array(m).tobytes() for m in expected.train["labels"]
    ]
    with pytest.raises(pytest.fail.Exception):  # void means something else now
        load_folder(folder, void_labels=[RAW_VOID, 77])
    rewrite_mask(folder, lambda mask: mask)
    with pytest.raises(pytest.fail.Exception):  # a file was written
        load_folder(folder)


def test_what_a_disk_failed_to_read_is_read_again(folder, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(InputError, match="Permission denied"):
            load_folder(folder, skip_bad_samples=True)
    data = load_folder(folder, skip_bad_samples=True)
    assert (len(data.train), data.skipped) == (8, {})


def test_several_processes_check_the_same(folder):
    with_one, with_two = load_folder(folder), load_folder(folder, void_labels=[RAW_VOID, 77], num_proc=2)
    assert with_one.train["labels_sha256"] == with_two.train["labels_sha256"]


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_what_is_no_file_ends_in_one_line(kind, folder):
    path = sorted((folder / "train" / kind).iterdir())[0]
    for replace in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        path.unlink()
        replace(path)
        with (
            time_limit(60),
            pytest.raises(InputError, match=f"{path.name} is not a readable image: .*not a regular file"),
        ):
            load_folder(folder)


def test_damage_of_any_kind_ends_in_one_line():
    """Decoders raise `struct.error`, `EOFError` and others for damaged bytes."""
    generator, mask, turned = np.random.default_rng(0), io.BytesIO(), PILImage.Exif()
    PILImage.new("L", (60, 40)).save(mask, "png")
    turned[0x0112] = 6
    classes = checking.Classes.from_names({0: "sky", 1: "road"})
    for form in ("png", "jpeg", "tiff", "webp", "gif", "bmp"):
        whole = io.BytesIO()
        PILImage.effect_noise((60, 40), 50).convert("RGB").save(whole, form, exif=turned)
        for _ in range(60):
            content = bytearray(whole.getvalue())
            for place in generator.integers(0, min(len(content), 400), 3):
                content[place] = generator.integers(0, 256)
            row = {"image": bytes(content), "labels": mask.getvalue()}
            with contextlib.suppress(InputError):
                checking.read_pair(
                    {"id": "a"} | {name: {"bytes": b, "path": None} for name, b in row.items()}, classes
                )
