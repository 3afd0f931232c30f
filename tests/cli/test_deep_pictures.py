"""Trainings and predictions on deep pictures, as users start them."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_segformer
from deep_pictures import convert_folder, scale_by_hand, tiff, values_of, write_folder
from launching import call
from PIL import Image
from safetensors.torch import load_file
from trained import NAMES, enliven
from transformers import AutoModelForSemanticSegmentation, pipeline

from pals_hf.cli import calibrate, export, inspect_data, predict, train
from pals_hf.data import Scaling
from pals_hf.inference import load_for_inference, read_pictures
from pals_hf.inference import predict as predict_images
from pals_hf.models import build_image_processor

pytest.importorskip("tifffile")
SHORT = ["--per_device_train_batch_size", "2", "--disable_tqdm", "True", "--eval_strategy", "no", "--save_steps", "1"]


def run(folder, output, steps, *options):
    where = ["--dataset_dir", folder, "--output_dir", output, "--max_steps", steps]
    return call(train.main, *where, *SHORT, *options)


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A folder of grey pictures of 16 bits, the same pictures converted by hand, and a run on each."""
    root = tmp_path_factory.mktemp("grey")
    pictures = write_folder(root / "deep")
    convert_folder(root / "deep", root / "converted", pictures)
    tiny_segformer(num_labels=3).save_pretrained(root / "tiny")
    ours, theirs = (
        run(root / folder, root / name, 2, "--model_name_or_path", root / "tiny")
        for folder, name in (("deep", "run"), ("converted", "by hand"))
    )
    assert (ours.returncode, theirs.returncode) == (0, 0), ours.stderr
    root.joinpath("printed").write_text(ours.stderr)
    return root


def test_a_training_on_16_bits_is_that_on_the_converted_files(grey):
    """Bit by bit, and so are its results."""
    ours, theirs = (load_file(grey / name / "model.safetensors") for name in ("run", "by hand"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((grey / name / "eval_results.json").read_text()) for name in ("run", "by hand"))
    assert ours["eval_loss"] == theirs["eval_loss"]
    assert (grey / "run" / "predictions.png").read_bytes() == (grey / "by hand" / "predictions.png").read_bytes()


def test_the_scaling_is_said_and_kept(grey):
    processor = json.loads((grey / "run" / "preprocessor_config.json").read_text())["picture_scaling"]
    assert (processor["dtype"], processor["channels"]) == ("uint16", 3)
    (low,), (high,) = processor["low"], processor["high"]
    (note,) = [line for line in (grey / "printed").read_text().splitlines() if line.startswith("note: The images")]
    assert f"uint16 values in 1 band. The network sees 8 bits of them: 0 to 255 stand for {low:g} to {high:g}" in note
    assert "`pipeline` reads such files without this scaling: use `pals-hf predict`" in note
    card = (grey / "run" / "README.md").read_text()
    assert "pals-hf predict images" in card
    assert "transformers import pipeline" not in card
    assert "transformers import pipeline" in (grey / "by hand" / "README.md").read_text()


def test_a_prediction_on_16_bits_is_that_of_pipeline_on_the_converted_files(grey, tmp_path):
    """With a network whose predictions are no constant, and the image processor of the run."""
    enliven(tiny_segformer(num_labels=4)).save_pretrained(tmp_path / "model")
    load_for_inference(str(grey / "run"))[1].save_pretrained(tmp_path / "model")
    images = grey / "deep" / "val" / "images"
    result = call(predict.main, images, "--model", tmp_path / "model", "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    segment = pipeline("image-segmentation", model=str(tmp_path / "model"), device="cpu")
    labels = {name: index for index, name in NAMES.items()}
    for path in sorted(images.iterdir()):
        mask = np.asarray(Image.open(tmp_path / "out" / f"{path.stem}_mask.png"))
        parts = segment(str(grey / "converted" / "val" / "images" / f"{path.stem}.png"))
        assert len(parts) > 1
        assert all(np.array_equal(mask == labels[part["label"]], np.asarray(part["mask"]) > 0) for part in parts)
    raw = segment(str(path))  # what docs/data.md says of it: PIL makes white of nearly everything
    assert any(not np.array_equal(mask == labels[part["label"]], np.asarray(part["mask"]) > 0) for part in raw)


def test_a_calibration_on_16_bits_is_that_on_the_converted_files(grey, tmp_path):
    temperatures = []
    for name, folder in (("run", "deep"), ("by hand", "converted")):
        copy = shutil.copytree(grey / name, tmp_path / name)
        model = AutoModelForSemanticSegmentation.from_pretrained(copy)
        model.decode_head.classifier.weight.data *= 100  # so that it depends on the picture what is predicted
        model.decode_head.classifier.bias.data[0] += 3  # the most frequent class
        model.save_pretrained(copy)
        ended = call(calibrate.main, "--model_name_or_path", copy, "--dataset_dir", grey / folder)
        assert ended.returncode == 0, ended.stderr
        temperatures.append(json.loads((copy / "config.json").read_text())["calibration_temperature"])
    assert temperatures[0] == temperatures[1] != 1
    ended = call(calibrate.main, "--model_name_or_path", tmp_path / "run", "--dataset_dir", grey / "converted")
    assert "was trained on other images" in ended.stderr


def test_a_resumed_run_keeps_the_scaling(grey, tmp_path):
    before = (grey / "run" / "preprocessor_config.json").read_text()
    checkpoint = grey / "run" / "checkpoint-2"
    assert json.loads((checkpoint / "preprocessor_config.json").read_text()) == json.loads(before)
    again = ["--resume_from_checkpoint", "last", "--model_name_or_path", grey / "tiny"]
    result = run(grey / "deep", grey / "run", 3, *again)
    assert result.returncode == 0, result.stderr
    assert (grey / "run" / "preprocessor_config.json").read_text() == before
    scored = call(
        train.main,
        *("--dataset_dir", grey / "deep", "--output_dir", tmp_path / "scored", "--eval_only"),
        *("--model_name_or_path", grey / "run", "--disable_tqdm", "True"),
    )
    assert scored.returncode == 0, scored.stderr
    ours, again = (json.loads((at / "eval_results.json").read_text()) for at in (grey / "run", tmp_path / "scored"))
    assert ours["eval_loss"] == again["eval_loss"]


@pytest.mark.parametrize(
    ("model", "folder", "options", "was", "now"),
    [
        ("run", "deep", ["--channels", "1"], "uint16 values in 1 band, --channels 3", "1 band, --channels 1"),
        ("run", "converted", [], "uint16 values in 1 band, --channels 3", "8 bits per channel, --channels 3"),
        ("by hand", "deep", [], "8 bits per channel, --channels 3", "uint16 values in 1 band, --channels 3"),
    ],
)
def test_other_pictures_are_refused(model, folder, options, was, now, grey, tmp_path):
    place = ["--eval_only", "--model_name_or_path", grey / model]
    result = run(grey / folder, tmp_path / "out", 2, *place, *options)
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert f"was trained on other images ({was}) than those of the data set (" in line
    assert f"{now}). Use the same kind of images and --channels." in line
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_resume_with_other_channels(grey):
    options = ["--resume_from_checkpoint", "last", "--channels", "1"]
    result = run(grey / "deep", grey / "by hand", 3, *options)
    assert result.returncode == 2
    assert "error: " in result.stderr
    assert "was trained on other images (8 bits per channel, --channels 3)" in result.stderr


def test_wrong_channels_end_in_one_line(grey, tmp_path):
    result = run(grey / "deep", tmp_path / "out", 2, "--channels", "4")
    assert result.returncode == 2
    assert (
        "train 0.tif has uint16 values in 1 band, but the network takes 4 channels" in result.stderr.splitlines()[-1]
    )
    streamed = ["--streaming", "--crop_size", "16", "16"]
    result = run(grey / "deep", tmp_path / "out", 2, "--channels", "4", *streamed)
    assert result.stderr == "error: channels 4 does not work with streaming, which reads images of 3 channels\n"
    assert not (tmp_path / "out").exists()


def test_a_stack_of_four_bands_from_a_checkpoint_for_rgb(tmp_path):
    """It trains, is saved, loads by `from_pretrained`, predicts, is exported and inspected."""
    pictures = write_folder(tmp_path / "deep", "uint16", 4, validation=1)
    tiny_segformer(num_labels=3).save_pretrained(tmp_path / "rgb")
    build_image_processor(None).save_pretrained(tmp_path / "rgb")
    options = ["--channels", "4", "--model_name_or_path", tmp_path / "rgb"]
    result = run(tmp_path / "deep", tmp_path / "run", 1, *options)
    assert result.returncode == 0, result.stderr
    assert "`pipeline` cannot read such files: use `pals-hf predict`" in result.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_channels"] == 4
    network = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run").eval()
    image = tmp_path / "deep" / "val" / "images" / "val 0.tif"
    result = call(predict.main, image, "--model", tmp_path / "run", "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    scaled = scale_by_hand(pictures["val", "val 0"], pictures)
    (seen,) = read_pictures(image, scaling=Scaling.of(load_for_inference(str(tmp_path / "run"))[1]))
    assert np.array_equal(seen, scaled)
    (prediction,) = predict_images(network, load_for_inference(str(tmp_path / "run"))[1], [scaled])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "val 0_mask.png")), prediction.mask)
    report = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [report["images"][0][name] for name in ("width", "height")] == [48, 32]
    result = call(
        inspect_data.main, "--dataset_dir", tmp_path / "deep", "--channels", 4, "--output_dir", tmp_path / "report"
    )
    assert result.returncode == 0, result.stderr
    assert "The images have uint16 values in 4 bands." in result.stdout
    assert (tmp_path / "report" / "inspection.png").exists()


@pytest.mark.parametrize("given", [False, True])
def test_export_scales_the_image_as_the_model_does(given, tmp_path, monkeypatch):
    """By default the colours of a street scene repeat."""
    pytest.importorskip("onnxruntime")
    network, known = tiny_segformer(num_channels=4, num_labels=3), Scaling("uint16", 4, (0.0,) * 4, (900.0,) * 4)
    network.save_pretrained(tmp_path)
    build_image_processor(None, scaling=known).save_pretrained(tmp_path)
    values, _ = values_of("uint16", 4, 0)
    (tmp_path / "image.tif").write_bytes(tiff(values))
    seen = []
    monkeypatch.setattr(export, "export", lambda _, pixel_values, __: seen.append(pixel_values) or [])
    image = ["--image", tmp_path / "image.tif"] if given else []
    result = call(export.main, tmp_path, tmp_path / "model.onnx", *image)
    assert result.returncode == 0, result.stderr
    processor = load_for_inference(str(tmp_path))[1]
    expected = known.apply(values) if given else export.a_scene(4)
    assert torch.equal(seen[0], export.process(processor, expected))
    assert seen[0].shape[1] == 4


def test_a_video_is_no_deep_picture(grey, tmp_path):
    (tmp_path / "street.mp4").write_bytes(b"")
    result = call(predict.main, tmp_path / "street.mp4", "--model", grey / "run", "--output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert "street.mp4 is a video, but the model was trained on uint16 values in 1 band" in result.stderr


def test_a_network_and_an_image_processor_of_different_channels(grey, tmp_path):
    tiny_segformer(num_channels=4).save_pretrained(tmp_path)
    build_image_processor(None).save_pretrained(tmp_path)
    image = grey / "converted" / "val" / "images"
    result = call(predict.main, image, "--model", tmp_path, "--output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert "the network takes 4 channels, but the image processor makes images of 3." in result.stderr
