from itertools import pairwise

import pytest
import torch
from conftest import tiny_segformer
from torch import nn
from transformers.modeling_outputs import SemanticSegmenterOutput

from pals_hf.inference import _starts, window_logits


class Local(nn.Module):
    """A network without context: what it says of a cell depends on the pixels of this cell alone."""

    def __init__(self, stride):
        super().__init__()
        self.pool, self.head = nn.AvgPool2d(stride), nn.Conv2d(3, 4, 1)

    def forward(self, pixel_values):
        return SemanticSegmenterOutput(logits=self.head(self.pool(pixel_values)))


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("window", [(32, 32), (16, 48), (32, 100)])
def test_windows_change_nothing_for_a_network_without_context(stride, window):
    pixels = torch.randn(2, 3, 64, 96)
    network = Local(stride).eval()
    assert torch.allclose(window_logits(network, pixels, window, 0.5), network(pixels).logits, atol=1e-6)


def test_one_window_is_the_whole_image():
    network, pixels = tiny_segformer().eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = network(pixel_values=pixels).logits
    assert torch.equal(window_logits(network, pixels, (64, 96)), expected)
    assert torch.equal(window_logits(network, pixels, (100, 200)), expected)


def test_off_the_grid_the_logits_have_the_size_of_the_image():
    network, pixels = tiny_segformer().eval(), torch.randn(1, 3, 66, 95)
    assert window_logits(network, pixels, (32, 32)).shape == (1, 4, 66, 95)


@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.9])
def test_windows_cover_everything_and_overlap_enough(overlap):
    for whole in range(1, 80):
        for part in range(1, whole + 1, 7):
            starts = _starts(whole, part, overlap)
            assert starts[0] == 0
            assert starts[-1] + part == whole
            steps = [b - a for a, b in pairwise(starts)]
            assert all(0 < step <= max(1, part * (1 - overlap)) + 1 for step in steps)
            assert all(step <= part for step in steps)
