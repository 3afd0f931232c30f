"""A Trainer that can be preempted: SIGTERM or ctrl-C ends the training after the current step, with a checkpoint."""

from __future__ import annotations

import gc
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PreemptibleTrainer(Trainer):
    """End the training after the current step on SIGTERM, which schedulers send before they take a machine away.

    The step is logged and evaluated if that was due, and a checkpoint is saved whatever `save_strategy` says. SIGINT,
    which is ctrl-C, does the same, and then raises `KeyboardInterrupt`. A second SIGINT raises it at once.

    The workers of a DataLoader outlive both signals, which reach all processes of a job, and end with this process.

    Attributes:
        terminated: True if a signal ended the last training. The weights are then those of the last step, also with
            `load_best_model_at_end`, because the run can be resumed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._received, self.terminated = 0, False  # the number of the last signal, in this process
        super().__init__(*args, **kwargs)
        self.add_callback(_PreemptionCallback(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does, but end after the current step on SIGTERM or SIGINT.

        Raises:
            KeyboardInterrupt: SIGINT ended the training.
        """
        self._received, self.terminated = 0, False
        with self._listening():
            output = super().train(*args, **kwargs)
        if self._received and not self.terminated:
            signal.raise_signal(self._received)  # it came after the last step: it acts as it does after a training
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        return output

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Note SIGTERM and SIGINT instead of following them. SIGINT stays ignored, or in the hands of the caller."""
        if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread
            yield
            return
        is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        heard = _SIGNALS if is_ours else (signal.SIGTERM,)
        before = {number: signal.signal(number, self._receive) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, *_: Any) -> None:
        if number == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        if number == signal.SIGINT and os.isatty(2):  # written at once: print() may have been interrupted itself
            os.write(2, b"\nThe run saves a checkpoint after this step. Press ctrl-C again to end it at once.\n")

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with _sigterm_blocked():  # the first batch of an epoch starts the workers of the DataLoader
            return super().get_batch_samples(*args, **kwargs)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        _guard_workers(dataloader)
        with _sigterm_blocked() if self.is_in_train else nullcontext():
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def _load_best_model(self) -> None:
        if not self.terminated:
            super()._load_best_model()

    def _any_process(self, condition: bool) -> bool:
        """Return whether the condition holds in any process. Every process must call this."""
        return self._largest(int(condition)) > 0

    def _largest(self, number: int) -> int:
        """Return the largest number of all processes. Every process must call this."""
        if self.args.world_size == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.args.device)).max())

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
    """Delay SIGTERM in this thread, and block it in the workers that the thread starts meanwhile.

    Otherwise SIGTERM would end a worker that has started and does not run [`_outlive_signals`] yet.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- Workers of a DataLoader ----


def _guard_workers(loader: DataLoader) -> None:
    """Let the workers of a DataLoader outlive SIGTERM and SIGINT, and end with this process."""
    loader = getattr(loader, "base_dataloader", loader)  # within that of Accelerate
    then = loader.worker_init_fn
    if not (isinstance(then, partial) and then.func is _outlive_signals):
        loader.worker_init_fn = partial(_outlive_signals, _ending_of(os.getpid()), then)


@cache
def _ending_of(pid: int) -> Tensor:
    """Return a flag, in memory that is shared with the workers, that becomes True when this process exits.

    `multiprocessing` sends SIGTERM to the workers when Python exits, and then waits for them. This comes before that.
    """
    flag = torch.zeros((), dtype=torch.bool).share_memory_()
    multiprocessing.util.Finalize(None, flag.fill_, args=(True,), exitpriority=0)
    return flag


def _outlive_signals(is_ending: Tensor, then: Callable[[int], None] | None, worker_id: int) -> None:
    """Start a worker: block SIGTERM and SIGINT in it, and end it when the main process exits or is gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_end_with_main, args=(is_ending, os.getppid()), daemon=True).start()
    if then is not None:
        then(worker_id)


def _end_with_main(is_ending: Tensor, parent: int) -> None:
    while os.getppid() == parent and not is_ending:
        signal.sigtimedwait(_SIGNALS, 1)
    os._exit(0)


class _PreemptionCallback(TrainerCallback):
    """Stops the training loop after a signal, and makes sure that its last step has a checkpoint."""

    def __init__(self, trainer: PreemptibleTrainer):
        self.trainer = trainer
        self.saved_step: int | None = None

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.saved_step = None
        if train_dataloader is not None:
            _guard_workers(train_dataloader)

    def on_step_end(self, args, state, control, **kwargs):
        self._stop_if_told(control)

    def on_save(self, args, state, control, **kwargs):
        self.saved_step = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        # The loop ends here after a signal, usually in the middle of an epoch. With save_strategy="best", the
        # Trainer overwrites should_save whenever it evaluates, so the checkpoint cannot be requested in on_step_end.
        if state.global_step >= state.max_steps:  # the signal may have come in the evaluation after the last step
            self._stop_if_told(control)
        if self.trainer.terminated:
            control.should_log = control.should_evaluate = False
            control.should_save = self.saved_step != state.global_step

    def _stop_if_told(self, control):
        # All processes stop after the same step, whichever of them received the signal.
        if number := self.trainer._largest(self.trainer._received):
            self.trainer._received = number
            self.trainer.terminated = control.should_training_stop = True
