"""The settings of the affinity: which positions of an image are compared, and how their predictions are averaged."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

PAIRS = ("all", "same_class")
SOURCES = ("classifier_input", "before_dropout", "encoder", "logits")


@dataclass(frozen=True)
class Affinity:
    """Settings of the affinity, used alike by [`aggregate_probabilities`], [`PALSLoss`] and [`PALSConfig`].

    The paper's abstract leaves all of them open. The defaults follow from `docs/evidence.md`.

    Args:
        tau: temperature of the affinity, > 0. Smaller values compare more sharply: towards 0 each position keeps its
            own distribution, towards infinity all positions get the mean of the image.
        keys: largest number of keys that a position is compared with. On a larger grid the keys are means over square
            blocks of positions, as small as this number allows. None compares all pairs of positions exactly.
        pairs: "all", or "same_class": a labelled position is compared with keys of its own class only. A position
            without a label is compared with all keys, and one whose class no key has keeps its own distribution.
        include_self: whether a position is compared with itself, too. It is in any case part of its block, where keys
            are means over blocks. Without, a position whose other keys have less than a thousandth of its affinity
            keeps its own distribution.
        unlabeled_keys: whether keys without a label take part in the average.
        steps, weight: q starts as p and becomes `weight * S q + (1 - weight) * p` in every step, as in BAKE (Ge et
            al. 2021, arXiv 2104.13298). With weight 0 no positions are compared: this is self-distillation.
        temperature: softmax temperature of the predictions p that are averaged, > 0.
        source: the features that are compared: the input of the classifier layer (`classifier_input`), the same
            `before_dropout`, a hidden state of the `encoder`, or the `logits`.
        encoder_stage: index of the hidden state that `source="encoder"` takes.

    Raises:
        ValueError: a setting is out of its range; the message names the setting.
    """

    tau: float = 0.03
    keys: int | None = 128
    pairs: str = "all"
    include_self: bool = True
    unlabeled_keys: bool = True
    steps: int = 1
    weight: float = 1.0
    temperature: float = 1.0
    source: str = "classifier_input"
    encoder_stage: int = -1

    def __post_init__(self):
        for name in ("tau", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name, allowed in (("pairs", PAIRS), ("source", SOURCES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"weight must lie in [0, 1], got {self.weight}")
        for name, value in (("keys", 1 if self.keys is None else self.keys), ("steps", self.steps)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("include_self", "unlabeled_keys"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")

    @property
    def needs_labels(self) -> bool:
        """Whether the labels decide which positions are compared."""
        return self.pairs == "same_class" or not self.unlabeled_keys

    def replace(self, settings: dict[str, Any]) -> Affinity:
        """Return a copy with some settings replaced.

        Raises:
            ValueError: there is no such setting, or a value is out of its range or of another type.
        """
        names = [field.name for field in fields(self)]
        if unknown := settings.keys() - set(names):
            raise ValueError(f"there is no setting {min(unknown)!r}; the settings are {', '.join(names)}")
        try:
            return Affinity(**{**vars(self), **settings})
        except TypeError as error:  # a string is not compared with a number
            raise ValueError(f"{settings} holds a value of the wrong type: {error}") from error
