"""Deep pictures become pictures of 8 bits by a documented rule, which the model keeps."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from deep_pictures import (
    convert_folder,
    png,
    scale_by_hand,
    tiff,
    values_of,
    write_folder,
    write_pair,
)
from PIL import Image

from pals_hf.data import (
    EvalTransform,
    Scaling,
    TrainTransform,
    TransformedDataset,
    load_segmentation_dataset,
    resizing,
    scale_pictures,
    scaling,
    stream_segmentation_dataset,
)
from pals_hf.errors import InputError
from pals_hf.inference import read_pictures
from pals_hf.models import build_image_processor
from pals_hf.pretrained import load_processor


@pytest.fixture(autouse=True)
def _packages():
    pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")


KINDS = {
    "grey, 16 bits": ("uint16", 1, tiff, "tif"),
    "grey PNG": ("uint16", 1, png, "png"),
    "RGB PNG": ("uint16", 3, png, "png"),
    "floating point RGB": ("float32", 3, tiff, "tif"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_sees_the_files_that_were_converted_by_hand(kind, tmp_path):
    """Bit by bit, in training, with and without the cache, and in evaluation."""
    pictures = write_folder(tmp_path / "deep", *KINDS[kind])
    convert_folder(tmp_path / "deep", tmp_path / "converted", pictures)
    raw = load_segmentation_dataset(dataset_dir=tmp_path / "deep")
    assert np.array_equal(raw.train[0]["image"], pictures["train", "train 0"])
    data, usual = scale_pictures(raw), load_segmentation_dataset(dataset_dir=tmp_path / "converted")
    assert (usual.depth, usual.scaling) == (None, None)
    assert scale_pictures(usual) is usual
    processor = build_image_processor(None, (24, 36))
    transform = TrainTransform(processor, (24, 32))
    ours, theirs = (TransformedDataset(part.train, transform) for part in (data, usual))
    cached = TransformedDataset(resizing.cache_resized(data.train, processor), transform)
    for one, two, three in zip(ours, theirs, cached, strict=True):
        assert torch.equal(one["pixel_values"], two["pixel_values"])
        assert torch.equal(one["pixel_values"], three["pixel_values"])
    ours, theirs = (TransformedDataset(part.validation, EvalTransform(processor)) for part in (data, usual))
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one["pixel_values"], two["pixel_values"])
        assert one["pixel_values"].unique().numel() > 50


def test_a_stack_is_scaled_band_by_band_and_augmented(tmp_path):
    pictures = write_folder(tmp_path, "uint16", 5)
    data = scale_pictures(load_segmentation_dataset(dataset_dir=tmp_path, channels=5))
    for row in data.train:
        assert np.array_equal(row["image"], scale_by_hand(pictures["train", row["id"]], pictures))
    processor = build_image_processor(None, scaling=data.scaling)
    example = EvalTransform(processor)(data.train[0]["image"], data.train[0]["labels"])["pixel_values"]
    means, deviations = (
        (np.array(values)[[0, 1, 2, 0, 1]]) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    expected = (data.train[0]["image"] / 255 - means) / deviations
    assert np.allclose(example, np.moveaxis(expected, 2, 0), atol=1e-5)
    transform = TrainTransform(processor, (16, 40), scale_range=(1.0, 1.0), color_jitter=0.5)
    views = [TransformedDataset(data.train, transform, seed=seed)[0]["pixel_values"] for seed in range(2)]
    assert views[0].shape == (5, 16, 40)
    assert not torch.equal(*views)
    plain = TrainTransform(processor, (32, 48), scale_range=(1.0, 1.0), color_jitter=0.0)
    whole = TransformedDataset(data.train, plain)[0]["pixel_values"]
    assert torch.equal(whole, example) or torch.equal(whole.flip(2), example)


def test_only_the_chosen_training_images_count(tmp_path):
    pictures = write_folder(tmp_path, "uint16", 1)
    data = load_segmentation_dataset(dataset_dir=tmp_path)
    few = dataclasses.replace(data, train=data.train.select([2]))
    found = scale_pictures(few).scaling
    low, high = np.percentile(pictures["train", "train 2"], [0.1, 99.9])
    assert (found.low, found.high) == ((low,), (high,))
    assert scale_pictures(data).scaling != found
    assert scale_pictures(data, found).scaling == found


def test_of_many_values_evenly_spaced_pixels_count(tmp_path, monkeypatch):
    pictures = write_folder(tmp_path, "uint16", 2)
    data = load_segmentation_dataset(dataset_dir=tmp_path, channels=2)
    monkeypatch.setattr(scaling, "_MOST_VALUES", 4 * 32 * 48)  # of 4 images and 2 bands
    found = scale_pictures(data).scaling
    values = np.concatenate(
        [picture.reshape(-1, 2)[::2] for (split, _), picture in pictures.items() if split == "train"]
    )
    low, high = np.percentile(values, [0.1, 99.9], axis=0)
    assert (found.low, found.high) == (tuple(low), tuple(high))


def test_a_stack_of_8_bits_stays_as_it_is(tmp_path):
    pictures = write_folder(tmp_path, "uint8", 4)
    data = scale_pictures(load_segmentation_dataset(dataset_dir=tmp_path, channels=4))
    assert all(np.array_equal(row["image"], pictures["train", row["id"]]) for row in data.train)
    assert str(data.scaling) == "The images have uint8 values in 4 bands, which the network sees as they are."
    every = np.arange(256, dtype=np.uint8).reshape(1, 64, 4)
    assert np.array_equal(data.scaling.apply(every), every)


def test_folds_and_held_out_images(tmp_path):
    write_folder(tmp_path, validation=4)
    data = scale_pictures(load_segmentation_dataset(dataset_dir=tmp_path, num_folds=2))
    assert data.train[0]["image"].mode == data.validation[0]["image"].mode == "RGB"
    assert (len(data.train), len(data.validation)) == (4, 4)


def test_an_image_processor_keeps_the_scaling(tmp_path):
    kept = Scaling("float32", 4, (-1.5, 0.0, 0.1, 1e9), (1e-7, 1.0, 0.30000000000000004, 3e9))
    build_image_processor(None, (16, 24), kept).save_pretrained(tmp_path)
    processor = load_processor(str(tmp_path))
    assert Scaling.of(processor) == kept
    assert len(processor.image_mean) == 4
    again = build_image_processor(str(tmp_path), scaling=Scaling("uint8", 1, (0.0,), (255.0,)))
    assert again.image_mean == pytest.approx([np.mean(processor.image_mean[:4])])
    usual = build_image_processor(None, scaling=Scaling("uint16", 3, (0.0,), (9.0,)))
    usual.save_pretrained(tmp_path)
    assert Scaling.of(build_image_processor(str(tmp_path))) is None


@pytest.mark.parametrize(
    "change",
    [
        {"low": [1.0, 2.0]},
        {"high": [0.0]},
        {"high": [float("nan")]},
        {"high": ["9"]},
        {"channels": 2},
        {"channels": "3"},
        {"dtype": None},
        {"more": 1},
        "whatever",
    ],
    ids=str,
)
def test_a_scaling_that_cannot_be_meant(change, tmp_path):
    build_image_processor(None, scaling=Scaling("uint16", 3, (0.0,), (9.0,))).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    about = json.loads(path.read_text())
    about["picture_scaling"] = change if isinstance(change, str) else about["picture_scaling"] | change
    path.write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"picture_scaling of the image processor (must|has no)") as error:
        load_processor(str(tmp_path))
    assert "\n" not in str(error.value)


def test_pictures_of_another_depth_are_refused(tmp_path):
    known = Scaling("uint16", 3, (0.0,), (900.0,))
    (tmp_path / "same.tif").write_bytes(tiff(values_of("uint16", 1, 0)[0]))
    (image,) = read_pictures(tmp_path / "same.tif", scaling=known)
    assert (image.mode, image.size) == ("RGB", (48, 32))
    image.save(tmp_path / "usual.png")
    (tmp_path / "float.tif").write_bytes(tiff(values_of("float32", 1, 0)[0]))
    (tmp_path / "rgb.png").write_bytes(png(values_of("uint16", 3, 0)[0]))
    (tmp_path / "bands.tif").write_bytes(tiff(values_of("uint16", 5, 0)[0]))
    for name, has in {
        "usual.png": "8 bits per channel",
        "float.tif": "float32 values in 1 band",
        "rgb.png": "uint16 values in 3 bands",
        "bands.tif": "uint16 values in 5 bands",
    }.items():
        with pytest.raises(
            InputError, match=rf"{name} has {has}, but the model was trained on uint16 values in 1 band\."
        ):
            next(read_pictures(tmp_path / name, scaling=known))
    for name in ("same.tif", "rgb.png"):
        with pytest.raises(
            InputError, match=rf"{name} is not .* are not read by a model .* `magick IN -depth 8 OUT\.png`"
        ):
            next(read_pictures(tmp_path / name))
    with pytest.raises(
        InputError, match=r"bands\.tif is not .* or it is a stack of bands, which the model does not take"
    ):
        next(read_pictures(tmp_path / "bands.tif"))
    with pytest.raises(InputError, match=r"gone\.tif is not a readable image: .*No such file"):
        next(read_pictures(tmp_path / "gone.tif", scaling=known))


def replace_image(root, content, name="train 1"):
    (root / "train" / "images" / f"{name}.tif").write_bytes(content)


DIFFERENT = {
    "other bits": (
        tiff(values_of("float32", 1, 9)[0]),
        "has float32 values in 1 band, but image 'train 0' has uint16",
    ),
    "other bands": (
        tiff(values_of("uint16", 3, 9)[0]),
        "has uint16 values in 3 bands, but image 'train 0' has uint16",
    ),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_a_set_of_different_depths(kind, tmp_path):
    write_folder(tmp_path)
    content, problem = DIFFERENT[kind]
    replace_image(tmp_path, content)
    with pytest.raises(InputError, match=f"image 'train 1' {problem} values in 1 band. All images must have the same"):
        load_segmentation_dataset(dataset_dir=tmp_path)


def test_a_validation_split_of_another_depth(tmp_path):
    write_folder(tmp_path)
    for path in (tmp_path / "val" / "images").iterdir():
        path.write_bytes(tiff(values_of("uint8", 1, len(path.name) + ord(path.name[4]))[0]))
    with pytest.raises(
        InputError, match="image 'val 0' has 8 bits per channel, but image 'train 0' has uint16 values in"
    ):
        load_segmentation_dataset(dataset_dir=tmp_path)


@pytest.mark.parametrize(("bands", "channels"), [(5, 3), (5, 4), (1, 4), (3, 1), (2, 3)])
def test_another_number_of_channels(bands, channels, tmp_path):
    write_folder(tmp_path, "uint16", bands)
    numbers = f"{bands} band{'s' if bands > 1 else ''}, but the network takes {channels} channels"
    with pytest.raises(InputError, match=rf"train 0\.tif has uint16 values in {numbers}.* use --channels {bands}\."):
        load_segmentation_dataset(dataset_dir=tmp_path, channels=channels)


@pytest.mark.parametrize("channels", [0, 257])
def test_channels_out_of_range(channels):
    with pytest.raises(InputError, match=f"channels must be between 1 and 256, got {channels}"):
        load_segmentation_dataset(channels=channels)


def test_a_pixel_that_is_no_number_can_be_skipped(tmp_path):
    write_folder(tmp_path, "float32", 1)
    values, _ = values_of("float32", 1, 9)
    values[4, 5] = np.nan
    replace_image(tmp_path, tiff(values))
    with pytest.raises(InputError, match=r"train 1\.tif: the pixel in row 4, column 5 is nan in band 1"):
        load_segmentation_dataset(dataset_dir=tmp_path)
    data = load_segmentation_dataset(dataset_dir=tmp_path, skip_bad_samples=True)
    assert list(data.skipped) == ["train/train 1"]


def test_constant_images_cannot_be_scaled(tmp_path):
    write_folder(tmp_path)
    for index in range(4):
        values = np.full((32, 48, 1), 7, dtype="uint16")
        values[0, 0] = index  # so that they differ
        replace_image(tmp_path, tiff(values), f"train {index}")
    with pytest.raises(
        InputError, match=r"band 1 of the training images cannot be scaled: its percentiles .* 7 and 7"
    ):
        scale_pictures(load_segmentation_dataset(dataset_dir=tmp_path))


def test_a_mask_of_another_size(tmp_path):
    write_folder(tmp_path)
    values, mask = values_of("uint16", 1, 0)
    write_pair(tmp_path, "train", "train 0", tiff(values), "tif", mask[:, :40])
    with pytest.raises(InputError, match=r"train 0\.png: the mask has 40x32 pixels, but .*train 0\.tif has 48x32"):
        load_segmentation_dataset(dataset_dir=tmp_path)


def test_a_stream_reads_no_deep_images(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(
        InputError, match=r"train 0\.tif: images with more than 8 bits per channel .* without streaming"
    ):
        stream_segmentation_dataset(dataset_dir=tmp_path)


def test_the_cache_of_resized_images(tmp_path, monkeypatch):
    """It is found again, tells scalings apart, and is for RGB only."""
    write_folder(tmp_path / "grey")
    processor = build_image_processor(None, (16, 24))
    data = load_segmentation_dataset(dataset_dir=tmp_path / "grey")
    resizing.cache_resized(scale_pictures(data).train, processor)
    monkeypatch.setattr(resizing, "_resize_pair", lambda *_, **__: pytest.fail("resized again"))
    again = load_segmentation_dataset(dataset_dir=tmp_path / "grey")
    resizing.cache_resized(scale_pictures(again).train, processor)
    with pytest.raises(pytest.fail.Exception):
        resizing.cache_resized(scale_pictures(data, Scaling("uint16", 3, (0.0,), (9.0,))).train, processor)
    write_folder(tmp_path / "stack", "uint16", 2)
    stack = scale_pictures(load_segmentation_dataset(dataset_dir=tmp_path / "stack", channels=2))
    with pytest.raises(InputError, match="cache_images works with 3 channels only"):
        resizing.cache_resized(stack.train, processor)


def test_images_in_columns(tmp_path):
    """A Parquet file keeps the bytes of the files."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    pictures = write_folder(tmp_path / "deep", "uint16", 4)
    rows = {"image": [], "label": []}
    for path in sorted((tmp_path / "deep" / "train" / "images").iterdir()):
        rows["image"].append({"bytes": path.read_bytes(), "path": None})
        mask = tmp_path / "deep" / "train" / "masks" / f"{path.stem}.png"
        rows["label"].append({"bytes": mask.read_bytes(), "path": None})
    features = Features({"image": ImageFeature(decode=False), "label": ImageFeature(decode=False)})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "all.parquet")
    options = {"id2label": {0: "a", 1: "b", 2: "c"}, "channels": 4, "validation_share": 0.25}
    data = scale_pictures(load_segmentation_dataset(str(tmp_path / "all.parquet"), **options))
    found = [data.scaling.apply(picture).tolist() for (split, _), picture in pictures.items() if split == "train"]
    assert all(row["image"].tolist() in found for row in data.train)
    assert isinstance(data.train[0]["labels"], Image.Image)
