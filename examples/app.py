#!/usr/bin/env python
"""A page to try trained models on images, two of them side by side.

    pip install -e ".[demo]"
    python examples/app.py --models cross-entropy=runs/ce PALS=runs/pals

A model is a folder or a name on the Hub. As a Space on Hugging Face this file is the whole app: name it in `app_file`,
put `pals_hf[demo]` into requirements.txt, and the models into the variable PALS_MODELS, separated by commas:
`cross-entropy=me/street-ce,PALS=me/street-pals`. Nothing is asked of other servers but the models.
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections import Counter
from functools import cache
from math import log
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from pals_hf.data.synthetic import generate_scene
from pals_hf.errors import InputError, first_line
from pals_hf.inference import load_for_inference, predict, read_pictures
from pals_hf.visualize import heat_map, overlay

NUM_EXAMPLES = 4
MIN_HEIGHT = 300  # of what is shown: smaller images are enlarged
NONE = "nothing"
UNCERTAINTY = "Uncertainty: the entropy of each pixel, as a share of the largest possible"
HOW_TO = """
No models yet. Start it with some, folders or names on the Hub:

    python examples/app.py --models cross-entropy=runs/ce PALS=runs/pals

or name them in the variable `PALS_MODELS`, separated by commas: `cross-entropy=me/street-ce,PALS=me/street-pals`.
"""


class Segmented(NamedTuple):
    """What the page shows of one model; nothing where there is none."""

    title: str
    overlay: Image.Image | None
    uncertainty: Image.Image | None
    shares: Counter[str]  # of the pixels, by the name of the class


NOTHING = Segmented("", None, None, Counter())
load = cache(load_for_inference)


def segment(name: str, name_or_path: str, image: Image.Image) -> Segmented:
    """What one model, loaded from `name_or_path` and called `name` in the page, says of an image."""
    model, processor = load(name_or_path)
    (prediction,) = predict(model, processor, [image])
    id2label, mask = model.config.id2label, prediction.mask.numpy()
    pixels = np.bincount(mask.ravel(), minlength=len(id2label))
    shares: Counter[str] = Counter()
    for index, label in id2label.items():
        shares[label] += pixels[index] / mask.size
    times = max(1, MIN_HEIGHT // image.height)
    uncertainty = (prediction.entropy / log(len(id2label))).numpy()
    return Segmented(
        f"### {name}\nmean entropy {prediction.entropy.mean():.3f} nats of at most {log(len(id2label)):.3f}",
        overlay(image.resize((image.width * times, image.height * times)), enlarge(mask, times), id2label),
        heat_map(enlarge(uncertainty, times)),
        shares,
    )


def enlarge(values: np.ndarray, times: int) -> np.ndarray:
    return values.repeat(times, axis=0).repeat(times, axis=1)


def read_upload(file: str) -> tuple[Image.Image | None, None]:
    """The uploaded image, upright, or a message in the page and none; and nothing, for the next upload."""
    try:
        return next(read_pictures(Path(file))), None
    except InputError as error:
        message = str(error).replace(file, Path(file).name)  # where the server keeps it is of no use to anybody
        gr.Warning(html.escape(f"{message}: choose another image"), duration=None)
        return None, None


def build_demo(models: dict[str, str]) -> gr.Blocks:
    """The page.

    Args:
        models: folder or name on the Hub of each model, by the name that the page gives it.
    """
    with gr.Blocks(title="pals_hf", analytics_enabled=False) as demo:
        gr.Markdown("# Semantic segmentation with few labels\nChoose an image and the models to compare on it.")
        if not models:
            gr.Markdown(HOW_TO)
            return demo
        names = list(models)
        with gr.Row():
            with gr.Column():
                file = gr.File(label="Your image", file_types=["image"], height=120)
                image = picture(type="pil", height=280)
            with gr.Column():
                first = gr.Dropdown(names, value=names[0], label="Model")
                second = gr.Dropdown([*names, NONE], value=[*names, NONE][1], label="Beside it")
                button = gr.Button("Segment", variant="primary")
                scenes = [[generate_scene((1, index))[0]] for index in range(NUM_EXAMPLES)]
                gr.Examples(scenes, [image], label="Or one of these images", cache_examples=False)
        titles, overlays, uncertainties = [], [], []
        with gr.Row():
            for _ in range(2):
                with gr.Column():
                    titles.append(gr.Markdown())
                    overlays.append(picture(visible=False))
        table = gr.Dataframe(label="Share of the pixels", interactive=False, visible=False)
        note = gr.Markdown(visible=False)
        with gr.Row():
            for _ in range(2):
                with gr.Column():
                    uncertainties.append(picture(visible=False))

        def show(image: Image.Image | None, *chosen: str) -> list:
            if image is None:
                raise gr.Error("Choose an image first.", print_exception=False)
            try:
                found = {name: segment(name, models[name], image) for name in chosen if name in models}
            except (RuntimeError, ValueError) as error:  # an InputError, or the network cannot work on such an image
                raise gr.Error(html.escape(first_line(error)), print_exception=False) from error
            sides = [*found.values(), NOTHING][:2]
            return [
                *(side.title for side in sides),
                *(show_picture(side.overlay) for side in sides),
                show_table(found),
                gr.Markdown(UNCERTAINTY, visible=True),
                *(show_picture(side.uncertainty) for side in sides),
            ]

        file.upload(read_upload, file, [image, file])
        button.click(show, [image, first, second], [*titles, *overlays, table, note, *uncertainties])
    return demo


def picture(**options) -> gr.Image:
    """A place for a picture, with nothing over it that would hide a part."""
    return gr.Image(show_label=False, buttons=[], format="png", interactive=False, **options)


def show_picture(shown: Image.Image | None) -> gr.Image:
    return gr.Image(shown, visible=shown is not None)


def show_table(found: dict[str, Segmented]) -> gr.Dataframe:
    classes = dict.fromkeys(name for result in found.values() for name, share in result.shares.items() if share)
    rows = [[name, *(f"{result.shares[name]:.2%}" for result in found.values())] for name in classes]
    return gr.Dataframe(rows, headers=["class", *found], visible=True)


def read_models(given: list[str]) -> dict[str, str]:
    """`NAME=PATH`, or a path alone, which is its own name."""
    pairs = [item.strip().partition("=") for item in given if item.strip()]
    return {name: path or name for name, _, path in pairs}


MODELS = read_models(os.environ.get("PALS_MODELS", "").split(","))
demo = build_demo(MODELS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME=PATH", help="Default: those of PALS_MODELS.")
    given = parser.parse_args(argv).models
    models = MODELS if given is None else read_models(given)
    try:
        for name_or_path in models.values():
            load(name_or_path)  # what is wrong with one is said before there is a page
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    (demo if given is None else build_demo(models)).launch()


if __name__ == "__main__":
    main()
