#!/usr/bin/env python
"""Train for a study: `pals-hf train` with labels made sparse or wrong, and with training images held out for tuning.

    python examples/study_train.py --dataset_dir camvid --void_labels 11 --tuning_share 0.25 --train_count 37

`sweep.py` and `study_fractions.py` run this program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from degraded_labels import label_by_clicks, mislabel

from pals_hf.cli import train
from pals_hf.cli.arguments import TrainArguments
from pals_hf.data import SegmentationData, TransformedDataset
from pals_hf.data.splitting import hold_out
from pals_hf.errors import InputError
from pals_hf.options import IMAGES, option
from pals_hf.temperature import Scorer, fit_temperature
from pals_hf.trainer import PALSTrainer


@dataclass
class StudyArguments(TrainArguments):
    """The options of a training in a study."""

    label_clicks: int | None = option(
        None,
        IMAGES,
        "Make labels sparse: keep only the pixels that this number of clicks per mask, with a brush of 5 x 5 pixels, "
        "would have labelled.",
        in_card=True,
    )
    label_noise: float | None = option(
        None,
        IMAGES,
        "Make labels wrong: in this share of the blocks of 32 x 32 pixels, give the most frequent class the name of "
        "another class of the image.",
        in_card=True,
    )
    tuning_share: float | None = option(
        None,
        IMAGES,
        "Hold out this share of the training images before the fraction is drawn, and score them instead of the "
        "validation split.",
        in_card=True,
    )
    tuning_ids: str | None = option(
        None,
        IMAGES,
        "Hold out the training images whose id matches this regular expression instead, for example one of several "
        "videos, so that no frame is scored whose neighbours are trained on.",
        in_card=True,
    )
    temperature_share: float | None = option(
        None,
        IMAGES,
        "Hold out this share of the training images before the fraction is drawn, fit a temperature to them, and "
        "score the other held-out or the validation images with it: `eval_moved_ece` and so on.",
        in_card=True,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.tuning_share is not None and self.tuning_ids is not None:
            raise InputError("tuning_share and tuning_ids exclude each other: give only one of them")

    def needs_all_images(self) -> tuple[str, ...]:
        return (
            *super().needs_all_images(),
            "temperature_share",
            "tuning_share",
            "tuning_ids",
            "label_clicks",
            "label_noise",
        )

    @property
    def split(self) -> str:
        is_held_out = self.tuning_share is not None or self.tuning_ids is not None
        return "held-out training" if is_held_out else super().split

    def hold_out(self, data: SegmentationData) -> SegmentationData:
        if self.temperature_share is not None and data.depth is not None:
            raise InputError(f"temperature_share is for images of 8 bits, but the images have {data.depth}")
        if self.temperature_share is not None:
            rest = hold_out(
                data, share=self.temperature_share, seed=self.validation_seed, skip_bad_samples=self.skip_bad_samples
            )
            self._temperature_images, data = rest.validation, replace(data, train=rest.train)
        if self.tuning_share is None and self.tuning_ids is None:
            return data
        return hold_out(
            data,
            share=self.tuning_share,
            pattern=self.tuning_ids,
            seed=self.validation_seed,
            skip_bad_samples=self.skip_bad_samples,
        )

    def more_metrics(self, trainer: PALSTrainer) -> dict[str, Any]:
        """Score the network with a temperature that was fitted to images of the training set."""
        if self.temperature_share is None:
            return {}
        images = TransformedDataset(self._temperature_images, trainer.eval_dataset.transform)
        scorer = Scorer(trainer.model, trainer.args.ignore_index)
        temperature = fit_temperature(scorer.pixels(images))
        (scores,) = scorer.scores(trainer.eval_dataset, [[temperature] * len(trainer.eval_dataset)])
        return {"eval_moved_temperature": temperature, **{f"eval_moved_{name}": of for name, of in scores.items()}}

    def degrade(self, images: Dataset) -> Dataset:
        if self.label_clicks is not None:
            images = label_by_clicks(images, self.label_clicks, self.fraction_seed)
        if self.label_noise is not None:
            images = mislabel(images, self.label_noise, self.fraction_seed)
        return images


def main(argv: list[str] | None = None) -> None:
    train.main(argv, StudyArguments)


if __name__ == "__main__":
    main()
