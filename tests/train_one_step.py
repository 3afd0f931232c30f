"""One step on eight images, cut up as asked: `train_one_step.py FOLDER LOSS BATCH_SIZE ACCUMULATION`.

Images and their void pixels are the same for every cut; batch norm is frozen and dropout off, so that a batch gives
one gradient however it is cut up.
"""

import json
import sys
import weakref
from pathlib import Path

import torch
from architectures import AUXILIARY
from conftest import tiny_segformer, tiny_upernet
from test_trainer import NO_RANDOMNESS, Examples, config

from pals_hf import PALSTrainer

OPTIONS = {
    "pals, every option": {
        "loss": "pals",
        "pairs": "same_class",
        "include_self": False,
        "void_keys": False,
        "teacher": "ema",
        "distill_void": True,
        "affinity_source": "encoder",
    }
}


def main(folder, loss, batch_size, accumulation):
    record = {}
    builders = {
        "segformer": lambda: tiny_segformer(**NO_RANDOMNESS),
        "upernet": tiny_upernet,
        "upernet, auxiliary head": lambda: tiny_upernet(**AUXILIARY, auxiliary_in_channels=16),
    }
    for name, build in builders.items():
        torch.manual_seed(0)
        args = config(
            folder / name,
            per_device_train_batch_size=int(batch_size),
            gradient_accumulation_steps=int(accumulation),
            freeze_batch_norm=True,
            **OPTIONS.get(loss, {"loss": loss}),
        )
        trainer = PALSTrainer(build(), args, train_dataset=Examples(8))
        trainer.train()
        (line,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        record[name] = {key: line[key] for key in line if key.startswith(("loss", "grad_norm", "q_"))}
    record["world_size"] = trainer.accelerator.num_processes
    if trainer.is_world_process_zero():
        (folder / "record.json").write_text(json.dumps(record))
    group = weakref.ref(torch.distributed.group.WORLD) if torch.distributed.is_initialized() else None
    trainer.end()
    # What outlives this can abort the process when it ends.
    assert group is None or group() is None, "something holds the process group"


main(Path(sys.argv[1]), *sys.argv[2:])
