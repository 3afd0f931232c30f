"""`pals-hf predict` on images, folders, animations and videos, sound ones and damaged ones."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import hub
import numpy as np
import pytest
import torch
from launching import call, time_limit
from PIL import Image
from test_checkpoints import files_of_at_most
from trained import NAMES, patches, save_checkpoint
from transformers import pipeline

from pals_hf.cli import predict
from pals_hf.inference import load_for_inference, read_pictures
from pals_hf.inference import predict as predict_images
from pals_hf.visualize import heat_map, palette

EXAMPLES = Path(__file__).parents[2] / "examples"

loopback_hub = pytest.fixture(hub.serving)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photos(tmp_path):
    """Write nested folders with a rotated image, a grey image, and a file that is not an image."""
    folder = tmp_path / "photos"
    (folder / "a b" / "deep").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 8
    patches(75, 50).save(folder / "turned.jpg", exif=exif)
    patches(61, 47, 1).convert("L").save(folder / "a b" / "grey.PNG")
    patches(48, 32, 2).save(folder / "a b" / "deep" / "straße.bmp")
    (folder / "notes.txt").write_text("no image")
    return folder


def run(*arguments):
    return call(predict.main, *arguments)


def read_report(folder):
    return json.loads((folder / "predictions.json").read_text(encoding="utf-8"))


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_predicted_as_pipeline_does_it(model, photos, tmp_path):
    output = tmp_path / "out"
    result = run(photos, "--model", model, "--output_dir", output, "--uncertainty")
    assert result.returncode == 0, result.stderr
    names = ["a b/deep/straße", "a b/grey", "turned"]
    kinds = ("mask", "overlay", "uncertainty")
    assert files_below(output) == sorted(["predictions.json", *(f"{n}_{k}.png" for n in names for k in kinds)])
    report = read_report(output)
    assert (report["model"], report["revision"]) == (str(model), None)
    segment = pipeline("image-segmentation", model=str(model), device="cpu")
    total = np.zeros(4, dtype=int)
    for entry, name in zip(report["images"], names, strict=True):
        mask = Image.open(output / f"{name}_mask.png")
        assert (mask.mode, mask.size) == ("P", (entry["width"], entry["height"]))
        indices = np.asarray(mask)
        found = {part["label"]: np.asarray(part["mask"]) > 0 for part in segment(entry["file"])}
        assert len(found) > 1
        for part in entry["classes"]:
            expected = found.get(part["name"], np.zeros_like(indices, dtype=bool))
            assert np.array_equal(indices == part["id"], expected)
            assert part["pixels"] == expected.sum()
            assert part["share"] == expected.mean()
        assert entry["frame"] is None
        assert [entry["files"][kind] for kind in kinds] == [f"{name}_{kind}.png" for kind in kinds]
        total += [part["pixels"] for part in entry["classes"]]
    turned = report["images"][2]
    assert (turned["width"], turned["height"]) == (50, 75)
    table = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.split()}
    for name, pixels in zip(NAMES.values(), total, strict=True):
        if pixels:
            assert table[name][0] == f"{pixels / total.sum():.2%}"
    assert "3 images, mean entropy" in result.stdout


def test_overlay_and_uncertainty_show_the_prediction(model, tmp_path):
    patches(90, 60).save(tmp_path / "street.png")
    output = tmp_path / "out"
    assert run(tmp_path / "street.png", "--model", model, "--output_dir", output, "--uncertainty").returncode == 0
    network, processor = load_for_inference(str(model), "cpu")
    image = next(read_pictures(tmp_path / "street.png"))
    (expected,) = predict_images(network, processor, [image])
    pixels = np.asarray(Image.open(output / "street_overlay.png"))[:60, :90].astype(int)
    colors = palette(4)[expected.mask.numpy()]
    assert np.abs(pixels - (np.asarray(image).astype(int) + colors) / 2).max() <= 1
    heat = np.asarray(heat_map(expected.entropy / math.log(4)))
    assert np.array_equal(np.asarray(Image.open(output / "street_uncertainty.png")), heat)
    (entry,) = read_report(output)["images"]
    assert entry["mean_entropy"] == pytest.approx(float(expected.entropy.mean()))


def test_windows_flips_and_batches_reach_the_network(model, tmp_path):
    for index in range(3):
        patches(60, 40, index).save(tmp_path / f"{index}.png")
    options = ["--window", 32, 32, "--overlap", 0.25, "--flip", "--batch_size", 2, "--device", "cpu"]
    result = run(tmp_path, "--model", model, "--output_dir", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    network, processor = load_for_inference(str(model), "cpu")
    report = read_report(tmp_path / "out")
    assert (report["window"], report["overlap"], report["flip"]) == ([32, 32], 0.25, True)
    for index, entry in enumerate(report["images"]):
        (expected,) = predict_images(network, processor, [patches(60, 40, index)], (32, 32), 0.25, True)
        found = np.asarray(Image.open(tmp_path / "out" / f"{index}_mask.png"))
        assert (found == expected.mask.numpy()).mean() > 0.999
        assert entry["mean_entropy"] == pytest.approx(float(expected.entropy.mean()), rel=1e-3)
        (plain,) = predict_images(network, processor, [patches(60, 40, index)])
        assert not np.array_equal(found, plain.mask.numpy())


def test_images_of_one_name_have_results_of_their_own(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed, name in enumerate(("street.png", "street.bmp", "STREET.tif", "other.png")):
        patches(40, 30 + seed, seed).save(photos / name)
    assert run(photos, "--model", model, "--output_dir", tmp_path / "out").returncode == 0
    for entry in read_report(tmp_path / "out")["images"]:
        assert entry["files"]["mask"] == f"{Path(entry['file']).name}_mask.png"
        assert Image.open(tmp_path / "out" / entry["files"]["mask"]).height == entry["height"]
    assert len(files_below(tmp_path / "out")) == 4 * 2 + 1


def test_an_animation_is_predicted_frame_by_frame(model, tmp_path):
    frames = [patches(40, 30, seed).quantize(24) for seed in range(3)]
    frames[0].save(tmp_path / "walk.gif", save_all=True, append_images=frames[1:])
    patches(40, 30).save(tmp_path / "walk_00001.png")  # named like a frame
    result = run(tmp_path, "--model", model, "--output_dir", tmp_path / "out", "--batch_size", 2)
    assert result.returncode == 0, result.stderr
    entries = read_report(tmp_path / "out")["images"]
    assert [entry["frame"] for entry in entries] == [0, 1, 2, None]
    masks = [entry["files"]["mask"] for entry in entries]
    assert masks == [*(f"walk.gif_0000{index}_mask.png" for index in range(3)), "walk_00001.png_mask.png"]
    network, processor = load_for_inference(str(model), "cpu")
    for frame, name in zip(frames, masks, strict=False):
        (expected,) = predict_images(network, processor, [frame])
        assert (np.asarray(Image.open(tmp_path / "out" / name)) == expected.mask.numpy()).mean() > 0.99


class TestVideo:
    @staticmethod
    def write(path, rotation=0):
        """Write four frames of 64x32 that become brighter. Their upper left quarter is red."""
        av = pytest.importorskip("av", reason="needs the extra `video`")
        with av.open(str(path), "w") as video:
            stream = video.add_stream("mpeg4", rate=5)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 32, "yuv420p", 4_000_000
            if rotation:
                if not hasattr(stream, "set_display_rotation"):
                    pytest.skip("this PyAV cannot write turned videos")
                stream.set_display_rotation(rotation)
            for index in range(4):
                pixels = np.full((32, 64, 3), 60 * index, dtype=np.uint8)
                pixels[:16, :32] = (255, 0, 0)
                video.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            video.mux(stream.encode())
        return path

    def test_every_frame(self, model, tmp_path):
        film = self.write(tmp_path / "film.mp4")
        frames = list(predict.read_video(film))
        assert [frame.size for frame in frames] == [(64, 32)] * 4
        assert [frame.getpixel((60, 28))[1] // 50 for frame in frames] == [0, 1, 2, 3]
        result = run(film, "--model", model, "--output_dir", tmp_path / "out")
        assert result.returncode == 0, result.stderr
        entries = read_report(tmp_path / "out")["images"]
        assert [entry["files"]["mask"] for entry in entries] == [f"film_0000{index}_mask.png" for index in range(4)]
        network, processor = load_for_inference(str(model), "cpu")
        for frame, entry in zip(frames, entries, strict=True):
            (expected,) = predict_images(network, processor, [frame])
            assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / entry["files"]["mask"])), expected.mask)

    def test_filmed_with_a_turned_camera(self, tmp_path):
        frame = next(predict.read_video(self.write(tmp_path / "film.mp4", rotation=90)))
        assert frame.size == (32, 64)
        red, green, _ = frame.getpixel((5, 60))  # turned counter-clockwise, the upper left is the lower left
        assert red > 150 > green

    def test_damaged_videos(self, model, tmp_path):
        whole = self.write(tmp_path / "film.mp4").read_bytes()
        (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "empty.webm").touch()
        for name in ("cut.mp4", "empty.webm"):
            result = run(tmp_path / name, "--model", model, "--output_dir", tmp_path / "out")
            assert result.returncode == 2
            assert f"error: {tmp_path / name} is not a readable video: " in result.stderr

    def test_without_a_decoder(self, model, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        (tmp_path / "film.mp4").write_bytes(b"film")
        result = run(tmp_path / "film.mp4", "--model", model, "--output_dir", tmp_path / "out")
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1].endswith(
            "film.mp4: videos need PyAV. Install it with: pip install 'pals_hf[video]'"
        )


def test_results_are_only_overwritten_with_the_flag(model, tmp_path):
    street, output = tmp_path / "street.png", tmp_path / "out"
    patches(40, 30).save(street)
    assert run(street, "--model", model, "--output_dir", output, "--uncertainty").returncode == 0
    (output / "mine.txt").write_text("mine")
    before = {name: (output / name).read_bytes() for name in files_below(output)}
    again = ["--model", model, "--output_dir", output]
    result = run(street, *again)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: output_dir {output} already contains predictions.json. Use --overwrite or another folder.\n"
    )
    assert {name: (output / name).read_bytes() for name in files_below(output)} == before
    patches(40, 30, 1).save(tmp_path / "other.png")
    result = run(tmp_path / "other.png", *again, "--overwrite")
    assert result.returncode == 0, result.stderr
    assert files_below(output) == ["mine.txt", "other_mask.png", "other_overlay.png", "predictions.json"]


def test_a_mask_of_somebody_else_is_not_overwritten(model, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    patches(40, 30).save(tmp_path / "images" / "street.png")
    (tmp_path / "masks" / "street_mask.png").write_text("drawn by hand")
    result = run(tmp_path / "images", "--model", model, "--output_dir", tmp_path / "masks")
    assert result.returncode == 2
    assert "already contains street_mask.png" in result.stderr
    assert (tmp_path / "masks" / "street_mask.png").read_text() == "drawn by hand"


def test_results_among_the_images_are_no_images(model, photos):
    output = photos / "results"
    for options in ([], ["--overwrite"]):
        result = run(photos, "--model", model, "--output_dir", output, *options)
        assert result.returncode == 0, result.stderr
        assert len(read_report(output)["images"]) == 3


def test_an_old_report_does_not_name_files_elsewhere(model, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (tmp_path / "precious.png").write_text("precious")
    (output / "predictions.json").write_text(json.dumps({"images": [{"files": {"mask": "../precious.png"}}]}))
    patches(40, 30).save(tmp_path / "street.png")
    assert run(tmp_path / "street.png", "--model", model, "--output_dir", output, "--overwrite").returncode == 0
    assert (tmp_path / "precious.png").read_text() == "precious"


@pytest.mark.parametrize(
    "images",
    [
        *([], 1, [1], [{"files": []}], [{"files": {"a": 5}}], [{"files": {"a": "keep.txt"}}]),
        [
            {
                "files": {
                    "a": "link_mask.png",
                    "b": "folder/../keep_mask.txt",
                    "c": "folder_mask.png",
                    "d": "a\0_mask.png",
                }
            }
        ],
        [{"files": {"a": "../keep_mask.png", "b": "elsewhere/keep_mask.png"}}],
    ],
)
def test_a_report_of_somebody_else_deletes_nothing(images, tmp_path):
    output = tmp_path / "out"
    (output / "folder_mask.png").mkdir(parents=True)
    for kept in (output / "keep.txt", tmp_path / "keep_mask.png"):
        kept.touch()
    (output / "link_mask.png").symlink_to(tmp_path / "keep_mask.png")
    (output / "elsewhere").symlink_to(tmp_path)
    before = files_below(tmp_path)
    (output / "predictions.json").write_text(json.dumps({"images": images}))
    predict.prepare_output_dir(output)
    assert files_below(tmp_path) == before
    (output / "predictions.json").write_text("[" * 100_000)
    predict.prepare_output_dir(output)
    assert files_below(tmp_path) == before


def test_links_in_a_circle_are_followed_once(tmp_path):
    photos, real = tmp_path / "photos", tmp_path / "real"
    for place in (photos, real):
        place.mkdir()
        patches(40, 30).save(place / "street.png")
    for name in ("one", "two"):
        (photos / name).symlink_to(".")
    (photos / "other").symlink_to(real)
    (real / "back").symlink_to(photos)
    with time_limit(60):
        _, files = predict.find_files(photos, tmp_path / "out")
    assert files == [photos / "other" / "street.png", photos / "street.png"]


@pytest.mark.parametrize("kind", ["pipe", "device", "dangling"])
def test_what_is_no_file_ends_in_one_line(kind, model, tmp_path):
    path = tmp_path / "photos" / "street.png"
    path.parent.mkdir()
    {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "dangling": lambda: path.symlink_to("nothing"),
    }[kind]()
    with time_limit(60):
        result = run(path.parent, "--model", model, "--output_dir", tmp_path / "out")
    assert result.returncode == 2
    reason = "No such file" if kind == "dangling" else "street.png is not a regular file"
    assert f"error: {path} is not a readable image: " in result.stderr
    assert reason in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_part_of_a_picture(model, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "s.png")
    with files_of_at_most(4000):
        result = run(tmp_path / "s.png", "--model", model, "--output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert (
        result.stderr.splitlines()[-1]
        == f"error: {tmp_path / 'out' / 's_overlay.png'} cannot be written: File too large"
    )
    assert files_below(tmp_path / "out") == []


def test_wrong_input_ends_in_one_line_before_anything_is_written(model, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    damaged = photos / "b" / "damaged.jpg"  # in the middle of the others
    damaged.parent.mkdir()
    patches(300, 300).save(damaged)
    good = damaged.read_bytes()
    flags = {"--model": model, "--output_dir": tmp_path / "out"}
    cases = [
        (damaged.parent, {"--model": tmp_path / "nowhere"}, "there is no such folder"),
        (damaged.parent, {"--window": [0, 8]}, "window must be two positive numbers"),
        (damaged.parent, {"--window": [8, 8]}, "damaged.jpg: the network fails on 300x300 pixels"),
        (damaged.parent, {"--overlap": 1.0}, "overlap must lie in [0, 1)"),
        (damaged.parent, {"--batch_size": 0}, "batch_size must be positive"),
        (damaged.parent, {"--batch_size": "x"}, "--batch_size"),
        (damaged.parent, {"--device": "warp"}, "device 'warp' cannot be used"),
        (damaged.parent, {"--output_dir": damaged.parent}, "is the folder of the images"),
        (damaged.parent, {"--output_dir": tmp_path / "file"}, f"output_dir {tmp_path / 'file'} is a file"),
        (tmp_path / "empty", {}, f"{tmp_path / 'empty'} has no images"),
        (tmp_path / "nothing", {}, f"{tmp_path / 'nothing'} is neither a file nor a folder"),
        (photos / "notes.txt", {}, "notes.txt is not a readable image: its format is not known"),
        (photos, {}, f"{damaged} is not a readable image"),
    ]
    for given, changed, reason in cases:
        damaged.write_bytes(good if given == damaged.parent else good[: len(good) // 2])
        before = files_below(tmp_path)
        arguments = {**flags, **changed}
        values = [value if isinstance(value, list) else [value] for value in arguments.values()]
        result = run(given, *(part for name, value in zip(arguments, values, strict=True) for part in (name, *value)))
        assert result.returncode == 2, reason
        *progress, line = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert reason in line
        assert all("Loading weights" in other or not other for other in progress)
        assert files_below(tmp_path) == before


def test_a_network_that_has_diverged(model, tmp_path):
    network, processor = load_for_inference(str(model), "cpu")
    network.decode_head.classifier.bias.data.fill_(torch.nan)
    for part in (network, processor):
        part.save_pretrained(tmp_path / "diverged")
    patches(40, 30).save(tmp_path / "street.png")
    result = run(tmp_path / "street.png", "--model", tmp_path / "diverged", "--output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert "street.png: the logits are not finite" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_and_its_revision(loopback_hub, model, tmp_path):
    """In another process, because the client reads its environment when it is imported."""
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    loopback_hub.repositories["model", "me/streets"] = hub.Repository(commits=[("c0ffee" + "0" * 34, files)])
    patches(40, 30).save(tmp_path / "street.png")
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": loopback_hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, EXAMPLES / "predict.py", tmp_path / "street.png", "--model", "me/streets"]
    command += ["--output_dir", tmp_path / "out"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    report = read_report(tmp_path / "out")
    assert (report["model"], report["revision"]) == ("me/streets", "c0ffee" + "0" * 34)
