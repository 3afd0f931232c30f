"""Temperature scaling (Guo et al. On Calibration of Modern Neural Networks. ICML 2017), folded into the classifier.

The probabilities `softmax(z / T)` with one temperature T for all pixels have the same most likely classes as those of
the network, and T can be fitted on a few labelled images that it was not trained on. The classifier is a linear layer,
and what follows it is an interpolation, so that its weights divided by T give the logits `z / T`: whoever loads the
checkpoint gets calibrated probabilities without knowing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .calibration import calibration_metrics, calibration_sums
from .errors import InputError
from .functional import PADDING_INDEX, is_labelled, soft_label_cross_entropy
from .functional.fused import tiles
from .inference import image_logits
from .models import classifier_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_PIXELS = 2**18  # that a temperature is fitted to, whose logits are kept in memory
RANGE = (0.05, 20.0)  # of temperatures
SAME = 1e-3  # how far a temperature may be from 1 to change nothing


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does.

    Attributes:
        temperature: T, fitted to all images.
        images: the number of images.
        before, after: `loss` (the NLL in nats) and the metrics of [`calibration_metrics`], with T = 1 and
            cross-fitted: each half of the images is scored with the temperature that was fitted to the other half.
    """

    temperature: float
    images: int
    before: dict[str, Any]
    after: dict[str, Any]

    def metrics(self, split: str) -> dict[str, Any]:
        """Return it as entries of results: `eval_temperature`, `eval_uncalibrated_ece`, `eval_calibrated_ece` etc."""
        return {
            "eval_temperature": self.temperature,
            "eval_calibration_images": self.images,
            "eval_calibration_split": split,
            **{f"eval_uncalibrated_{name}": value for name, value in self.before.items()},
            **{f"eval_calibrated_{name}": value for name, value in self.after.items()},
        }

    @property
    def has_effect(self) -> bool:
        """Whether the temperature differs from 1. Calibrating twice on the same images is the same as once."""
        return abs(self.temperature - 1) > SAME


class Scorer:
    """Fit temperatures to a network on some images, and score others with them.

    Args:
        model: a network, in evaluation mode.
        ignore_index: label of unlabelled pixels, which do not count.
        window, overlap: see [`image_logits`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ignore_index: int = 255,
        window: Sequence[int] | None = None,
        overlap: float = 1 / 3,
    ):
        self.model, self.ignore_index, self.window = model, ignore_index, (window, overlap)

    def calibrate(self, examples: Sequence[dict[str, Any]]) -> Calibration:
        """Fit a temperature to all images, and score it by cross-fitting. The network stays as it is.

        Args:
            examples: images that the network was not trained on, `pixel_values` `(3, H, W)` and `labels` `(h, w)`,
                like a [`TransformedDataset`]. They are read twice.

        Raises:
            InputError: the images do not determine a temperature; the message says why.
        """
        if len(examples) < 2:
            raise InputError(f"a temperature needs at least two labelled images, got {len(examples)}")
        pixels = self.pixels(examples)
        halves = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)) % 2
        fitted = [fit_temperature([of for of, half in zip(pixels, halves, strict=True) if half == h]) for h in (0, 1)]
        crossed = [fitted[1 - half] for half in halves.tolist()]
        before, after = self.scores(examples, [[1.0] * len(examples), crossed])
        return Calibration(fit_temperature(pixels), len(examples), before, after)

    def pixels(self, examples: Sequence[dict[str, Any]]) -> list[tuple[Tensor, Tensor]]:
        """Return the logits `(n, C)` and labels `(n,)` of some labelled pixels of each image, [`NUM_PIXELS`] in all.

        Raises:
            InputError: the logits are not finite.
        """
        count, chosen = -(-NUM_PIXELS // len(examples)), []
        for index, (logits, labels) in enumerate(self._outputs(examples)):
            if not logits.isfinite().all():
                raise InputError("the logits of the network are not finite, so it cannot be calibrated")
            at = is_labelled(labels, self.ignore_index).nonzero()
            at = at[torch.randperm(len(at), generator=torch.Generator().manual_seed(index))[:count].to(at.device)]
            sample = torch.full_like(labels, self.ignore_index)
            sample[tuple(at.T)] = labels[tuple(at.T)]
            of_tiles = []
            for tile in tiles(logits, sample):
                labelled = is_labelled(tile.labels, self.ignore_index)
                of_tiles.append((tile.up(logits).movedim(1, -1)[labelled].cpu(), tile.labels[labelled].cpu()))
            z, y = (torch.cat(parts) for parts in zip(*of_tiles, strict=True))
            chosen.append((z, y))
        return chosen

    def scores(
        self, examples: Sequence[dict[str, Any]], temperatures: Sequence[Sequence[float]]
    ) -> list[dict[str, Any]]:
        """Score the same images with several lists of temperatures, one temperature for each image."""
        sums: list[Any] = [0.0] * len(temperatures)
        losses = [0.0] * len(temperatures)
        for index, (logits, labels) in enumerate(self._outputs(examples)):
            for row, of_images in enumerate(temperatures):
                z = logits / of_images[index]
                sums[row] = sums[row] + calibration_sums(z, labels, self.ignore_index).cpu().double()
                losses[row] += float(
                    soft_label_cross_entropy(z, labels, ignore_index=self.ignore_index, num_items=1).double()
                )
        pixels = [float(of[-3, :, 0].sum()) for of in sums]
        return [
            {"loss": loss / count if count else float("nan"), **calibration_metrics(of)}
            for loss, count, of in zip(losses, pixels, sums, strict=True)
        ]

    def _outputs(self, examples: Sequence[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits `(1, C, h, w)`, float32, and the labels `(1, H, W)` of each image."""
        was_training, device = self.model.training, self.model.device
        self.model.eval()
        try:
            for example in (examples[index] for index in range(len(examples))):
                with torch.no_grad():
                    logits = image_logits(self.model, example["pixel_values"][None].to(device), *self.window)
                labels = example["labels"][None].to(device)
                yield logits.float(), labels.masked_fill(labels == PADDING_INDEX, self.ignore_index)
        finally:
            self.model.train(was_training)


def fit_temperature(pixels: Sequence[tuple[Tensor, Tensor]]) -> float:
    r"""Return the temperature that minimises the NLL of pixels, `mean -log softmax(z / T)_y`.

    The NLL is convex in `s = 1 / T`, with the derivative `mean sum_c softmax(s z)_c z_c - z_y`. Its zero is bracketed
    until it is known to float32 precision.

    Args:
        pixels: logits `(n, C)` and labels `(n,)` of some images.

    Raises:
        InputError: there is no labelled pixel, or only one class, or the best temperature is outside [`RANGE`].
    """
    z, y = (torch.cat(parts).double() for parts in zip(*pixels, strict=True))
    y = y.long()
    if len(y.unique()) < 2:
        shown = f"labels of class {y[0].item()} only" if len(y) else "no labels"
        raise InputError(f"the images have {shown}, but a temperature needs pixels of at least two classes")
    of_label = z.gather(1, y[:, None]).mean()

    def slope(s: float) -> float:
        return float(((s * z).softmax(dim=1) * z).sum(dim=1).mean() - of_label)

    low, high = 1 / RANGE[1], 1 / RANGE[0]
    if slope(low) >= 0:
        raise InputError(f"the best temperature is above {RANGE[1]:g}: the network is no better than chance there")
    if slope(high) <= 0:
        raise InputError(f"the best temperature is below {RANGE[0]:g}: the network makes hardly any error there")
    while high / low > 1 + 1e-7:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / (low * high) ** 0.5


def fold_temperature(model: PreTrainedModel, temperature: float, pixel_values: Tensor) -> None:
    """Divide a network's logits by a temperature, by dividing the weights and the bias of its classifier.

    `config.calibration_temperature` is the product of all temperatures that were folded in.

    Args:
        model: the network, which is changed in place.
        temperature: T, positive.
        pixel_values: `(B, 3, H, W)`, some images, on which the result is checked.

    Raises:
        InputError: what follows the classifier is not linear. The network stays as it is.
    """
    parameters = list(classifier_of(model)[1].parameters(recurse=False))
    originals = [parameter.detach().clone() for parameter in parameters]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        before = model(pixel_values=pixel_values).logits
        for parameter in parameters:
            parameter.div_(temperature)
        after = model(pixel_values=pixel_values).logits
        is_linear = torch.allclose(after * temperature, before, rtol=1e-2, atol=1e-2 * float(before.abs().max()))
        if not is_linear:
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)
    model.train(was_training)
    if not is_linear:
        raise InputError(
            f"{type(model).__name__} cannot be calibrated: its logits are not a linear function of its classifier"
        )
    model.config.calibration_temperature = temperature * getattr(model.config, "calibration_temperature", 1.0)
