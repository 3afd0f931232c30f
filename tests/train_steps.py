"""Trains and scores in each of the given cuts of a batch: `train_steps.py FOLDER [BATCH_SIZExACCUMULATION ...]`.

Started with a config of FSDP, it shards: Accelerate does that on GPUs only, so it is told that these processes have
some.

Images and their void pixels are the same for every cut; batch norm is frozen and dropout off, so that a batch gives
one gradient however it is cut up. The optimizer is SGD, whose steps are as close as the gradients are: Adam makes a
full step of any rounding error where a gradient is zero.
"""

import json
import os
import sys
import weakref
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from architectures import AUXILIARY
from conftest import tiny_segformer, tiny_upernet
from safetensors.torch import save_file
from test_trainer import NO_RANDOMNESS, Examples, config, logged
from torch.distributed.tensor import DTensor

from pals_hf import PALSTrainer
from pals_hf.errors import InputError, TrainingError
from pals_hf.functional import upsample_argmax

LOSSES = {
    "pals": {},
    "ce": {"loss": "ce"},
    "label smoothing": {"loss": "label_smoothing"},
    "focal": {"loss": "focal"},
    "pals, every option": {
        "affinity": {"pairs": "same_class", "include_self": False, "unlabeled_keys": False, "source": "encoder"},
        "distill_unlabeled": True,
    },
    "pals, few keys": {"affinity": {"keys": 6}},
}
NETWORKS = {
    "segformer": lambda: tiny_segformer(**NO_RANDOMNESS),
    "upernet": tiny_upernet,
    "upernet, auxiliary head": lambda: tiny_upernet(**AUXILIARY, auxiliary_in_channels=16),
}
RUNS = [(network, loss) for network in ("segformer", "upernet") for loss in ("pals", "ce", "label smoothing")]
RUNS += [
    ("segformer", "focal"),
    ("segformer", "pals, every option"),
    ("segformer", "pals, few keys"),
    ("upernet, auxiliary head", "pals"),
]
STEPS = 3
IS_SHARDED = os.environ.get("ACCELERATE_USE_FSDP") == "true"


class RecordedExamples(Examples):
    """Remembers what this process asked for."""

    def __init__(self):
        super().__init__(8 * STEPS)
        self.seen = []

    def __getitem__(self, index):
        self.seen.append(int(index))
        return super().__getitem__(index)


def train(folder, network, loss, batch_size, accumulation, **options):
    torch.manual_seed(0)
    args = config(
        folder,
        max_steps=STEPS,
        learning_rate=0.05,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        freeze_batch_norm=True,
        **{"optim": "sgd", **LOSSES[loss], **options},
    )
    if IS_SHARDED:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    examples = RecordedExamples()
    trainer = PALSTrainer(NETWORKS[network](), args, train_dataset=examples)
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    values = {name: logged(trainer, name) for name in ("loss", "grad_norm")}
    weights = trainer.model.state_dict()
    if IS_SHARDED:
        assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
        weights = {name: whole(tensor) for name, tensor in weights.items()}
    save(folder, trainer, {**values, "seen": examples.seen}, weights)
    return trainer


def train_sharded(folder):
    """Once as the others; then with checkpoints, and once more from one of them."""
    train(folder / "4x1, segformer, pals", "segformer", "pals", 4, 1)
    saving = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1}  # SGD has no state to be saved
    train(folder / "saved", "segformer", "pals", 4, 1, **saving)
    resume = {"resume_from_checkpoint": str(folder / "saved" / "checkpoint-2"), "save_strategy": "no"}
    trainer = train(folder / "resumed", "segformer", "pals", 4, 1, **{**saving, **resume})
    trainer.save_model()
    try:
        trainer.calibrate([Examples(1)[0]])
    except InputError as error:
        save(folder / "calibrated", trainer, {"message": str(error)}, {})
    return trainer


def score(folder):
    """Seven images of different sizes: on two or three processes some of them are seen twice, and must count once."""
    torch.manual_seed(0)
    images = [Examples(index + 1, (32 + 8 * (index % 3), 48))[index] for index in range(7)]
    trainer = PALSTrainer(tiny_segformer(), config(folder, per_device_eval_batch_size=2), eval_dataset=images)
    trainer.evaluate()
    save(folder, trainer, {}, {"counts": trainer.metrics.counts})
    calibrate(folder.with_name("calibrated"), trainer)
    return trainer


def calibrate(folder, trainer):
    """On images that the network gets right for the most part, with logits as large as those of a trained one."""
    images, weight = [Examples(index + 1)[index] for index in range(4)], trainer.model.decode_head.classifier.weight
    with torch.no_grad():
        logits = trainer.model.eval()(images[0]["pixel_values"][None]).logits
        weight *= 2 / float((logits - logits.mean(dim=(2, 3), keepdim=True)).std())
    for image in images:
        with torch.no_grad():
            right = upsample_argmax(trainer.model.eval()(image["pixel_values"][None]).logits, image["labels"].shape)[0]
        image["labels"] = torch.where(torch.rand(right.shape) < 0.7, right, image["labels"])
    before = whole(weight)
    temperature = trainer.calibrate(images)["eval_temperature"]
    torch.testing.assert_close(whole(weight) * temperature, before)
    tensors = {"weight": whole(weight)}
    save(folder, trainer, {"temperature": temperature, "weight": tensors["weight"].tolist()}, tensors)


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def train_to_the_best(folder):
    """Every process loads the best checkpoint, which the main process has just written."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = config(folder, max_steps=2, load_best_model_at_end=True, save_total_limit=1, **options)
    trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples(8), eval_dataset=Examples(3))
    trainer.train()
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())


def train_on_a_bad_image(folder):
    """One process sees it, all of them stop."""
    examples = Examples(8)
    examples.images[5, 0, 3, 3] = float("nan")
    args = config(folder, per_device_train_batch_size=4)
    if IS_SHARDED:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = PALSTrainer(tiny_segformer(), args, train_dataset=examples)
    try:
        trainer.train()
        message = "no error"
    except TrainingError as error:
        message = str(error)
    save(folder, trainer, {"message": message}, {})
    return trainer


def save(folder, trainer, record, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"world_size": trainer.accelerator.num_processes, **record}
    (folder / f"rank-{trainer.accelerator.process_index}.json").write_text(json.dumps(record))
    if trainer.is_world_process_zero():
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "tensors.safetensors")


def main(folder, *cuts):
    trainer = train_sharded(folder) if IS_SHARDED else score(folder / "scored")
    if trainer.accelerator.num_processes == 2:
        trainer = train_on_a_bad_image(folder / "bad image")
    if trainer.accelerator.num_processes == 2 and not IS_SHARDED:
        train_to_the_best(folder / "best")
    for cut in cuts:
        for network, loss in RUNS:
            trainer = train(folder / f"{cut}, {network}, {loss}", network, loss, *map(int, cut.split("x")))
    group = weakref.ref(torch.distributed.group.WORLD) if torch.distributed.is_initialized() else None
    trainer.end()
    # What outlives this can abort the process when it ends. Sharded weights have their group as long as they live.
    assert IS_SHARDED or group is None or group() is None, "something holds the process group"


main(Path(sys.argv[1]), *sys.argv[2:])
