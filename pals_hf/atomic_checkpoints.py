"""A Trainer that writes its checkpoints atomically, and loads them the way `from_pretrained` does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import logging

from .checkpoints import (
    UNFINISHED,
    clear_unfinished,
    discard_old_checkpoints,
    is_complete_checkpoint,
    last_complete_checkpoint,
    loading_checkpoint,
    publish,
    publish_files,
    refuse_damaged,
)
from .errors import InputError, TrainingError, first_line
from .merging import has_parts_to_merge, load_training_weights, save_training_weights

logger = logging.get_logger(__name__)


class AtomicCheckpointTrainer(Trainer):
    """Write checkpoints atomically: a process that dies at any moment leaves only complete checkpoints behind.

    A checkpoint is written below `_unfinished` in the run's folder, and moved to its own name when it is complete.
    `save_total_limit` keeps the newest checkpoints by step, and in any case the last one and the best one.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._is_staging = False
        self._resumed_from: Path | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_BestCheckpointCallback(self))

    # ---- Saving ----

    def _get_output_dir(self, trial: Any) -> str:
        """Return the run's folder, or while `_save_checkpoint` runs the folder of unfinished files in it."""
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED) if self._is_staging else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the parent write the checkpoint to a temporary folder, then rename the folder.

        Raises:
            TrainingError: the checkpoint cannot be written, for example because the disk is full. Earlier checkpoints
                are kept.
        """
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written, checkpoint = run_dir / UNFINISHED / name, run_dir / name
        if self.args.should_save:
            clear_unfinished(run_dir)
        self.accelerator.wait_for_everyone()
        self._is_staging = True
        try:
            super()._save_checkpoint(model, trial)
            self._record_best(written, checkpoint)
            if self.args.should_save:
                save_training_weights(self.model, written)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(written, checkpoint)
            self.accelerator.wait_for_everyone()
            if self.args.local_process_index == 0 and written.exists():  # on a disk that the main process does not see
                publish(written, checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(run_dir).free / 2**20
            clear_unfinished(run_dir)
            last = last_complete_checkpoint(run_dir)
            raise TrainingError(
                f"{checkpoint} cannot be written, with {free:.0f} MB left on its disk: {first_line(error)}. "
                + ("There is no earlier checkpoint." if last is None else f"The last checkpoint is {last}.")
            ) from error
        finally:
            self._is_staging = False
        if self.args.should_save:
            self._discard_old_checkpoints(run_dir, {name})
            clear_unfinished(run_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write each file of the model atomically."""
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            clear_unfinished(folder)
        super()._save(str(folder / UNFINISHED), state_dict)
        if self.args.should_save:
            publish_files(folder / UNFINISHED, folder)

    def _record_best(self, written: Path, checkpoint: Path) -> None:
        """Record the path of the best checkpoint. The parent looks for it in the temporary folder."""
        if not self.state.best_global_step:
            return
        best = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best == checkpoint or best.exists():
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    # ---- Discarding ----

    def _checkpoints_in_use(self) -> set[str]:
        """Return the names of the checkpoints that `save_total_limit` must not delete yet. Subclasses may add some."""
        return {os.path.basename(self.state.best_model_checkpoint or "")}

    def _discard_old_checkpoints(self, run_dir: Path, kept: set[str]) -> None:
        discard_old_checkpoints(run_dir, self.args.save_total_limit, kept | self._checkpoints_in_use())

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Keep the last checkpoint: with `save_total_limit=1`, the parent deletes all checkpoints but the best one."""
        if self.state.global_step == self._initial_global_step:  # no step, no loss: the parent would log 0
            self._tr_loss.fill_(float("nan"))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and self.args.push_to_hub:  # all pushes have ended: their checkpoints are free now
            self._discard_old_checkpoints(Path(self.args.output_dir), set())
        return output

    # ---- Resuming ----

    def has_all_steps(self, checkpoint: str | os.PathLike) -> bool:
        """Return whether a training would take no further step from a checkpoint."""
        steps = self.args.max_steps
        if steps <= 0:
            *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        with loading_checkpoint(str(checkpoint)):
            return self._is_over(TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)), steps)

    def _is_over(self, state: TrainerState, max_steps: int) -> bool:
        has_stopped_early = any(
            _failures(state, callback) >= callback.early_stopping_patience for callback in self._early_stopping()
        )
        return state.global_step >= max_steps or has_stopped_early

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [
            callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)
        ]

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Take no further step if none is left. The parent takes one, because it counts only after a step.

        Early stopping counts on from the checkpoint. The parent would count from 0.
        """
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        is_resumed = resume_from_checkpoint is not None
        with loading_checkpoint(resume_from_checkpoint):
            for callback in self._early_stopping():
                callback.early_stopping_patience_counter = _failures(self.state, callback) if is_resumed else 0
            return (num_train_epochs, 0) if is_resumed and self._is_over(self.state, max_steps) else position

    # ---- Loading ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does, but refuse a damaged checkpoint before anything is changed.

        Raises:
            InputError: a file of the checkpoint cannot be loaded.
        """
        self._resumed_from = self._checkpoint_named(resume_from_checkpoint)
        if self._resumed_from is not None:
            refuse_damaged(self._resumed_from)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _checkpoint_named(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """Return the checkpoint that `train` resumes from. True names the newest one in `args.output_dir`."""
        is_last = resume_from_checkpoint is True
        checkpoint = get_last_checkpoint(self.args.output_dir) if is_last else resume_from_checkpoint
        return Path(checkpoint) if checkpoint else None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # without the wrapper of Accelerate
            if type(optimizer).__module__.startswith("torch.optim"):  # others keep their state in shapes of their own
                for parameter, state in optimizer.state.items():
                    moments = [state.get(name) for name in ("exp_avg", "exp_avg_sq", "momentum_buffer")]
                    if any(moment is not None and moment.shape != parameter.shape for moment in moments):
                        raise ValueError("the state of its optimizer is that of another network")

    def _load_scaler(self, checkpoint: str | None) -> None:
        with loading_checkpoint(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_callback_state(self) -> None:
        with loading_checkpoint(self._resumed_from):
            super()._load_callback_state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load all weights with `from_pretrained`.

        The parent matches the names in the file as they are. `save_pretrained` writes SegFormer and other models with
        their old names, so the parent would only warn and continue from random weights (transformers issue 48805).

        Raises:
            InputError: the checkpoint is damaged, incomplete, or of another model.
        """
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if has_parts_to_merge(self.model):
            with loading_checkpoint(resume_from_checkpoint):
                return load_training_weights(self.model, Path(resume_from_checkpoint))
        with loading_checkpoint(resume_from_checkpoint):
            restored, info = type(self.model).from_pretrained(
                resume_from_checkpoint, config=self.model.config, dtype=self.model.dtype, output_loading_info=True
            )
        if info["missing_keys"]:
            raise InputError(f"checkpoint {resume_from_checkpoint} lacks the weights {sorted(info['missing_keys'])}")
        self.model.load_state_dict(restored.state_dict())

    def _load_best_model(self) -> None:
        """Load the best checkpoint like any other one, see `_load_from_checkpoint`."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def _failures(state: TrainerState, callback: EarlyStoppingCallback) -> int:
    """Return how many evaluations in a row were no better than the best one, when a checkpoint was saved."""
    saved = state.stateful_callbacks.get(type(callback).__name__) or {}  # a list, if there are several
    return saved["attributes"]["early_stopping_patience_counter"] if isinstance(saved, dict) and saved else 0


class _BestCheckpointCallback(TrainerCallback):
    """Finds the best checkpoint of a resumed run, which may have been moved or copied since.

    The path in `trainer_state.json` is believed only if it is that of a checkpoint beside the one that was resumed:
    the file may come from somebody else, and weights are loaded from this path.
    """

    def __init__(self, trainer: AtomicCheckpointTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        step = state.best_global_step
        if self.trainer._resumed_from is not None and state.best_model_checkpoint is not None:
            best, beside = Path(state.best_model_checkpoint), self.trainer._resumed_from.resolve().parent
            is_ours = best.resolve().parent in (beside, Path(args.output_dir).resolve())
            if not (is_ours and best.name == f"{PREFIX_CHECKPOINT_DIR}-{step}"):
                state.best_model_checkpoint = None
        if not (args.load_best_model_at_end and step) or state.best_model_checkpoint is not None:
            return
        best = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if is_complete_checkpoint(best):
            state.best_model_checkpoint = str(best)
        else:
            logger.warning(
                "The best checkpoint (step %d) is not in %s. The search for the best checkpoint starts over.",
                step,
                args.output_dir,
            )
            state.best_metric = state.best_global_step = None
