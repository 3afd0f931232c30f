"""A `transformers.Trainer` whose runs are not lost: complete checkpoints, SIGTERM, model cards and the Hub."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from .checkpoints import (
    UNFINISHED,
    clear_unfinished,
    discard_old_checkpoints,
    is_complete_checkpoint,
    last_complete_checkpoint,
    publish,
    publish_files,
)
from .data.fractions import MANIFEST
from .errors import InputError, TrainingError, first_line
from .hub import LAST_CHECKPOINT, MODEL_FILES, create_repo, push_command, push_folder, push_in_background
from .metrics import nan_to_none
from .model_card import (
    CARD_DATA,
    CardData,
    CardFacts,
    hardware,
    loss_settings,
    pictures_in,
    public_name,
    settings,
    versions,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.get_logger(__name__)


class DurableTrainer(Trainer):
    """The base of [`PALSTrainer`], not for use by itself: what is left of a run, whatever ends it.

    - A checkpoint is complete or not there, whatever ends the process while it is written.
    - Every checkpoint has a model card, and the data it is made of, see [`CardData`].
    - Pushes to the Hub are tried again where that may help, and end in one line where it does not; the hyperparameters
      `push_to_hub`, `hub_model_id`, `hub_strategy`, `hub_private_repo` and `hub_revision` are the parent's.
    - SIGTERM, which announces the end of a machine or a job, ends the training after the step at hand, with a
      checkpoint; `trainer.terminated` is True then.

    Args:
        card_facts: what the model card says of the data and the license, see [`CardFacts`].
        args, kwargs: what [`~transformers.Trainer`] takes; its arguments are a [`PALSConfig`].
    """

    def __init__(self, *args: Any, card_facts: CardFacts | None = None, **kwargs: Any):
        self.card_facts = card_facts or CardFacts()
        self._evaluation: dict[str, Any] = {}  # of the weights as they are, if they have been evaluated
        self._best: tuple[int, float] | None = None  # step and epoch of the weights, if they are those of the best
        self._on_their_way: list[tuple[Future, Path]] = []  # what is being pushed from where
        self._seconds, self._began = 0.0, None  # of training, before this start of the loop, and when it started
        self._staging, self._saved_step = False, -1
        self._heard_sigterm = self.terminated = False
        super().__init__(*args, **kwargs)
        self.add_callback(_RunCallback(self))

    # ---- SIGTERM ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's, which SIGTERM ends after the step at hand."""
        self._heard_sigterm = self.terminated = False
        self._seconds, self._saved_step = 0.0, -1
        if threading.current_thread() is not threading.main_thread():  # no other can listen
            return super().train(*args, **kwargs)
        before = signal.signal(signal.SIGTERM, self._hear_sigterm)
        try:
            return super().train(*args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _hear_sigterm(self, *_: Any) -> None:
        self._heard_sigterm = True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with _sigterm_waits():  # the first batch of an epoch starts the workers
            return super().get_batch_samples(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        with _sigterm_waits():
            return super().evaluation_loop(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args, **kwargs):
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if self.terminated and self._saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)

    def _any_process(self, happened: bool) -> bool:
        """Whether it happened to any of the processes; all of them ask."""
        if self.args.world_size == 1:
            return happened
        count = torch.tensor(float(happened), device=self.args.device)
        return self.accelerator.reduce(count, "sum").item() > 0

    def end(self) -> None:
        """The parent's, after letting go of what holds the process group.

        `DistributedDataParallel` does, and a Gloo group that outlives the end of its process aborts it now and then,
        with "terminate called without an active exception" (pytorch issue 190489).
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()
        super().end()

    # ---- Checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED) if self._staging else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The parent's, written aside and then renamed.

        Raises:
            TrainingError: it cannot be written, for example because the disk is full. The ones before are still there.
        """
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written, checkpoint = run_dir / UNFINISHED / name, run_dir / name
        if self.args.should_save:
            clear_unfinished(run_dir)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            self._record_best(written, checkpoint)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(written, checkpoint)
            self.accelerator.wait_for_everyone()
            if self.args.local_process_index == 0 and written.exists():  # on a disk that the main process does not see
                publish(written, checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(run_dir).free / 2**20
            clear_unfinished(run_dir)
            raise TrainingError(
                f"{checkpoint} cannot be written, with {free:.0f} MB left on its disk: {first_line(error)}; "
                f"the last checkpoint is {last_complete_checkpoint(run_dir) or 'none yet'}"
            ) from error
        finally:
            self._staging = False
        self._saved_step = self.state.global_step
        if self.args.should_save:
            self._discard_old_checkpoints(run_dir, {name})
            clear_unfinished(run_dir)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _record_best(self, written: Path, checkpoint: Path) -> None:
        """Where the best checkpoint is: the parent looks for it beside the one being written, which is aside."""
        if not self.state.best_global_step:
            return
        best = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best == checkpoint or best.exists():
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _find_best(self) -> None:
        """Where the best checkpoint of a resumed run is now. Where it is not, a worse one than it may be the best."""
        step = self.state.best_global_step
        if not (self.args.load_best_model_at_end and step) or self.state.best_model_checkpoint is not None:
            return
        best = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if is_complete_checkpoint(best):
            self.state.best_model_checkpoint = str(best)
        else:
            logger.warning("The best checkpoint, of step %d, is not here: the search for the best begins anew.", step)
            self.state.best_metric = self.state.best_global_step = None

    def _discard_old_checkpoints(self, run_dir: Path, kept: set[str]) -> None:
        kept.add(os.path.basename(self.state.best_model_checkpoint or ""))
        kept.update(folder.name for job, folder in self._on_their_way if not job.done())
        discard_old_checkpoints(run_dir, self.args.save_total_limit, kept)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's, but that with a limit of 1 it deletes every checkpoint except the best one, in place."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
            if self.args.should_save and self.args.push_to_hub:  # some stayed because they were being pushed
                self._discard_old_checkpoints(Path(self.args.output_dir), set())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The parent's, file by file complete or not there, and with a card."""
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            clear_unfinished(folder)
        super()._save(str(folder / UNFINISHED), state_dict)
        if self.args.should_save:
            self.card_data(folder).save(folder / UNFINISHED)
            manifest = Path(self.args.output_dir) / MANIFEST
            if manifest.exists() and folder != manifest.parent:  # a checkpoint says by itself what it was trained on
                shutil.copy(manifest, folder / UNFINISHED / MANIFEST)
            publish_files(folder / UNFINISHED, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights the way `from_pretrained` does, and all of them.

        The parent takes the file's names as they are, but `save_pretrained` writes SegFormer's and others' under
        their old names: it would go on from random weights with a warning (transformers issue 48805).
        """
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        try:
            restored, info = type(self.model).from_pretrained(
                resume_from_checkpoint, config=self.model.config, dtype=self.model.dtype, output_loading_info=True
            )
        except (OSError, RuntimeError, SafetensorError) as error:  # damaged, or of a model of another shape
            raise InputError(f"cannot load checkpoint {resume_from_checkpoint}: {first_line(error)}") from error
        if info["missing_keys"]:
            raise InputError(f"checkpoint {resume_from_checkpoint} lacks the weights {sorted(info['missing_keys'])}")
        self.model.load_state_dict(restored.state_dict())

    def _load_best_model(self) -> None:
        if self.terminated:  # the run goes on, from the weights it has
            return
        best = Path(self.state.best_model_checkpoint)
        if (best / CARD_DATA).exists():
            card = CardData.load(best)
            self._evaluation, self._best = card.metrics, (card.step, card.epoch)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / CARD_DATA).exists():
            self._seconds = CardData.load(checkpoint).seconds or 0.0

    # ---- Card and Hub ----

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The parent's. What it gives for the trainer's own `eval_dataset` is what the next model card shows."""
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        is_ours = eval_dataset is None or eval_dataset is self.eval_dataset
        if is_ours and "eval_mean_iou" in metrics:  # not one of several data sets
            self._evaluation = metrics
        return metrics

    def card_data(self, folder: str | os.PathLike | None = None) -> CardData:
        """What the model card says of the weights as they are now.

        Args:
            folder: where the card will lie: it shows the pictures that are there. Default: `args.output_dir`.
        """
        args, config, facts = self.args, self.model.config, self.card_facts
        folder = Path(args.output_dir if folder is None else folder)
        step, epoch = self._best or (self.state.global_step, self.state.epoch)
        backbone = getattr(config, "backbone_config", None)
        history = {}
        for entry in self.state.log_history:
            if "eval_mean_iou" in entry:  # one after the training, of other weights or images, has its last step too
                figures = {name: entry.get(name) for name in ("step", "eval_loss", "eval_mean_iou")}
                history.setdefault(entry["step"], figures)
        return CardData(
            model_name=self.hub_model_id or args.hub_model_id or Path(args.output_dir).resolve().name,
            architecture=type(self.model).__name__,
            id2label=dict(config.id2label),
            loss=args.loss,
            loss_settings=loss_settings(args),
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
        """Write `README.md` and `model_card.json` into `args.output_dir`, of the weights and pictures as they are.

        Args:
            license: of the model, instead of `card_facts.license`.
            model_name: instead of the repository or the folder's name.
            ignored: what else the parent takes: the card says it of itself, or takes it from `card_facts`.
        """
        if not self.is_world_process_zero():
            return
        if license is not None:
            self.card_facts = dataclasses.replace(self.card_facts, license=license)
        card = self.card_data()
        dataclasses.replace(card, model_name=model_name or card.model_name).save(self.args.output_dir)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """The parent's, persistent and with one line for an error."""
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
        # At the start of a new run, what its folder holds is of another one, which it will replace.
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
        """Save the model and push the run's folder by [`push_folder`]: model, card, metrics, manifest, pictures.

        All processes call it, and the main one pushes.

        Args:
            commit_message: of the commit.
            blocking: wait until it is done; else a `Future` is returned.
            token: instead of `args.hub_token`, or that of `hf auth login`.
            revision: branch.
            private: whether a new repository is private.
            card: for [`create_model_card`].

        Raises:
            PushError: it was not pushed; everything is still in `args.output_dir`.
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
        if self.args.push_to_hub and checkpoint is not None:  # left out at its time if another was on its way
            pushes = self._pushes_to_go_on_from(checkpoint)
            jobs = [push_in_background(checkpoint, self.hub_model_id, **options, **where) for options in pushes]
            self.push_in_progress = PushInProgress(jobs)
            self._finish_current_push()
        push = push_folder if blocking else push_in_background
        return push(self.args.output_dir, self.hub_model_id, message=commit_message or "End of training", **where)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint in the background as `args.hub_strategy` says, unless one is still on its way."""
        strategy = self.args.hub_strategy
        if self._staging or not self.is_world_process_zero() or strategy == HubStrategy.END:
            return  # staged: it will change its name, and is pushed then
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
        else:
            self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        message = f"Training in progress, step {self.state.global_step}"
        pushes = [{"message": message, "patterns": MODEL_FILES}, *self._pushes_to_go_on_from(checkpoint)]
        jobs = [
            push_in_background(
                checkpoint,
                self.hub_model_id,
                revision=self.args.hub_revision,
                token=self.args.hub_token,
                **options,
            )
            for options in pushes
        ]
        self._on_their_way += [(job, checkpoint) for job in jobs]
        if self.push_in_progress is None:
            self.push_in_progress = PushInProgress(jobs)
        else:
            self.push_in_progress.jobs.extend(jobs)

    def _pushes_to_go_on_from(self, checkpoint: Path) -> list[dict[str, Any]]:
        """What `args.hub_strategy` adds, for another machine to go on from."""
        folders = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        name = folders.get(self.args.hub_strategy)
        return [] if name is None else [{"message": checkpoint.name, "path_in_repo": name, "patterns": ["*"]}]

    def _finish_current_push(self) -> None:
        """Wait for what is on its way, and say what did not arrive: the training has not to end for it."""
        super()._finish_current_push()
        self._on_their_way = []
        if getattr(self, "push_in_progress", None) is None:
            return
        for job in self.push_in_progress.jobs:
            if job.exception() is not None:
                logger.warning("%s", first_line(job.exception()))
        self.push_in_progress = None


@contextmanager
def _sigterm_waits() -> Iterator[None]:
    """Hold SIGTERM back from this thread, and for good from the processes that it starts.

    Sent to all processes of a job, it would end the workers of a DataLoader at once, and the run with them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _RunCallback(TrainerCallback):
    """Tells the trainer what its card needs to know, and the loop of SIGTERM."""

    def __init__(self, trainer: DurableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._began, self.trainer._best = time.monotonic(), None
        self.trainer._find_best()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._evaluation = {}

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._seconds, self.trainer._began = self.trainer._training_seconds(), None

    def on_step_end(self, args, state, control, **kwargs):
        # All stop after the same step, whoever heard it first.
        if self.trainer._any_process(self.trainer._heard_sigterm):
            self.trainer.terminated = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer.terminated:  # perhaps in the middle of it: nothing is due
            control.should_log = control.should_evaluate = control.should_save = False
