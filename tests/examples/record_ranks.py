"""Runs the program and writes what each process was: `record_ranks.py FOLDER [the program's arguments]`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import run_seg_pals
import torch.distributed

from pals_hf.data import TrainTransform, TransformedDataset

trained_on = []


class RecordingDataset(TransformedDataset):
    def __getitem__(self, index):
        if isinstance(self.transform, TrainTransform):
            trained_on.append(self.dataset["id"][index])
        return super().__getitem__(index)


def main(folder, *arguments):
    run_seg_pals.TransformedDataset = RecordingDataset
    end, train = run_seg_pals.PALSTrainer.end, run_seg_pals.train

    def record_and_train(trainer):
        trained_on.clear()  # the rehearsal is no training
        train(trainer)

    def record_and_end(trainer):
        folder.mkdir(exist_ok=True)
        distributed = torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        world_size = torch.distributed.get_world_size() if distributed else 1
        record = {"world_size": world_size, "trained_on": trained_on}
        (folder / f"rank-{rank}.json").write_text(json.dumps(record))
        end(trainer)

    run_seg_pals.PALSTrainer.end, run_seg_pals.train = record_and_end, record_and_train
    run_seg_pals.main(list(arguments))


main(Path(sys.argv[1]), *sys.argv[2:])
