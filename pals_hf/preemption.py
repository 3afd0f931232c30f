"""A Trainer that can be preempted: SIGTERM ends the training after the current step, with a checkpoint."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer, TrainerCallback


class PreemptibleTrainer(Trainer):
    """End the training after the current step on SIGTERM, which schedulers send before they take a machine away.

    The step is logged and evaluated if that was due, and a checkpoint is saved whatever `save_strategy` says.

    Attributes:
        terminated: True if SIGTERM ended the last training. The weights are then those of the last step, also with
            `load_best_model_at_end`, because the run can be resumed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._received_sigterm = self.terminated = False
        super().__init__(*args, **kwargs)
        self.add_callback(_PreemptionCallback(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does, but end after the current step on SIGTERM."""
        self._received_sigterm = self.terminated = False
        if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread
            return super().train(*args, **kwargs)
        before = signal.signal(signal.SIGTERM, self._receive_sigterm)
        try:
            return super().train(*args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _receive_sigterm(self, *_: Any) -> None:
        self._received_sigterm = True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with _sigterm_blocked():  # the first batch of an epoch starts the workers of the DataLoader
            return super().get_batch_samples(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with _sigterm_blocked():
            return super().evaluation_loop(*args, **kwargs)

    def _load_best_model(self) -> None:
        if not self.terminated:
            super()._load_best_model()

    def _any_process(self, condition: bool) -> bool:
        """Return whether the condition holds in any process. Every process must call this."""
        if self.args.world_size == 1:
            return condition
        count = torch.tensor(float(condition), device=self.args.device)
        return self.accelerator.reduce(count, "sum").item() > 0

    def end(self) -> None:
        """Release the model's process group, then finish as the parent does.

        `DistributedDataParallel` holds a reference to the process group. A Gloo group that lives until the end of its
        process sometimes aborts it with "terminate called without an active exception" (pytorch issue 190489).
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()
        super().end()


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Delay SIGTERM in this thread, and block it in the processes that the thread starts meanwhile.

    Schedulers send SIGTERM to all processes of a job. It would kill the workers of a DataLoader, and thereby the run.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _PreemptionCallback(TrainerCallback):
    """Stops the training loop after a SIGTERM, and makes sure that its last step has a checkpoint."""

    def __init__(self, trainer: PreemptibleTrainer):
        self.trainer = trainer
        self.saved_step: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved_step = None

    def on_step_end(self, args, state, control, **kwargs):
        # All processes stop after the same step, whichever of them received the signal.
        if self.trainer._any_process(self.trainer._received_sigterm):
            self.trainer.terminated = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        self.saved_step = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        # The loop ends here after a SIGTERM, usually in the middle of an epoch. With save_strategy="best", the
        # Trainer overwrites should_save whenever it evaluates, so the checkpoint cannot be requested in on_step_end.
        if self.trainer.terminated:
            control.should_log = control.should_evaluate = False
            control.should_save = self.saved_step != state.global_step
