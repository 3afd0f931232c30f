"""Data sets that are read on the fly, because they do not fit on the disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils import logging

from ..errors import InputError
from .checking import read_pair
from .classes import IGNORE_INDEX, Classes, Palettes
from .transforms import ID, seeded

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.get_logger(__name__)

SHUFFLE_BUFFER = 256  # encoded images


class StreamedDataset(IterableDataset):
    """A stream of images and masks with a transform.

    The stream yields [`PendingExample`]s, which the collator loads. So Accelerate can distribute examples to
    processes, and each process decodes only its own. Workers of a DataLoader share the shards (files) of the stream.
    Every pair is checked when it is read.

    Args:
        stream: columns `id`, `image` and `labels`, the latter two encoded.
        classes: meaning of the mask values.
        transform: called as `transform(image, labels)`, seeded by (seed, epoch, id).
        seed: seed of the transform and of the order.
        shuffle: shuffle in every epoch, with a buffer of 256 images.
        repeat: continue with the next epoch at the end of one, for training. `Trainer` then sees a single long epoch,
            because it cannot count the epochs of a stream when it resumes or accumulates gradients.
        ids: keep only these images. Without workers, a pass that does not find all of them raises `InputError` at its
            end.
        skip_bad_samples: skip samples that fail a check, instead of raising `InputError`. Every process then decodes
            every image, because all processes must agree on the order.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        classes: Classes,
        transform: Callable[[Image, Image], dict[str, Tensor]],
        seed: int = 0,
        shuffle: bool = False,
        repeat: bool = False,
        ids: list[str] | None = None,
        skip_bad_samples: bool = False,
    ):
        self.stream, self.shuffle, self.repeat = stream, shuffle, repeat
        self.classes, self.transform, self.seed = classes, transform, seed
        self.ids = None if ids is None else frozenset(ids)
        self.skip_bad_samples = skip_bad_samples
        self.palettes = Palettes()
        self._skipped: set[str] = set()  # the ids of the skipped samples that were named
        self.multiple_of = 1
        # In shared memory, so that persistent workers see a change of the epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order and the crops."""
        self._epoch.fill_(epoch)

    def complete_to(self, multiple_of: int) -> None:
        """Pad the stream of each worker with unlabelled examples, to a multiple of this number.

        Otherwise, Accelerate would repeat images to give all processes the same number, and evaluation would count
        these images twice.
        """
        self.multiple_of = multiple_of

    def __iter__(self) -> Iterator[PendingExample]:
        for epoch in itertools.count(int(self._epoch)):
            count, pending = 0, None
            for row in self._wanted(epoch):
                count += 1
                pending = PendingExample(self, row, epoch)
                yield pending
            if pending is None or not self.repeat:
                break
        while pending is not None and count % self.multiple_of:
            count += 1
            yield PendingExample(self, pending.row, epoch, is_filler=True)

    def _wanted(self, epoch: int) -> Iterator[dict[str, Any]]:
        stream = self.stream
        if self.shuffle:  # not by the stream's own set_epoch, because workers may be in different epochs
            generator = np.random.default_rng([self.seed, epoch])
            stream = stream.shuffle(generator=generator, buffer_size=SHUFFLE_BUFFER)
        missing = set(self.ids or ())
        for row in stream:
            if self.ids is not None and row["id"] not in self.ids:
                continue
            missing.discard(row["id"])
            if self.skip_bad_samples:
                try:
                    read_pair(row, self.classes)
                except InputError as error:
                    self._report_once(row["id"], error)
                    continue
            yield row
        if missing and get_worker_info() is None:  # a worker sees only a part of the stream
            number = f"{len(missing)} of {len(self.ids)}"
            raise InputError(f"{number} selected images are not in the stream, e.g. {min(missing)!r}")

    def _report_once(self, identifier: str, problem: InputError) -> None:
        """Name a skipped sample, in the first epoch. With workers, each worker names those of its part."""
        if identifier not in self._skipped:
            self._skipped.add(identifier)
            logger.warning("skipped %s: %s", identifier, problem)

    def load(self, row: dict[str, Any], epoch: int, is_filler: bool) -> dict[str, Tensor | str]:
        """Decode, check and transform one example."""
        pair = read_pair(row, self.classes)
        self.palettes.add(pair.mask_name, pair.colors)
        labels = PILImage.fromarray(np.full_like(pair.labels, IGNORE_INDEX) if is_filler else pair.labels)
        with seeded(self.seed, epoch, row["id"]):
            return {**self.transform(pair.image, labels), ID: row["id"]}


class PendingExample:
    """An example of a stream that has not been decoded yet."""

    def __init__(self, dataset: StreamedDataset, row: dict[str, Any], epoch: int, is_filler: bool = False):
        self.dataset, self.row, self.epoch, self.is_filler = dataset, row, epoch, is_filler

    def load(self) -> dict[str, Tensor | str]:
        return self.dataset.load(self.row, self.epoch, self.is_filler)
