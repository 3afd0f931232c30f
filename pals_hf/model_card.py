"""Model cards: the facts about a checkpoint as data, and the page that is rendered from them.

Every checkpoint has both, `model_card.json` and `README.md`. The page depends only on the data, so
`CardData.load(folder).save(folder)` renders it again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, get_type_hints
from urllib.parse import quote

from markupsafe import Markup

from .config import POLY, PALSConfig
from .errors import InputError, first_line
from .files import atomic_write_text, has_type, read_json
from .losses import PRESETS

if TYPE_CHECKING:
    import torch
    from jinja2 import Template

    from .data import FractionManifest

CARD, CARD_DATA = "README.md", "model_card.json"
PICTURES = ("curves.png", "reliability.png", "predictions.png")
PACKAGES = ("pals_hf", "torch", "torchvision", "transformers", "datasets", "accelerate")
_TEMPLATE = "template.md"
_WEAK = 0.2  # classes with a lower IoU are listed under limits
_HIGHLIGHTS = {
    "eval_mean_iou": "mIoU, %",
    "eval_mean_accuracy": "mean accuracy, %",
    "eval_overall_accuracy": "pixel accuracy, %",
}
_NO_RESULTS = ("temperature", "calibration_images", "_runtime", "_per_second")  # endings of figures that are no score
_METRIC_IDS = {"mean_iou": "mean_iou", "mean_accuracy": "accuracy", "overall_accuracy": "accuracy"}  # on the Hub
# Arguments without influence on the learned weights.
_NO_SETTINGS = re.compile(
    r"output_dir|run_name|project|trackio.*|report_to|disable_tqdm|push_to_hub|hub_.*|resume_from_checkpoint|do_.*|"
    r"log.*|save_.*|eval_(strategy|steps|on_start|delay|accumulation_steps|calibration)|dataloader_.*|ddp_.*|fsdp.*|"
    r"deepspeed|accelerator_config|use_cpu|local_rank|skip_memory_metrics"
)
# Settings of the loss that a card always shows. Others are shown only if they differ from their defaults.
_SAID_SETTINGS = ("beta", "adaptive_beta", "smoothing", "focal_gamma", "margin", "margin_weight")
_SAID_OF_AFFINITY = ("tau", "keys", "pairs")
LOSS_NAMES = {
    "pals": "PALS (pixel-wise adaptive label smoothing)",
    "self_distillation": "self-distillation",
    "ce": "plain cross-entropy",
    "label_smoothing": "cross-entropy with uniformly smoothed labels",
    "focal": "focal loss",
    "margin": "cross-entropy with margin-based label smoothing",
}


@dataclass(frozen=True)
class CardFacts:
    """Facts for a model card that a trainer cannot know. All are optional; the card does not guess missing ones.

    Attributes:
        license: the license of the checkpoint, like `apache-2.0`.
        dataset: the name of the data set, for readers.
        dataset_id, dataset_revision: the repository and the commit of the data set, if it comes from the Hub.
        dataset_license: the license or terms of use of the data set.
        split: the split on which the metrics were measured.
        train_images, available_images, validation_images: numbers of images.
        split_method, split_seed, manifest_sha256: how the training images were sampled, see [`FractionManifest`].
        settings: settings of the data pipeline that differ from their defaults.
    """

    license: str | None = None
    dataset: str | None = None
    dataset_id: str | None = None
    dataset_revision: str | None = None
    dataset_license: str | None = None
    split: str = "validation"
    train_images: int | None = None
    available_images: int | None = None
    validation_images: int | None = None
    split_method: str | None = None
    split_seed: int | None = None
    manifest_sha256: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def with_manifest(self, manifest: FractionManifest) -> CardFacts:
        """Return a copy with the facts of a manifest about the training images."""
        return dataclasses.replace(
            self,
            train_images=len(manifest.ids),
            available_images=manifest.available,
            split_method=manifest.method,
            split_seed=manifest.seed,
            manifest_sha256=manifest.sha256,
        )


class ComparedLoss(TypedDict):
    """A row of a comparison: a loss, the number of its runs, and its figures as text."""

    method: str
    runs: int
    mean_iou: str
    difference: str
    ece: str


class Evaluation(TypedDict):
    """An evaluation during the training."""

    step: int
    eval_loss: float | None
    eval_mean_iou: float | None


@dataclass(frozen=True)
class Comparison:
    """The results of a study that compares losses on training sets of this size.

    Attributes:
        study: the path of the study.
        pairs: the number of paired runs, in words.
        rows: the losses, formatted for the card.
    """

    study: str
    pairs: str
    rows: list[ComparedLoss]


@dataclass(frozen=True)
class CardData:
    """The facts about a checkpoint.

    Attributes:
        model_name: the repository on the Hub, or the name of the folder.
        architecture: the class of the network.
        id2label: class index to class name.
        loss, loss_settings: the training loss and its settings, including defaults.
        settings: settings of `PALSConfig` (other than `said_settings`) and of the data pipeline that differ from their
            defaults.
        base_model, base_model_revision: the checkpoint from which the training started.
        step, epoch: the training step and epoch of the weights.
        best_of: the number of steps of the whole training, if these are the weights of its best checkpoint.
        metrics: the metrics of these weights, empty if they were not evaluated. Undefined metrics are None.
        history: the evaluations during the training.
        seconds, hardware, versions: the training time, the machine and the versions of the packages.
        needs: the packages that are needed to load the checkpoint.
        facts: see [`CardFacts`].
        pictures: the names in [`PICTURES`] that are in the folder of the card.
        comparison: a comparison with other losses, if there is a study.
    """

    model_name: str
    architecture: str
    id2label: dict[int, str]
    loss: str
    loss_settings: dict[str, Any]
    settings: dict[str, Any]
    base_model: str | None
    base_model_revision: str | None
    step: int
    epoch: float | None
    metrics: dict[str, Any]
    history: list[Evaluation]
    seconds: float | None
    hardware: str
    versions: dict[str, str]
    needs: list[str] = field(default_factory=lambda: ["transformers"])
    best_of: int | None = None
    facts: CardFacts = CardFacts()
    pictures: tuple[str, ...] = ()
    comparison: Comparison | None = None

    @property
    def is_pals(self) -> bool:
        return self.loss == "pals"

    @property
    def loss_name(self) -> str:
        return LOSS_NAMES[self.loss]

    @property
    def said_settings(self) -> dict[str, Any]:
        """The settings of the loss that the card always shows, even if they are the defaults."""
        said = {name: value for name, value in self.loss_settings.items() if name in _SAID_SETTINGS}
        affinity = self.loss_settings.get("affinity", {}) if self.is_pals else {}
        return said | {name: affinity[name] for name in _SAID_OF_AFFINITY if name in affinity}

    @property
    def calibration(self) -> list[dict[str, Any]]:
        """The calibration of the network, and if it was calibrated, first that before: rows of a table."""
        kinds = {"this checkpoint": "eval_"}
        if self.metrics.get("eval_temperature"):
            kinds = {"before calibration": "eval_uncalibrated_", "this checkpoint": "eval_calibrated_"}
        names = ("ece", "classwise_ece", "loss", "brier")
        rows = [{"name": kind, **{n: self.metrics.get(prefix + n) for n in names}} for kind, prefix in kinds.items()]
        return [row for row in rows if None not in row.values()]

    @property
    def confident_pixels(self) -> list[list[float | None]]:
        """`confident_pixels` of [`calibration_metrics`], of the network as it is saved."""
        for name in ("eval_calibrated_confident_pixels", "eval_confident_pixels"):
            if name in self.metrics:
                return self.metrics[name]
        return []

    @classmethod
    def load(cls, folder: str | os.PathLike) -> CardData:
        """Read `model_card.json` from a folder.

        Raises:
            InputError: the file does not exist, or is not the data of a model card.
        """
        path = Path(folder) / CARD_DATA
        try:
            content = read_json(path)
            content["id2label"] = {int(index): name for index, name in content["id2label"].items()}
            content["pictures"] = tuple(content["pictures"])
            content["facts"] = CardFacts(**content["facts"])
            content["comparison"] = content["comparison"] and Comparison(**content["comparison"])
            card = cls(**content)
            card.check()
            render(card)
        except Exception as error:  # what check() cannot know ends in errors of any type in render()
            reason = first_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise InputError(f"{path} cannot be read as the data of a model card: {reason}") from error
        return card

    def check(self) -> None:
        """Check the type of each field, and what the page reads from them.

        Raises:
            InputError: a field has another type, or lacks a value. The message names the field.
        """
        for part in filter(None, (self, self.facts, self.comparison)):
            for name, hint in get_type_hints(type(part)).items():
                if not has_type(value := getattr(part, name), hint):
                    raise InputError(f"{name} must not be {_shortened(value)}")
        if self.loss not in LOSS_NAMES:
            raise InputError(f"loss must be one of {', '.join(LOSS_NAMES)}, not {_shortened(self.loss)}")
        if "pals_hf" not in self.versions:
            raise InputError("versions must name the version of pals_hf")
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise InputError("id2label must number the classes from 0")
        if wrong := set(self.pictures).difference(PICTURES):
            raise InputError(f"pictures must not name {_shortened(min(wrong))}")
        for name, value in self.metrics.items():
            hint = list if isinstance(value, list) else float | str | None  # some metrics are lists of their own
            if name.startswith("eval_per_category_") and value is not None:
                hint = list[float | None]
                value = [*value, None] if isinstance(value, list) and len(value) != len(self.id2label) else value
            if name.startswith("eval_") and not has_type(value, hint):
                raise InputError(f"metrics: {_shortened(name)} must not be {_shortened(value)}")

    def save(self, folder: str | os.PathLike) -> None:
        """Write the card and its data into a folder, each file atomically."""
        contents = {CARD_DATA: json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", CARD: render(self)}
        for name, content in contents.items():
            atomic_write_text(Path(folder) / name, content)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def pictures_in(folder: str | os.PathLike) -> tuple[str, ...]:
    """Return the names in [`PICTURES`] that exist in a folder."""
    return tuple(name for name in PICTURES if (Path(folder) / name).exists())


# ---- From a training ----


def settings(args: PALSConfig) -> dict[str, Any]:
    """Return the arguments that differ from the defaults of `PALSConfig` and that the card does not show otherwise."""
    said, values = {"loss", "preset", "affinity", *_SAID_SETTINGS}, args.to_dict()
    wanted = [f for f in dataclasses.fields(args) if f.name not in said and not _NO_SETTINGS.fullmatch(f.name)]
    # None, False and an empty list all mean that an option is off.
    changed = {f.name: values[f.name] for f in wanted if (values[f.name] or None) != (_default(f) or None)}
    usual = asdict(PRESETS["default"]["affinity"])
    affinity = {name: value for name, value in args.affinity.items() if value != usual[name]}
    return changed | ({"affinity": affinity} if affinity and args.loss == "pals" else {})


def _default(field: dataclasses.Field) -> Any:
    """Return the default of a field. (A second `PALSConfig` to read it from would reset the state of Accelerate.)"""
    settled_later = {"lr_scheduler_kwargs": POLY, "greater_is_better": True}
    if field.default is dataclasses.MISSING:
        return field.default_factory()
    return settled_later.get(field.name) if field.default is None else field.default


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def hardware(device: torch.device, processes: int = 1) -> str:
    """Return the number and the kind of the devices of a training."""
    import torch

    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return f"{processes} x {device.type} of {processor_name()}"
    threads = torch.get_num_threads()
    several = f"{processes} processes with " if processes > 1 else ""
    return f"{several}{threads} {'thread' if threads == 1 else 'threads'} of {processor_name()}"


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---- The page ----


def render(card: CardData) -> str:
    """Render the card as Markdown with the YAML header of the Hub. The same data gives the same text."""
    from huggingface_hub import ModelCard

    classes = _classes(card)
    text = _template().render(
        card=card,
        facts=card.facts,
        card_data=Markup(_header(card).to_yaml()),
        figures=_figures(card.metrics),
        classes=classes,
        weak=[row["name"] for row in classes if row["iou"] is not None and row["iou"] < _WEAK],
        weak_below=f"{_WEAK:.0%}".rstrip("%"),
        code=_code,
        plain=_plain,
        in_url=_in_url,
        some=_some,
        percent=_percent,
        settings=_settings,
        duration=_duration,
    )
    return str(ModelCard(re.sub(r"\n{3,}", "\n\n", text)))  # raises an error if the parser of the Hub cannot read it


@cache
def _template() -> Template:
    import jinja2

    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        finalize=escape,  # every value, so that none can be forgotten
    )
    return environment.from_string((files("pals_hf.model_cards") / _TEMPLATE).read_text(encoding="utf-8"))


def _header(card: CardData):
    """Return the metadata that the Hub indexes."""
    from huggingface_hub import EvalResult, ModelCardData

    facts = card.facts
    first = [*_HIGHLIGHTS, *sorted(card.metrics)]
    figures = {
        name.removeprefix("eval_"): value
        for name, value in sorted(card.metrics.items(), key=lambda item: first.index(item[0]))
        if name.startswith("eval_") and isinstance(value, int | float) and not name.endswith(_NO_RESULTS)
    }
    dataset = {
        "dataset_type": facts.dataset_id or _slug(facts.dataset or "unknown"),
        "dataset_name": _one_line(facts.dataset or "unknown"),
        "dataset_split": facts.split,
        "dataset_revision": facts.dataset_revision,
    }
    is_fraction = facts.train_images and facts.available_images
    share = [f"fraction-{facts.train_images / facts.available_images:.2g}"] if is_fraction else []
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name="Semantic segmentation",
            metric_type=_METRIC_IDS.get(name, name),
            metric_name=name,
            metric_value=value,
            **dataset,
        )
        for name, value in figures.items()
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license=facts.license,
        base_model=card.base_model if is_hub_id(card.base_model or "") else None,
        base_model_revision=card.base_model_revision,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        tags=["pals", f"loss-{card.loss.replace('_', '-')}", *share, "semantic-segmentation", "vision"],
        metrics=["mean_iou", "accuracy"],
        **({"model_name": card.model_name, "eval_results": results} if results else {}),
    )


def public_name(name_or_path: str | None) -> str | None:
    """Return the repository of a checkpoint, or the name of its folder without the local path."""
    if not name_or_path:
        return None
    return name_or_path if is_hub_id(name_or_path) else Path(name_or_path).resolve().name


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form OWNER/NAME of a repository on the Hub, and is not a local path."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-") or "unknown"


def _figures(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    error = next((key for key in ("eval_calibrated_ece", "eval_ece") if key in metrics), None)
    names = _HIGHLIGHTS | ({error: "ECE, %"} if error else {})
    return [{"name": name, "text": _percent(metrics[key])} for key, name in names.items() if key in metrics]


def _classes(card: CardData) -> list[dict[str, Any]]:
    kinds = [card.metrics.get(f"eval_per_category_{kind}") for kind in ("iou", "accuracy")]
    if None in kinds:
        return []
    return [
        {"name": name, "iou": kinds[0][index], "accuracy": kinds[1][index]} for index, name in card.id2label.items()
    ]


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


# The values of the page may come from anybody. `Markup` marks what has been made safe, and is not escaped again.


def _settings(values: Mapping[str, Any]) -> Markup:
    return Markup(", ".join(f"{_code(name)} {escape(value)}" for name, value in values.items()))


def _some(names: Iterable[str], most: int = 8) -> Markup:
    """Return a list of names as text, shortened to `most` names."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return Markup(", ".join(map(escape, names[:most])) + more)


def _code(value: Any) -> Markup:
    """Return a name in the font of code. Names with other characters than code has are escaped instead."""
    return Markup(f"`{value}`") if re.fullmatch(r"[\w.+/-]+", str(value)) else escape(value)


def _plain(value: Any) -> Markup:
    """Return a version, or numbers with an interval in brackets, as it is. All other text is escaped."""
    return Markup(value) if re.fullmatch(r"[\w.+, \[\]-]*", str(value)) else escape(value)


def _in_url(value: str) -> Markup:
    return Markup(quote(value))


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


def escape(value: Any) -> Markup:
    """Escape text so that Markdown shows it literally in one line, also in a table."""
    if isinstance(value, Markup):
        return value
    text = _one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"([\\`*_{}\[\]#!|~$]|(?<=:)/(?=/))", r"\\\1", text))
