#!/usr/bin/env python
"""Export a trained model to ONNX, and check it with onnxruntime before anything is kept.

    pip install -e ".[onnx]"
    python examples/export_onnx.py runs/mine mine.onnx --image street.jpg

The file maps `pixel_values` (batch, 3, height, width), what the model's image processor makes of an image, to `logits`
(batch, classes, rows, columns). The batch is free; height and width are too where the network allows it, and else
those that the image processor makes of `--image`. Checked are that image and random ones, at several sizes where these
are free: logits may differ by 1e-4 of the largest one, and at least 99.9 % of the cells must have the same class.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from run_seg_pals import OneLineParser, fail
from torch import Tensor, nn

from pals_hf.data.synthetic import generate_scene
from pals_hf.errors import InputError, first_line
from pals_hf.functional import upsample
from pals_hf.inference import load_for_inference, read_pictures

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

TOLERANCE = 1e-4  # of the largest logit
AGREEMENT = 0.999  # share of cells of the same class
STEP = 32  # networks halve an image up to five times: to its multiples all of them can be applied


class Logits(nn.Module):
    """A network that returns nothing but its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder of a trained model, or its name on the Hub.")
    parser.add_argument("file", type=Path, help="The file to write, NAME.onnx.")
    parser.add_argument("--image", type=Path, help="Image to check it with. Default: a built-in street scene.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the file.")
    try:
        args = parser.parse_args(argv)
        require_packages()
        check_file(args.file, args.overwrite)
        image = generate_scene((0,))[0] if args.image is None else next(read_pictures(args.image))
        model, processor = load_for_inference(args.model, "cpu")
        pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
        print("\n".join(export(model.float(), pixel_values, args.file)))
    except InputError as error:
        fail(error)
    print(f"\nwritten to {args.file}")


def require_packages() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"the export needs {error.name}: pip install 'pals_hf[onnx]'") from error


def check_file(file: Path, overwrite: bool) -> None:
    if file.is_dir() or file.suffix != ".onnx":
        raise InputError(f"{file} must be a file NAME.onnx")
    if file.exists() and not overwrite:
        raise InputError(f"{file} exists: use --overwrite or another name")


def export(model: nn.Module, pixel_values: Tensor, file: Path) -> list[str]:
    """Write the network as ONNX once it has been checked, or not at all.

    Args:
        model: a network in float32, on the CPU and in evaluation mode.
        pixel_values: `(1, 3, H, W)`, what the image processor made of a real image.
        file: NAME.onnx.

    Returns:
        What to tell of it, line by line.

    Raises:
        InputError: the network cannot be exported, or what was exported computes something else.
    """
    network = Logits(model).eval()
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent, prefix=".onnx-") as folder:
        draft = Path(folder, file.name)
        for is_free in (False,) if pools_to_a_grid(network) else (True, False):
            try:
                write_draft(network, pixel_values, draft, is_free)
                lines = check_draft(network, pixel_values, draft, is_free)
                break
            except InputError as error:
                problem = error
        else:
            raise InputError(f"{type(model).__name__} cannot be exported: {problem}") from problem
        # Where weights are too large for the file they lie in one beside it: the file that refers to them comes last.
        for path in sorted(Path(folder).iterdir(), key=lambda path: path == draft):
            os.replace(path, file.parent / path.name)
    return lines


def pools_to_a_grid(network: nn.Module) -> bool:
    """Whether it averages over cells whose borders depend on the size, which ONNX cannot say for a free one."""
    pools = [layer for layer in network.modules() if isinstance(layer, nn.AdaptiveAvgPool2d)]
    return any(pool.output_size not in (1, (1, 1)) for pool in pools)


def write_draft(network: nn.Module, pixel_values: Tensor, draft: Path, is_free: bool) -> None:
    sides = {2: "height", 3: "width"} if is_free else {}
    try:
        program = torch.onnx.export(
            network,
            (pixel_values.repeat(2, 1, 1, 1),),  # of one image the exporter would take the 1 for a constant
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch", **sides},),
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(first_line(error)) from error
    program.save(draft)


def check_draft(network: nn.Module, pixel_values: Tensor, draft: Path, is_free: bool) -> list[str]:
    """Compare the file with the network.

    Returns:
        The sizes it is for, and the differences that were found.

    Raises:
        InputError: it differs on an image of this size or, where sizes are free, of a multiple of `STEP`.
    """
    session = onnxruntime_session(draft)
    height, width = pixel_values.shape[2:]
    rows, columns = (STEP * math.ceil(side / STEP) for side in (height, width))
    sizes = [(height, width), (rows, columns), (rows + STEP, columns + 2 * STEP)] if is_free else [(height, width)]
    lines = [compare(network, session, pixel_values, size) for size in dict.fromkeys(sizes)]
    if not is_free:
        return [f"images of {height}x{width}, any batch", *lines]
    try:
        lines.append(compare(network, session, pixel_values, (rows + 9, columns + 21)))
    except InputError:
        return [f"images whose sides are multiples of {STEP}, any batch", *lines]
    return ["images of any size, any batch", *lines]


def onnxruntime_session(file: Path) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is caught
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def compare(network: nn.Module, session: InferenceSession, pixel_values: Tensor, size: Sequence[int]) -> str:
    """Compare both on a batch of three: the image, brought to a size, and two of random values.

    Returns:
        The largest difference and the share of cells of the same class, in a line.

    Raises:
        InputError: they differ by more than `TOLERANCE` and `AGREEMENT` allow, or one of them fails.
    """
    image = upsample(pixel_values, size)
    images = torch.cat([image, torch.randn((2, *image.shape[1:]), generator=torch.Generator().manual_seed(0))])
    at = f"at {size[0]}x{size[1]}"
    try:
        expected = network(images).numpy()
        (found,) = session.run(None, {"pixel_values": images.numpy()})
    except Exception as error:  # onnxruntime's errors have no common type
        raise InputError(f"{at} it fails: {first_line(error)}") from error
    if found.shape != expected.shape:
        raise InputError(f"{at} its logits are {found.shape}, not {expected.shape}")
    difference, largest = np.abs(found - expected).max(), np.abs(expected).max()
    agreement = (found.argmax(axis=1) == expected.argmax(axis=1)).mean()
    line = f"{at}: largest difference {difference:.2g} (largest logit {largest:.3g}), same class {agreement:.3%}"
    if not (difference <= TOLERANCE * largest and agreement >= AGREEMENT):
        raise InputError(line)
    return line


if __name__ == "__main__":
    main()
