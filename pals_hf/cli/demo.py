"""Compare two trained models on an image in the browser.

    pip install 'pals_hf[demo]'
    pals-hf demo --models cross-entropy=runs/ce PALS=runs/pals

A model is a folder or a name on the Hub. The page contacts no server except for the download of models from the Hub.

The page also runs as a Space on Hugging Face: use `examples/app.py` as `app_file`, put `pals_hf[demo]` into
requirements.txt, and set the variable PALS_MODELS to the models, separated by commas:
`cross-entropy=me/street-ce,PALS=me/street-pals`.
"""

from __future__ import annotations

import argparse
import os
import signal
from typing import TYPE_CHECKING

from ..data.pictures import RGB
from ..data.scaling import Scaling
from ..errors import InputError
from .ending import one_line
from .parser import OneLineParser

if TYPE_CHECKING:
    from gradio import Blocks
    from transformers import BaseImageProcessor

MAX_FILE_SIZE = "50mb"  # of an upload


@one_line()
def main(argv: list[str] | None = None) -> None:
    """Run the program on a command line, by default that of this process."""
    parser = OneLineParser(
        prog="pals-hf demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", metavar="NAME=PATH", help="Models to compare. Default: the models in PALS_MODELS."
    )
    given = parser.parse_args(argv).models
    page = build_page(models_of_environment() if given is None else read_models(given))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the server deletes the uploads
    page.launch(max_file_size=MAX_FILE_SIZE)


def models_of_environment() -> dict[str, str]:
    return read_models(os.environ.get("PALS_MODELS", "").split(","))


def read_models(given: list[str]) -> dict[str, str]:
    """Map names to folders or names on the Hub. An item is `NAME=PATH`, or a path that is its own name."""
    pairs = [item.strip().partition("=") for item in given if item.strip()]
    return {name: path or name for name, _, path in pairs}


def build_page(models: dict[str, str]) -> Blocks:
    """Load the models and build the page.

    Raises:
        InputError: gradio is not installed, or a model cannot be loaded.
    """
    try:
        from .page import build_demo, load
    except ImportError as error:
        raise InputError(f"the demo needs {error.name}. Install it with: pip install 'pals_hf[demo]'") from error
    loaded = {name: load(name_or_path) for name, name_or_path in models.items()}  # errors come before the page opens
    return build_demo(models, scaling_of_all({name: processor for name, (_, processor) in loaded.items()}))


def scaling_of_all(processors: dict[str, BaseImageProcessor]) -> Scaling | None:
    """Return how models read deep images, which must be the same for all of them: they see the same picture.

    Raises:
        InputError: two models read images in different ways, or a model takes other than 3 channels.
    """
    scalings = {name: Scaling.of(processor) for name, processor in processors.items()}
    for name, scaling in scalings.items():
        if scaling is not None and scaling.channels != RGB:
            raise InputError(
                f"{name} takes {scaling.channels} channels, but the demo shows {RGB}. Use pals-hf predict."
            )
        first = next(iter(scalings))
        if scaling != scalings[first]:
            raise InputError(
                f"{name} and {first} were trained on images of different depths or scalings, so the demo cannot show "
                "them one image. Start one demo for each."
            )
    return next(iter(scalings.values()), None)
