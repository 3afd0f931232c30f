import numpy as np
import pytest
import torch
from PIL import Image

from pals_hf.visualize import heat_map, index_picture, legend, overlay, palette, prediction_sheet, training_curves


def test_palette_has_one_colour_a_class():
    colors = palette(150)
    assert len({tuple(color) for color in colors[:150].tolist()}) == 150
    assert colors[255].tolist() == [0, 0, 0]
    assert [0, 0, 0] not in colors[:150].tolist()


def test_sheet_shows_image_truth_prediction_and_legend(tmp_path):
    names = {0: "left", 1: "right"}
    truth = np.zeros((150, 200), dtype=np.uint8)
    truth[:, 100:] = 1
    truth[:10] = 255
    prediction = torch.ones(150, 200, dtype=torch.int64)
    image = Image.new("RGB", (200, 150), (1, 2, 3))
    prediction_sheet([(image, Image.fromarray(truth), prediction)] * 2, names, tmp_path / "sheet.png")
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    colors = palette(2)
    assert sheet.shape[0] >= 2 * 150
    middle = 18 + 75  # below the titles
    assert sheet[middle, 50].tolist() == [1, 2, 3]
    assert sheet[middle, 204 + 50].tolist() == colors[0].tolist()
    assert sheet[middle, 204 + 150].tolist() == colors[1].tolist()
    assert sheet[18 + 5, 204 + 50].tolist() == [0, 0, 0]
    assert sheet[middle, 2 * 204 + 50].tolist() == colors[1].tolist()
    legend = sheet[:, 3 * 204 :].reshape(-1, 3)
    for color in colors[[0, 1, 255]]:
        assert (legend == color).all(axis=1).any()


def test_sheet_of_images_of_different_sizes(tmp_path):
    rows = [(Image.new("RGB", size), Image.new("L", size), torch.zeros(size[::-1])) for size in ((40, 30), (60, 50))]
    prediction_sheet(rows, {0: "a", 1: "b"}, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 3 * 60 * 4  # enlarged


def colors_of(picture):
    return {tuple(color) for color in np.asarray(picture).reshape(-1, 3).tolist()}


def test_overlay_has_the_picture_under_its_colours_and_a_legend_of_what_it_shows():
    names = {0: "sky", 1: "road", 2: "car"}
    mask = np.zeros((100, 80), dtype=np.int64)
    mask[50:] = 2
    picture = overlay(Image.new("RGB", (80, 100), (100, 200, 50)), torch.from_numpy(mask), names)
    pixels, colors = np.asarray(picture, dtype=int), palette(3).astype(int)
    for row, label in ((10, 0), (90, 2)):
        assert np.abs(pixels[row, 40] - ([100, 200, 50] + colors[label]) / 2).max() <= 1
    shown = colors_of(picture.crop((80, 0, picture.width, picture.height)))
    assert {tuple(colors[0]), tuple(colors[2])} < shown
    assert tuple(colors[1]) not in shown
    own = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    assert colors_of(overlay(Image.new("RGB", (80, 100)), mask, names, own).crop((80, 0, 140, 100))) >= {(1, 2, 3)}


def test_a_legend_of_any_names():
    assert legend([("a" * 100_000, (9, 9, 9)), ("two\nlines", (9, 9, 9)), ("", (9, 9, 9))]).width < 1000


def test_a_strip_has_a_small_legend():
    strip = overlay(Image.new("RGB", (1, 200_000)), np.zeros((200_000, 1)), {0: "sky", 1: "road"})
    assert strip.width < 100  # the memory for a font of 5000 would be a terabyte


def test_a_legend_has_room_for_its_names_and_grows_with_the_picture():
    entries = [("a name that is rather long for a class", (9, 9, 9)), ("x", (8, 8, 8))]
    assert legend(entries).width > legend(entries[1:]).width > 20
    assert legend(entries).height == 2 * legend(entries[:1]).height
    edge = np.asarray(legend(entries))[:, -4:]
    assert (edge == 255).all()  # nothing is cut off
    small, large = (overlay(Image.new("RGB", (9, h)), np.zeros((h, 9)), {0: "sky", 1: "road"}) for h in (90, 3000))
    assert large.width > 4 * small.width
    assert small.height == 90


def test_index_picture_keeps_indices_and_has_colours(tmp_path):
    mask = np.random.default_rng(0).integers(0, 150, (20, 30))
    index_picture(torch.from_numpy(mask), 150).save(tmp_path / "mask.png")
    read = Image.open(tmp_path / "mask.png")
    assert read.mode == "P"
    assert np.array_equal(np.asarray(read), mask)
    assert np.array_equal(np.asarray(read.convert("RGB")), palette(150)[mask])


def test_heat_map_goes_from_dark_to_bright():
    picture = heat_map(torch.linspace(0, 1, 101).expand(50, 101))
    pixels = np.asarray(picture)[:50, :101].astype(int)
    assert pixels[0, 0].tolist() == [0, 0, 4]
    assert pixels[0, 100].tolist() == [252, 253, 191]
    brightness = pixels[0].sum(axis=1)
    assert (np.diff(brightness) > 0).all()
    assert {(0, 0, 4), (252, 253, 191), tuple(pixels[0, 50])} <= colors_of(picture.crop((101, 0, *picture.size)))


@pytest.mark.parametrize("history", [[], [{"loss": 1.0, "step": 1}, {"eval_mean_iou": None, "step": 1}]])
def test_curves(tmp_path, history):
    pytest.importorskip("matplotlib")
    training_curves(history, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 400
