"""Tiny checkpoints whose predictions are no constant."""

import numpy as np
import torch
from conftest import tiny_segformer
from PIL import Image
from torch import nn

from pals_hf.models import build_image_processor
from pals_hf.tap import ClassifierTap

NAMES = {0: "ground", 1: "wall", 2: "sky", 3: "car"}


def patches(width, height, seed=0):
    """A picture of a few colours, which networks find different."""
    colors = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((width, height), Image.Resampling.NEAREST)


def enliven(network):
    """As if trained: batch statistics that fit, and a classifier for which all classes are about as likely."""
    network.config.id2label = NAMES
    images = nn.functional.interpolate(torch.randn(4, 3, 4, 6), (64, 96))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        network.train()(pixel_values=images)
        for layer in ClassifierTap(network).layers.values():
            nn.init.normal_(layer.weight)
            layer.bias -= network.eval()(pixel_values=images).logits.mean(dim=(0, 2, 3))
    return network


def save_checkpoint(folder, network=None, image_size=(32, 48)):
    """Write one for `from_pretrained`; without a network, a SegFormer."""
    network = enliven(network or tiny_segformer())
    network.save_pretrained(folder)
    build_image_processor(None, image_size).save_pretrained(folder)
    return folder
