"""The page of `pals-hf demo`: two trained models side by side on an image. Needs gradio, from the extra `demo`."""

from __future__ import annotations

import html
from collections import Counter
from functools import cache, partial
from math import isqrt, log, sqrt
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from ..data.pictures import is_deep
from ..data.scaling import Scaling
from ..data.synthetic import generate_scene
from ..errors import InputError, first_line
from ..files import read_bytes
from ..inference import load_for_inference, predict, read_pictures
from ..visualize import heat_map, overlay

NUM_EXAMPLES = 4
MIN_HEIGHT = 300  # smaller images are enlarged
# Time and memory grow with the pixels, and the page may be open to everybody.
SHRUNK_TO = 2_000_000  # pixels of an image for the networks
MAX_SIDE = 4_000  # pixels of its height and width
MAX_PIXELS = 50_000_000  # pixels of an upload
KEEP_UPLOADS = 3600  # seconds
NONE = "none"
UNCERTAINTY = "Uncertainty: the entropy of the class probabilities at each pixel, divided by its maximum"
LIMITS = (
    f"Images of more than {SHRUNK_TO // 10**6} megapixels, or a side of more than {MAX_SIDE} pixels, are shrunk. "
    f"Images of more than {MAX_PIXELS // 10**6} megapixels are refused. "
    f"Uploads are deleted after {KEEP_UPLOADS // 60} minutes."
)
HOW_TO = """
This page has no models. Start it with models from folders or from the Hub:

    pals-hf demo --models cross-entropy=runs/ce PALS=runs/pals

or set the environment variable `PALS_MODELS`, like `cross-entropy=me/street-ce,PALS=me/street-pals`.
"""


class Segmented(NamedTuple):
    """The title, pictures and class shares that the page shows for one model."""

    title: str
    overlay: Image.Image | None
    uncertainty: Image.Image | None
    shares: Counter[str]  # share of the pixels by class name


NOTHING = Segmented("", None, None, Counter())
load = cache(load_for_inference)


def segment(name: str, name_or_path: str, image: Image.Image) -> Segmented:
    """Segment an image with the model at `name_or_path`, which the page calls `name`."""
    model, processor = load(name_or_path)
    (prediction,) = predict(model, processor, [image])
    id2label, mask = model.config.id2label, prediction.mask.numpy()
    pixels = np.bincount(mask.ravel(), minlength=len(id2label))
    shares: Counter[str] = Counter()
    for index, label in id2label.items():
        shares[label] += pixels[index] / mask.size
    times = max(1, min(MIN_HEIGHT // image.height, isqrt(SHRUNK_TO // (image.width * image.height))))
    uncertainty = (prediction.entropy / log(len(id2label))).numpy()
    return Segmented(
        f"### {name}\nMean entropy: {prediction.entropy.mean():.3f} nats (the maximum is {log(len(id2label)):.3f})",
        overlay(image.resize((image.width * times, image.height * times)), enlarge(mask, times), id2label),
        heat_map(enlarge(uncertainty, times)),
        shares,
    )


def enlarge(values: np.ndarray, times: int) -> np.ndarray:
    return values.repeat(times, axis=0).repeat(times, axis=1)


def read_image(file: str, scaling: Scaling | None = None) -> Image.Image:
    """Return an uploaded image, upright, and shrunk if it has more than `SHRUNK_TO` pixels or a side above `MAX_SIDE`.

    Args:
        file: the uploaded file.
        scaling: how the models read deep images, as which images of 8 bits count that have been scaled before.

    Raises:
        InputError: the file is not an image, or has more than `MAX_PIXELS` pixels.
    """
    try:
        is_scaled = scaling is None or not is_deep(read_bytes(file))
        image = next(read_pictures(Path(file), MAX_PIXELS, None if is_scaled else scaling))
    except InputError as error:
        raise InputError(
            str(error).replace(file, Path(file).name)
        ) from error  # users do not know the server's folders
    scale = min(1, sqrt(SHRUNK_TO / (image.width * image.height)), MAX_SIDE / max(image.size))
    return image if scale == 1 else image.resize([max(1, int(side * scale)) for side in image.size])


def read_upload(file: str, scaling: Scaling | None = None) -> tuple[Image.Image | None, None]:
    """Return the uploaded image, and None to clear the upload. Show a warning if it is not an image."""
    try:
        return read_image(file, scaling), None
    except InputError as error:
        gr.Warning(html.escape(str(error)), duration=None, title="Choose another image")
        return None, None


def build_demo(models: dict[str, str], scaling: Scaling | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        models: maps the name of each model on the page to its folder or its name on the Hub.
        scaling: how all models read deep images, if they do.
    """
    age = (KEEP_UPLOADS // 6, KEEP_UPLOADS)
    with gr.Blocks(title="pals_hf", analytics_enabled=False, delete_cache=age) as demo:
        gr.Markdown(f"# Semantic segmentation with few labels\nChoose an image and the models to compare. {LIMITS}")
        if not models:
            gr.Markdown(HOW_TO)
            return demo
        names = list(models)
        with gr.Row():
            with gr.Column():
                file = gr.File(label="Your image", file_types=["image"], height=120)
                image = picture(type="filepath", image_mode=None, height=280)  # decoded by read_image only
            with gr.Column():
                first = gr.Dropdown(names, value=names[0], label="Model")
                second = gr.Dropdown([*names, NONE], value=[*names, NONE][1], label="Second model")
                button = gr.Button("Segment", variant="primary")
                scenes = [[generate_scene((1, index))[0]] for index in range(NUM_EXAMPLES)]
                gr.Examples(scenes, [image], label="Examples", cache_examples=False)
        titles, overlays, uncertainties = [], [], []
        with gr.Row():
            for _ in range(2):
                with gr.Column():
                    titles.append(gr.Markdown())
                    overlays.append(picture(visible=False))
        table = gr.Dataframe(label="Share of pixels", interactive=False, visible=False)
        note = gr.Markdown(visible=False)
        with gr.Row():
            for _ in range(2):
                with gr.Column():
                    uncertainties.append(picture(visible=False))

        def show(file: str | None, *chosen: str) -> list:
            if file is None:
                raise gr.Error("Choose an image first.", print_exception=False)
            try:
                image = read_image(file, scaling)
                found = {name: segment(name, models[name], image) for name in chosen if name in models}
            except Exception as error:  # an InputError, or the network fails on this image in any way
                raise gr.Error(html.escape(first_line(error)), print_exception=False) from error
            sides = [*found.values(), NOTHING][:2]
            return [
                *(side.title for side in sides),
                *(show_picture(side.overlay) for side in sides),
                show_table(found),
                gr.Markdown(UNCERTAINTY, visible=True),
                *(show_picture(side.uncertainty) for side in sides),
            ]

        file.upload(partial(read_upload, scaling=scaling), file, [image, file])
        button.click(show, [image, first, second], [*titles, *overlays, table, note, *uncertainties])
    return demo


def picture(**options) -> gr.Image:
    """Return a component that shows a picture without buttons over it."""
    return gr.Image(show_label=False, buttons=[], format="png", interactive=False, **options)


def show_picture(shown: Image.Image | None) -> gr.Image:
    return gr.Image(shown, visible=shown is not None)


def show_table(found: dict[str, Segmented]) -> gr.Dataframe:
    """Return the table of the classes that at least one model predicts."""
    classes = dict.fromkeys(name for result in found.values() for name, share in result.shares.items() if share)
    rows = [[name, *(f"{result.shares[name]:.2%}" for result in found.values())] for name in classes]
    return gr.Dataframe(rows, headers=["class", *found], visible=True)
