"""Calibrate a trained model, so that its probabilities say how often it is right.

    pals-hf calibrate --model_name_or_path runs/mine --dataset_dir my_data

The program fits one temperature to labelled images that the model was not trained on, by default those of the
validation split, and divides the weights of the classifier by it. The predicted classes stay the same, and `pipeline`,
`from_pretrained` and ONNX exports give the calibrated probabilities without any change. The model's folder is changed
in place: its weights, `config.json`, model card, `eval_results.json` and `reliability.png`.

The figures are cross-fitted: each half of the images is scored with the temperature that was fitted to the other half.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import CONFIG_NAME

from ..data import EvalTransform, FractionManifest, Scaling, SegmentationData, TransformedDataset, scale_pictures
from ..data.fractions import MANIFEST
from ..errors import InputError
from ..files import atomic_write_text, read_json, refuse_unwritable
from ..metrics import nan_to_none
from ..model_card import CARD_DATA, CardData, pictures_in
from ..options import EVALUATION, MODEL, check_size, option
from ..run_folder import RESULTS, lock_output_dir
from ..temperature import Scorer, fold_temperature
from .arguments import DataArguments, read_data
from .ending import one_line
from .parser import OptionParser
from .report import draw_reliability, load_finished, print_calibration
from .train_data import refuse_other_pictures

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

SPLITS = ("validation", "train", "test")
_UNFINISHED = "_calibrated"  # names that begin with an underscore are not pushed to the Hub


@dataclass
class CalibrationArguments(DataArguments):
    """The data set, and the model to calibrate."""

    model_name_or_path: str | None = option(None, MODEL, "Folder of the trained model, which is changed in place.")
    calibration_split: str = option(
        "validation",
        EVALUATION,
        "Split of the images to fit the temperature to. Of `train`, the images that the model was trained on are left "
        "out.",
        choices=SPLITS,
    )
    eval_window: list[int] | None = option(
        None,
        EVALUATION,
        "Height and width of windows that slide over large images. Default: the whole image at once.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model_name_or_path is None:
            raise InputError("model_name_or_path must name the model to calibrate")
        folder = Path(self.model_name_or_path)
        if not (folder / CONFIG_NAME).is_file():
            raise InputError(
                f"{folder} is not the folder of a trained model: it has no {CONFIG_NAME}. A model on the Hub can be "
                f"fetched with `hf download {folder} --local-dir FOLDER`"
            )
        check_size("eval_window", self.eval_window)


@one_line()
def main(argv: list[str] | None = None) -> None:
    """Run the program on a command line, by default that of this process."""
    (args,) = OptionParser(CalibrationArguments, __doc__).parse(sys.argv[1:] if argv is None else argv)
    folder = Path(args.model_name_or_path)
    refuse_unwritable(folder)
    data = read_data(args, args.skip_bad_samples)
    data = replace(data, validation=images_of(data, args.calibration_split, folder))
    with lock_output_dir(folder):
        model, processor = load_finished(str(folder), data.id2label, None)
        scaling = Scaling.of(processor)
        refuse_other_pictures(str(folder), scaling, data)
        images = TransformedDataset(scale_pictures(data, scaling).validation, EvalTransform(processor))
        result = Scorer(model, window=args.eval_window).calibrate(images)
        metrics = nan_to_none(result.metrics(f"{args.calibration_split} split of {data.name}"))
        print_calibration(metrics)
        if not result.has_effect:
            print(f"\n{folder} is already calibrated for these images, and stays as it is")
            return
        fold_temperature(model, result.temperature, images[0]["pixel_values"][None].to(model.device))
        save(model, folder)
        record(folder, metrics)
    print(f"\n{folder} is calibrated")


def images_of(data: SegmentationData, split: str, folder: Path) -> Dataset:
    """Return the images of a split that the model was not trained on.

    Raises:
        InputError: there is no such image.
    """
    images = getattr(data, split)
    if images is None:
        raise InputError(f"{data.name} has no {split} split. Choose another calibration_split")
    manifest = folder / MANIFEST
    if split == "train":
        if not manifest.exists():
            raise InputError(
                f"calibration_split train: {folder} has no {MANIFEST}, so it is not known which images the model was "
                "trained on. Use another split"
            )
        trained = set(FractionManifest.load(manifest).ids)
        images = images.select([index for index, id in enumerate(images["id"]) if id not in trained])
    if len(images) < 2:
        raise InputError(
            f"the {split} split of {data.name} has {len(images)} images that the model was not trained on, but a "
            "temperature needs two. Label some more, or train on fewer"
        )
    return images


def save(model: PreTrainedModel, folder: Path) -> None:
    """Replace the weights and the config of a folder, each file atomically, the config last.

    After a kill in between, the network is calibrated, but its folder does not say so.
    """
    with _new_folder(folder / _UNFINISHED) as unfinished:
        model.save_pretrained(unfinished)
        files = sorted(unfinished.iterdir(), key=lambda file: file.name == CONFIG_NAME)  # the config says it is done
        for file in files:
            file.replace(folder / file.name)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def record(folder: Path, metrics: dict[str, Any]) -> None:
    """Bring the results, the picture and the model card of a folder up to date, as far as it has them."""
    draw_reliability(metrics, folder)
    results = folder / RESULTS
    if results.exists():
        atomic_write_text(results, json.dumps({**read_json(results), **metrics}, indent=4, sort_keys=True))
    if (folder / CARD_DATA).exists():
        card = CardData.load(folder)
        replace(card, metrics={**card.metrics, **metrics}, pictures=pictures_in(folder)).save(folder)
