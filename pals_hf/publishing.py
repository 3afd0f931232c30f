"""A Trainer that publishes its run: a model card in every checkpoint, and pushes to the Hub."""

from __future__ import annotations

import dataclasses
import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from .atomic_checkpoints import AtomicCheckpointTrainer
from .checkpoints import last_complete_checkpoint
from .data.fractions import MANIFEST
from .errors import first_line
from .files import atomic_write_text
from .hub import LAST_CHECKPOINT, MODEL_FILES, create_repo, push_command, push_in_background
from .metrics import nan_to_none
from .model_card import (
    CARD_DATA,
    CardData,
    CardFacts,
    hardware,
    pictures_in,
    public_name,
    settings,
    versions,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.get_logger(__name__)


class PublishingTrainer(AtomicCheckpointTrainer):
    """Write a model card with every checkpoint, and push complete checkpoints to the Hub in the background.

    Pushes follow `push_to_hub`, `hub_model_id`, `hub_strategy`, `hub_private_repo`, `hub_revision` and
    `hub_always_push` of [`~transformers.TrainingArguments`]. Transient errors are retried. A checkpoint is not deleted
    while it is being pushed, and a failed push is a warning: it does not end the training.

    Args:
        card_facts: facts for the model card that the trainer cannot know: data, license, see [`CardFacts`].
        args, kwargs: arguments of [`~transformers.Trainer`]. Its `args` must be a [`PALSConfig`].
    """

    def __init__(self, *args: Any, card_facts: CardFacts | None = None, **kwargs: Any):
        self.card_facts = card_facts or CardFacts()
        self._evaluation: dict[str, Any] = {}  # metrics of the current weights, empty if they were not evaluated
        self._best: tuple[int, float] | None = None  # step and epoch of the best checkpoint, once it is loaded
        self._pushes: list[tuple[Future, str]] = []  # background pushes with the names of their checkpoints
        # Seconds of training before this start of the loop, and the time of this start.
        self._seconds, self._began = 0.0, None
        super().__init__(*args, **kwargs)
        self.add_callback(_CardCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does. The training time continues from the card of the checkpoint."""
        checkpoint = self._checkpoint_named(resume_from_checkpoint)
        has_card = checkpoint is not None and (checkpoint / CARD_DATA).exists()
        self._seconds = CardData.load(checkpoint).seconds or 0.0 if has_card else 0.0
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # ---- Model card ----

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the parent does. Metrics on the trainer's own `eval_dataset` go into the next model card."""
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        is_ours = eval_dataset is None or eval_dataset is self.eval_dataset
        if is_ours and "eval_mean_iou" in metrics:  # with several data sets, the names have a prefix
            self._evaluation = metrics
        return metrics

    def card_data(self, folder: str | os.PathLike | None = None) -> CardData:
        """Return the content of the model card for the current weights.

        Args:
            folder: the card's folder; the card shows the pictures in it. Default: `args.output_dir`.
        """
        args, config, facts = self.args, self.model.config, self.card_facts
        folder = Path(args.output_dir if folder is None else folder)
        step, epoch = self._best or (self.state.global_step, self.state.epoch)
        backbone = getattr(config, "backbone_config", None)
        history = {}
        for entry in self.state.log_history:
            # Evaluations after the training repeat its last step, with other weights or images: the first one counts.
            if "eval_mean_iou" in entry:
                figures = {name: entry.get(name) for name in ("step", "eval_loss", "eval_mean_iou")}
                history.setdefault(entry["step"], figures)
        return CardData(
            model_name=self.hub_model_id or args.hub_model_id or Path(args.output_dir).resolve().name,
            architecture=type(self.model).__name__,
            id2label=dict(config.id2label),
            loss=args.loss,
            loss_settings=args.loss_settings,
            settings={**facts.settings, **settings(args)},
            base_model=public_name(config.name_or_path),
            base_model_revision=getattr(config, "_commit_hash", None),
            step=step,
            epoch=epoch,
            best_of=self.state.global_step if self._best else None,
            metrics=nan_to_none(self._evaluation),
            history=list(history.values()),
            seconds=self._training_seconds() or None,
            hardware=hardware(args.device, args.world_size),
            needs=["transformers", *(["timm"] if getattr(backbone, "model_type", "") == "timm_backbone" else [])],
            versions=versions(),
            facts=facts,
            pictures=pictures_in(folder),
        )

    def _training_seconds(self) -> float:
        return self._seconds + (0.0 if self._began is None else time.monotonic() - self._began)

    def create_model_card(self, license: str | None = None, model_name: str | None = None, **ignored: Any) -> None:
        """Write `README.md` and `model_card.json` for the current weights and pictures into `args.output_dir`.

        Args:
            license: the model's license. Default: `card_facts.license`.
            model_name: the model's name. Default: the repository, or the name of the folder.
            ignored: other arguments of the parent's method. The card takes these facts from `card_facts`.
        """
        if not self.is_world_process_zero():
            return
        if license is not None:
            self.card_facts = dataclasses.replace(self.card_facts, license=license)
        card = self.card_data()
        dataclasses.replace(card, model_name=model_name or card.model_name).save(self.args.output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the parent does, with a model card and the manifest of its training images."""
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        folder, manifest = Path(output_dir or self.args.output_dir), Path(self.args.output_dir) / MANIFEST
        folder.mkdir(parents=True, exist_ok=True)  # the weights of a sharded model are written later
        self.card_data(folder).save(folder)
        if manifest.exists() and folder != manifest.parent:
            atomic_write_text(folder / MANIFEST, manifest.read_text(encoding="utf-8"))

    def _load_best_model(self) -> None:
        """Load the best checkpoint, and take its metrics and step from its card."""
        super()._load_best_model()
        best = Path(self.state.best_model_checkpoint)
        if (best / CARD_DATA).exists():
            card = CardData.load(best)
            self._evaluation, self._best = card.metrics, (card.step, card.epoch)

    # ---- Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, with retries.

        Raises:
            PushError: the repository cannot be created.
        """
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
        private = self.args.hub_private_repo if private is None else private
        later = push_command(
            self.args.output_dir,
            name,
            private=private,
            revision=self.args.hub_revision,
            license=self.card_facts.license,
        )
        # A new run will replace the run in its folder, so the error must not offer that one for a later push.
        is_start = not hasattr(self, "state") and self.args.resume_from_checkpoint is None
        folder = None if is_start else self.args.output_dir
        self.hub_model_id = create_repo(name, folder, private, token or self.args.hub_token, later=later)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | Future | None:
        """Save the model and push the run's folder with [`push_folder`]: model, card, metrics, manifest, pictures.

        Every process must call this. The main process pushes.

        Args:
            commit_message: the message of the commit.
            blocking: wait for the end of the push. Otherwise, return a `Future`.
            token: a token of the Hub. Default: `args.hub_token`, or the token of `hf auth login`.
            revision: the branch. Default: `args.hub_revision`, or the main branch.
            private: whether a new repository is private. Default: `args.hub_private_repo`.
            card: arguments of [`create_model_card`].

        Raises:
            PushError: the push failed. All files are still in `args.output_dir`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        self._finish_current_push()
        where = {"revision": revision or self.args.hub_revision, "token": token or self.args.hub_token}
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        if self.args.push_to_hub and checkpoint is not None:  # it was skipped if another push was still running
            self.push_in_progress = PushInProgress(
                self._start_pushes(checkpoint, self._resume_files(checkpoint), where)
            )
            self._finish_current_push()
        message = commit_message or "End of training"
        push = push_in_background(self.args.output_dir, self.hub_model_id, message=message, **where)
        return push.result() if blocking else push  # ctrl-C interrupts this wait, but not the push itself

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing. The parent calls this before the checkpoint has its own name, `_save_checkpoint` pushes it."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            run_dir = Path(self._get_output_dir(trial))
            self._push_checkpoint(run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Push a checkpoint in the background as `args.hub_strategy` says.

        Without `args.hub_always_push`, the checkpoint is skipped while the push of an earlier one is still running.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        model = {"message": f"Training in progress, step {self.state.global_step}", "patterns": MODEL_FILES}
        where = {"revision": self.args.hub_revision, "token": self.args.hub_token}
        jobs = self._start_pushes(checkpoint, [model, *self._resume_files(checkpoint)], where)
        if is_busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _resume_files(self, checkpoint: Path) -> list[dict[str, Any]]:
        """Return the push that `args.hub_strategy` adds so that another machine can resume from the checkpoint."""
        folders = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        name = folders.get(self.args.hub_strategy)
        return [] if name is None else [{"message": checkpoint.name, "path_in_repo": name, "patterns": ["*"]}]

    def _start_pushes(
        self, checkpoint: Path, pushes: list[dict[str, Any]], where: dict[str, str | None]
    ) -> list[Future]:
        jobs = [push_in_background(checkpoint, self.hub_model_id, **push, **where) for push in pushes]
        for job in jobs:
            job.add_done_callback(_warn_if_failed)
        self._pushes = [(job, name) for job, name in self._pushes if not job.done()]
        self._pushes += [(job, checkpoint.name) for job in jobs]
        return jobs

    def cancel_pushes(self) -> None:
        """Cancel the background pushes that have not begun. Python waits for the others when it exits."""
        for job, _ in self._pushes:
            job.cancel()

    def _checkpoints_in_use(self) -> set[str]:
        return super()._checkpoints_in_use() | {name for job, name in self._pushes if not job.done()}


def _warn_if_failed(push: Future) -> None:
    if not push.cancelled() and push.exception() is not None:
        logger.warning("%s", first_line(push.exception()))


class _CardCallback(TrainerCallback):
    """Tells the trainer how long it trained, and when its weights differ from those that were evaluated."""

    def __init__(self, trainer: PublishingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._began, self.trainer._best = time.monotonic(), None

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._evaluation = {}

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._seconds, self.trainer._began = self.trainer._training_seconds(), None
