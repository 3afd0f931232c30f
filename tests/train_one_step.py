"""One step on eight images, cut up as asked: `train_one_step.py FOLDER LOSS BATCH_SIZE ACCUMULATION`.

Images and their void pixels are the same for every cut; batch norm is frozen and dropout off, so that a batch gives
one gradient however it is cut up.
"""

import json
import sys
from pathlib import Path

import torch
from conftest import tiny_segformer, tiny_upernet
from test_trainer import NO_RANDOMNESS, Examples, config

from pals_hf import PALSTrainer


def main(folder, loss, batch_size, accumulation):
    record = {}
    for name, build in (("segformer", lambda: tiny_segformer(**NO_RANDOMNESS)), ("upernet", tiny_upernet)):
        torch.manual_seed(0)
        args = config(
            folder / name,
            loss=loss,
            per_device_train_batch_size=int(batch_size),
            gradient_accumulation_steps=int(accumulation),
            freeze_batch_norm=True,
        )
        trainer = PALSTrainer(build(), args, train_dataset=Examples(8))
        trainer.train()
        (line,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        record[name] = {key: line[key] for key in line if key.startswith(("loss", "grad_norm", "q_"))}
    record["world_size"] = trainer.accelerator.num_processes
    if trainer.is_world_process_zero():
        (folder / "record.json").write_text(json.dumps(record))
    trainer.end()


main(Path(sys.argv[1]), *sys.argv[2:])
