import numpy as np
import pytest
import torch
from PIL import Image

from pals_hf.visualize import palette, prediction_sheet, training_curves


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


@pytest.mark.parametrize("history", [[], [{"loss": 1.0, "step": 1}, {"eval_mean_iou": None, "step": 1}]])
def test_curves(tmp_path, history):
    pytest.importorskip("matplotlib")
    training_curves(history, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 400
