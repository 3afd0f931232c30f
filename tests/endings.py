"""Trainings with workers, and the ways in which they end: programs for a `Zygote`."""

import signal
import sys
import threading
import time

import datasets
from conftest import tiny_segformer
from test_trainer import Examples, OnStepEnd, config
from torch.utils.data import IterableDataset

import pals_hf.cli.train  # noqa: F401
from pals_hf import PALSTrainer
from pals_hf.cli.ending import ends_at_ctrl_c, one_line
from pals_hf.data.caching import cached_map
from pals_hf.errors import InputError


class Interrupting:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


class Stream(IterableDataset):
    """Examples, endlessly or once. One of them may be bad."""

    def __init__(self, is_endless=False, bad=None):
        self.examples, self.is_endless, self.bad = Examples(8), is_endless, bad

    def __iter__(self):
        number = 0
        while self.is_endless or number < 8:
            if number == self.bad:
                raise InputError("a bad mask")
            yield self.examples[number % 8]
            number += 1


def train(arguments):
    """Train with workers: `train(FOLDER, "map" or "stream", "persistent" or "", ENDING)`."""
    folder, kind, persistent, ending = arguments
    lasts, bad = ending == "lasts", 1 if ending == "bad" else None
    args = config(
        folder,
        max_steps=10_000 if lasts else 2,
        eval_strategy="no" if lasts else "steps",
        eval_steps=1,
        save_strategy="no",
        dataloader_num_workers=2,
        dataloader_persistent_workers=bool(persistent),
    )
    trainer = PALSTrainer(
        tiny_segformer(),
        args,
        train_dataset=Stream(is_endless=True, bad=bad) if kind == "stream" else Examples(800 if lasts else 8),
        eval_dataset=Stream() if kind == "stream" else Examples(8),
    )
    trainer.add_callback(OnStepEnd(lambda: print(f"step {trainer.state.global_step}", flush=True)))
    if ending == "raises":
        trainer.add_callback(OnStepEnd(lambda: {}["an error"]))
    trainer.train()
    globals()["kept"] = trainer  # as in a script, whose variables live until Python exits
    print(f"terminated: {trainer.terminated}", flush=True)
    if ending == "exits":
        sys.exit(3)


@ends_at_ctrl_c
def is_interrupted_in_a_destructor(_):
    Interrupting()
    time.sleep(60)


@ends_at_ctrl_c
def map_slowly(arguments):
    """Compute 40 rows in a second, and cache them: `map_slowly(CACHE, NUM_PROC)`."""
    datasets.config.HF_DATASETS_CACHE, num_proc = arguments[0], int(arguments[1])
    print(rows := cached_map(numbers(), _double_slowly, "doubled", num_proc=num_proc if num_proc > 1 else None)["x"])
    assert list(rows) == list(range(0, 80, 2))


def numbers():
    return datasets.Dataset.from_dict({"x": range(40)})


def _double_slowly(row):
    print("called", flush=True)
    time.sleep(0.02)
    return {"x": 2 * row["x"]}


@one_line()
def is_interrupted_beside_a_progress_bar(arguments):
    """The bar is of a thread that would outlive the main one, like those of uploads to the Hub."""

    def draw():
        while True:
            sys.stderr.write("\r50 %")
            sys.stderr.flush()

    sys.setswitchinterval(1e-6)  # so that it draws at any moment
    threading.Thread(target=draw).start()
    time.sleep(0.2)
    signal.raise_signal(signal.SIGINT)
