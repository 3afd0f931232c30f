"""Export a trained model to ONNX, and check the file with onnxruntime before it is kept.

    pip install 'pals_hf[onnx]'
    pals-hf export runs/mine mine.onnx --image street.jpg

The file maps `pixel_values` (batch, channels, height, width), the output of the image processor, to `logits` (batch,
classes, rows, columns). The batch size is dynamic. Height and width are dynamic if the network allows it; otherwise
they are the size that the image processor gives `--image`. The check runs on this image and on random images, at
several sizes if the size is dynamic. Logits may differ by 1e-4 of the largest logit, and at least 99.9 % of the
positions must have the same class.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..data.pictures import RGB
from ..data.scaling import Scaling, channels_of
from ..data.synthetic import generate_scene
from ..data.transforms import process
from ..errors import InputError, first_line
from ..files import make_folder, refuse_unwritable
from ..functional import upsample
from ..inference import load_for_inference, read_pictures
from ..pretrained import loading
from .ending import one_line
from .parser import OneLineParser

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from PIL import Image

TOLERANCE = 1e-4  # of the largest logit
AGREEMENT = 0.999  # share of positions with the same class
STEP = 32  # networks halve an image up to five times, so all of them accept multiples of this size


class Logits(nn.Module):
    """A network that returns only its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


@one_line()
def main(argv: list[str] | None = None) -> None:
    """Run the program on a command line, by default that of this process."""
    parser = OneLineParser(
        prog="pals-hf export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Folder of a trained model, or its name on the Hub.")
    parser.add_argument("file", type=Path, help="File to write, NAME.onnx.")
    parser.add_argument("--image", type=Path, help="Image for the check. Default: a built-in street scene.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the file if it exists.")
    args = parser.parse_args(argv)
    require_packages()
    check_file(args.file, args.overwrite)
    model, processor = load_for_inference(args.model, "cpu")
    image = a_scene(channels_of(processor))
    if args.image is not None:
        image = next(read_pictures(args.image, scaling=Scaling.of(processor)))
    with loading("the image processor of the model fails"):
        pixel_values = process(processor, image)
    print("\n".join(export(model.float(), pixel_values, args.file)))
    print(f"\nThe model is in {args.file}")


def a_scene(channels: int) -> Image.Image | np.ndarray:
    """Return a built-in street scene, whose colours repeat if the network takes other than 3 channels."""
    scene, _ = generate_scene((0,))
    return scene if channels == RGB else np.asarray(scene)[..., np.arange(channels) % RGB]


def require_packages() -> None:
    """Check that the packages of the extra `onnx` are installed.

    Raises:
        InputError: a package is missing.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"the export needs {error.name}. Install it with: pip install 'pals_hf[onnx]'") from error


def check_file(file: Path, overwrite: bool) -> None:
    """Check that the file can be written.

    Raises:
        InputError: its name does not end in .onnx, its folder cannot be written to, or the file exists and may not be
            replaced.
    """
    if file.is_dir() or file.suffix != ".onnx":
        raise InputError(f"{file} must be a file with the extension .onnx")
    refuse_unwritable(file.parent)
    if file.exists() and not overwrite:
        raise InputError(f"{file} exists. Use --overwrite, or choose another name.")


def export(model: nn.Module, pixel_values: Tensor, file: Path) -> list[str]:
    """Write the network as ONNX if the exported file passes the check, else write nothing.

    Args:
        model: a network in float32, on the CPU.
        pixel_values: `(1, C, H, W)`, the output of the image processor for a real image.
        file: NAME.onnx.

    Returns:
        The supported image sizes and the differences that the check found, as lines of text.

    Raises:
        InputError: the network cannot be exported, or the exported file computes other logits.
    """
    network = Logits(model).eval()
    make_folder(file.parent)
    with writing(file), TemporaryDirectory(dir=file.parent, prefix=".onnx-") as folder:
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
        # Large weights are in a second file. The file that refers to them is moved last.
        for path in sorted(Path(folder).iterdir(), key=lambda path: path == draft):
            os.replace(path, file.parent / path.name)
    return lines


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn errors of the disk into one line.

    Raises:
        InputError: the file cannot be written, for example because the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror or error}") from error


def pools_to_a_grid(network: nn.Module) -> bool:
    """Tell whether the network pools to a grid of fixed size, which ONNX cannot do for images of dynamic size."""
    pools = [layer for layer in network.modules() if isinstance(layer, nn.AdaptiveAvgPool2d)]
    return any(pool.output_size not in (1, (1, 1)) for pool in pools)


def write_draft(network: nn.Module, pixel_values: Tensor, draft: Path, is_free: bool) -> None:
    """Export the network, with dynamic height and width if `is_free`.

    Raises:
        InputError: the exporter fails.
    """
    sides = {2: "height", 3: "width"} if is_free else {}
    try:
        program = torch.onnx.export(
            network,
            (pixel_values.repeat(2, 1, 1, 1),),  # the exporter would treat a batch size of 1 as a constant
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
    """Compare the exported file with the network.

    Returns:
        The supported image sizes and the differences, as lines of text.

    Raises:
        InputError: the logits differ for this image size or, if sizes are dynamic, for a multiple of `STEP`.
    """
    session = onnxruntime_session(draft)
    height, width = pixel_values.shape[2:]
    rows, columns = (STEP * math.ceil(side / STEP) for side in (height, width))
    sizes = [(height, width), (rows, columns), (rows + STEP, columns + 2 * STEP)] if is_free else [(height, width)]
    lines = [compare(network, session, pixel_values, size) for size in dict.fromkeys(sizes)]
    if not is_free:
        return [f"The model takes images of height {height} and width {width}.", *lines]
    try:
        lines.append(compare(network, session, pixel_values, (rows + 9, columns + 21)))
    except InputError:
        return [f"The model takes images whose sides are multiples of {STEP}.", *lines]
    return ["The model takes images of any size.", *lines]


def onnxruntime_session(file: Path) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are caught and printed in one line
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def compare(network: nn.Module, session: InferenceSession, pixel_values: Tensor, size: Sequence[int]) -> str:
    """Compare the network and the exported file on a batch of three: the resized image and two random images.

    Returns:
        The largest difference of the logits and the share of positions with the same class, as a line of text.

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
        raise InputError(f"{at}: the model fails ({first_line(error)})") from error
    if found.shape != expected.shape:
        raise InputError(f"{at}: the logits have the shape {found.shape}, not {expected.shape}")
    difference, largest = np.abs(found - expected).max(), np.abs(expected).max()
    agreement = (found.argmax(axis=1) == expected.argmax(axis=1)).mean()
    line = f"{at}: largest difference {difference:.2g} (largest logit {largest:.3g}), same class {agreement:.3%}"
    if not (difference <= TOLERANCE * largest and agreement >= AGREEMENT):
        raise InputError(line)
    return line
