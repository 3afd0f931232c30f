"""Runs the program and writes what each process was: `record_ranks.py FOLDER [the program's arguments]`."""

import json
import sys
from pathlib import Path

import torch.distributed

from pals_hf.cli import train as program
from pals_hf.cli import train_data
from pals_hf.data import TrainTransform, TransformedDataset

trained_on = []


class RecordingDataset(TransformedDataset):
    def __getitem__(self, index):
        if isinstance(self.transform, TrainTransform):
            trained_on.append(self.dataset["id"][index])
        return super().__getitem__(index)


def main(folder, *arguments):
    train_data.TransformedDataset = RecordingDataset
    end, train = program.PALSTrainer.end, program.train

    def record_and_train(trainer):
        trained_on.clear()  # the dry run is no training
        train(trainer)

    def record_and_end(trainer):
        folder.mkdir(exist_ok=True)
        distributed = torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        world_size = torch.distributed.get_world_size() if distributed else 1
        record = {"world_size": world_size, "trained_on": trained_on}
        (folder / f"rank-{rank}.json").write_text(json.dumps(record))
        end(trainer)

    program.PALSTrainer.end, program.train = record_and_end, record_and_train
    program.main(list(arguments))


main(Path(sys.argv[1]), *sys.argv[2:])
