"""Train a segmentation model on images and masks, to a checkpoint for `from_pretrained`.

    pals-hf train --train_fraction 0.5             (a small SegFormer on built-in street scenes, offline)
    pals-hf train --dataset_dir my_data --model_name_or_path nvidia/mit-b0 --image_size 512 512

All options can come from a file, `--recipe settings.yaml`; options on the command line win.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, set_seed

from ..backbones import LORA_RATES, is_backbone, published_rates
from ..checkpoints import is_complete_checkpoint, last_complete_checkpoint
from ..config import PALSConfig
from ..data import FractionManifest, SegmentationData, SegmentationStream
from ..data.fractions import MANIFEST
from ..data.scaling import ATTRIBUTE
from ..errors import InputError
from ..files import atomic_write_text
from ..hub import push_in_background
from ..model_card import CardFacts
from ..models import build_image_processor, build_model
from ..pretrained import load_config
from ..run_folder import (
    RESULTS,
    discard_other_run,
    find_checkpoint,
    has_results,
    lock_output_dir,
    refuse_other_run,
    refuse_other_training,
)
from ..sizes import size_multiple
from ..trainer import PALSTrainer
from .arguments import TrainArguments
from .ending import is_main_process, leave, one_line
from .parser import OptionParser, with_recipe
from .report import SKIPPED, load_finished, report
from .train_data import build_datasets, build_streams, fit_sizes, load_data, scale_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# PALSConfig's default is for pretrained backbones.
LEARNING_RATE_OF_RANDOM_WEIGHTS = 2e-3


def main(argv: list[str] | None = None, arguments: type[TrainArguments] = TrainArguments) -> None:
    """Run the program.

    Args:
        argv: the command line. Default: that of this process.
        arguments: the dataclass of the options; a study has more of them.
    """
    argv, trainer = sys.argv[1:] if argv is None else argv, None
    with one_line(lambda: trainer is None or not trainer.has_stepped, argv):
        args, config = parse_arguments(argv, arguments)
        set_threads(args.num_threads)
        start = choose_output_dir(args, config)
        is_new = not Path(config.output_dir).exists()
        data, manifest = load_data(args)
        data = scale_data(args, config, data)
        try:
            trainer = build_trainer(args, config, data, manifest)
            has_ended = not args.eval_only and is_finished(trainer, manifest)
            if not (args.eval_only or has_ended):
                trainer.dry_run()
        except BaseException:
            if is_new and is_main_process():  # transformers creates the folder
                remove_if_empty(Path(config.output_dir))
            raise
        alone = lock_output_dir(config.output_dir) if is_main_process() else nullcontext()
        if args.eval_only:
            with alone:
                report(trainer, data, trainer.evaluate(), args.model_name_or_path)
        elif has_ended:
            leave_alone(trainer)
        else:
            if start and is_main_process():
                print(start, flush=True)
            with alone:
                prepare_output_dir(args, config, data, manifest)
                with saying_how_to_resume(trainer):
                    train(trainer)
                    metrics = {**trainer.evaluate(), **args.more_metrics(trainer)}
                    if args.calibrate:
                        metrics |= calibrate(trainer)
                    report(trainer, data, metrics, config.output_dir)
                    if config.push_to_hub:
                        push(trainer)
        trainer.end()


def remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds files
        folder.rmdir()


def parse_arguments(argv: list[str], arguments: type[TrainArguments]) -> tuple[TrainArguments, PALSConfig]:
    """Parse the options. Networks with random weights get a learning rate of their own unless one is given."""
    parser = OptionParser((arguments, PALSConfig), description=__doc__)
    parser.set_defaults(output_dir="")  # stands for a new folder
    argv = with_recipe(argv, parser)
    args, config = parser.parse(argv)
    refuse_other_tasks(args, config, parser, argv)
    if config.learning_rate == 0 and not args.eval_only:  # in Python, it may be a probe
        raise InputError("learning_rate must be positive, got 0: the network would stay as it is")
    args.given_rates = [name for name in ("learning_rate", "head_lr_multiplier") if parser.is_given(name, argv)]
    if args.has_random_weights and "learning_rate" not in args.given_rates:
        config.learning_rate = LEARNING_RATE_OF_RANDOM_WEIGHTS
    return args, config


def use_published_rates(args: TrainArguments, config: PALSConfig, model: PreTrainedModel) -> None:
    """Use the learning rates of a published recipe for adapters or a new head, unless the command line gives them."""
    if args.has_random_weights or config.freeze_backbone:
        return
    rates = None
    if config.lora_rank is not None:
        rates = LORA_RATES
    elif args.head is not None or is_backbone(load_config(args.model_name_or_path)):
        rates = published_rates(model.config)
    if rates is None or len(args.given_rates) == 2:
        return
    for name in ("learning_rate", "head_lr_multiplier"):
        if name not in args.given_rates:
            setattr(config, name, getattr(rates, name))
    if is_main_process():
        print(
            f"note: learning_rate {config.learning_rate:g} and head_lr_multiplier {config.head_lr_multiplier:g}, from "
            f"{rates.source}",
            file=sys.stderr,
        )


def refuse_other_tasks(args: TrainArguments, config: PALSConfig, parser: OptionParser, argv: list[str]) -> None:
    """Refuse do_train, do_eval and do_predict where they ask for something else than this program does."""
    does = {"do_train": not args.eval_only, "do_eval": True, "do_predict": False}
    asked = {name: getattr(config, name) for name in does if parser.is_given(name, argv)}
    for name, value in asked.items():
        if value != does[name]:
            raise InputError(
                f"{name} {value} has no effect here. This program trains and scores, or with --eval_only scores; "
                "`pals-hf predict` segments images"
            )
    if asked.get("do_eval") and not asked.get("do_train") and not args.eval_only:
        raise InputError("do_eval without do_train would still train. Use --eval_only to score a checkpoint")


def set_threads(num_threads: int | None) -> None:
    """Use all cores, because `accelerate launch` leaves each process one thread."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if num_threads is not None and num_threads < 1:
        raise InputError(f"num_threads must be positive, got {num_threads}")
    torch.set_num_threads(num_threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def choose_output_dir(args: TrainArguments, config: PALSConfig) -> str:
    """Choose the output folder and the checkpoint to resume from, the same for all processes.

    Nothing is written, except for a checkpoint that is downloaded from the Hub.

    Returns:
        Where the run starts, for the user, if a checkpoint was asked for.
    """
    start = ""
    if config.resume_from_checkpoint is not None:
        checkpoint = broadcast_object_list([find_checkpoint(config) if is_main_process() else None])[0]
        if checkpoint is not None and not is_complete_checkpoint(checkpoint):
            raise InputError(
                f"not every process can read {checkpoint}: resume from a folder on a disk that all machines share"
            )
        config.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
        config.output_dir = config.output_dir or str(checkpoint.parent)
        start = "starting a new run" if checkpoint is None else f"resuming from {checkpoint}"
    if not config.output_dir:
        share = "manifest" if args.train_manifest else args.train_count or f"{args.train_fraction or 1:g}"
        what = "eval" if args.eval_only else f"{config.loss}-{share}-seed{config.seed}"
        name = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{what}-{uuid.uuid4().hex[:4]}"
        config.output_dir = broadcast_object_list([name])[0]
    refuse_other_run(Path(config.output_dir), checkpoint_of(config), args.overwrite)
    return start


def checkpoint_of(config: PALSConfig) -> Path | None:
    return None if config.resume_from_checkpoint is None else Path(config.resume_from_checkpoint)


def build_trainer(
    args: TrainArguments,
    config: PALSConfig,
    data: SegmentationData | SegmentationStream,
    manifest: FractionManifest | None,
) -> PALSTrainer:
    set_seed(config.seed)  # so that a new head is the same for every loss
    if args.eval_only:
        model, processor = load_finished(args.model_name_or_path, data.id2label, "cpu")
    else:
        name = args.model_name_or_path
        shape = (args.output_stride, args.from_scratch, args.channels, args.head, args.head_channels)
        model = build_model(name, data.id2label, *shape)
        use_published_rates(args, config, model)
        fit_sizes(args, config, data, size_multiple(model.config))
        processor = build_image_processor(name, args.image_size, getattr(data, "scaling", None))
    callbacks = []
    if args.early_stopping_patience is not None:
        if not config.load_best_model_at_end:
            raise InputError("early_stopping_patience needs --load_best_model_at_end True")
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    build = build_streams if args.streaming else build_datasets
    train_dataset, eval_dataset = build(args, config, data, manifest, processor)
    trainer = PALSTrainer(
        model,
        config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        callbacks=callbacks,
        card_facts=card_facts(args, data, manifest),
    )
    if args.calibrate:
        trainer.check_for_calibration()
    return trainer


def card_facts(
    args: TrainArguments, data: SegmentationData | SegmentationStream, manifest: FractionManifest | None
) -> CardFacts:
    """Collect the facts on the data for the model card."""
    scaling = getattr(data, "scaling", None)
    facts = CardFacts(
        license=args.license,
        dataset=data.name,
        dataset_id=data.name if data.revision else None,
        dataset_revision=data.revision,
        dataset_license=data.license,
        split=args.split,
        validation_images=None if isinstance(data, SegmentationStream) else len(data.validation),
        settings=args.card_settings() | ({} if scaling is None else {ATTRIBUTE: scaling.to_dict()}),
    )
    return facts if manifest is None else facts.with_manifest(manifest)


def is_finished(trainer: PALSTrainer, manifest: FractionManifest | None) -> bool:
    """Return whether the run to resume has its results and all steps of this command, so that nothing is left to do.

    Nothing is written.

    Raises:
        InputError: it is another training, see [`refuse_other_training`].
    """
    config, checkpoint = trainer.args, checkpoint_of(trainer.args)
    if checkpoint is None:
        return False
    refuse_other_training(checkpoint, config, manifest, trainer.model.config.id2label)
    is_done = has_results(Path(config.output_dir), checkpoint) and trainer.has_all_steps(checkpoint)
    return broadcast_object_list([is_done])[0]


def leave_alone(trainer: PALSTrainer) -> None:
    """Say that a run is finished, and push it if it is to be pushed. The run's folder stays as it is."""
    config, step = trainer.args, int(checkpoint_of(trainer.args).name.rsplit("-", 1)[1])
    if not is_main_process():
        return
    print(
        f"{config.output_dir} is finished: it has all of its {step} steps, and its results are in "
        f"{Path(config.output_dir) / RESULTS}. To train it longer, raise --max_steps, --num_train_epochs or "
        "--early_stopping_patience. For a new run, use another --output_dir.",
        flush=True,
    )
    if config.push_to_hub:  # the run may have been stopped while it was pushed
        where = {"revision": config.hub_revision, "token": config.hub_token}
        push = push_in_background(config.output_dir, trainer.hub_model_id, message="End of training", **where)
        print(f"pushed: {push.result().repo_url}", flush=True)


def prepare_output_dir(
    args: TrainArguments,
    config: PALSConfig,
    data: SegmentationData | SegmentationStream,
    manifest: FractionManifest | None,
) -> None:
    """Clear the output folder for this run. All input has been checked by now."""
    folder, checkpoint = Path(config.output_dir), checkpoint_of(config)
    if not is_main_process():
        return
    refuse_other_run(folder, checkpoint, args.overwrite)  # another run may have used it while the data was loaded
    discard_other_run(folder, checkpoint)
    if manifest is not None:
        manifest.save(folder / MANIFEST)
    (folder / SKIPPED).unlink(missing_ok=True)
    if not args.streaming and data.skipped:
        atomic_write_text(folder / SKIPPED, json.dumps(data.skipped, indent=2, ensure_ascii=False))


def train(trainer: PALSTrainer) -> None:
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if trainer.terminated:
        trainer.end()
        leave(signal.SIGTERM, how_to_resume(trainer))
    trainer.save_model(_internal_call=True)  # the run is pushed later, with its results
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)


def calibrate(trainer: PALSTrainer) -> dict[str, Any]:
    """Calibrate and save the network. Images that do not allow it must not cost a finished training its results."""
    try:
        metrics = trainer.calibrate()
    except InputError as error:
        if is_main_process():
            print(f"note: the checkpoint is not calibrated: {error}", file=sys.stderr)
        return {}
    trainer.save_model(_internal_call=True)
    return metrics


@contextmanager
def saying_how_to_resume(trainer: PALSTrainer) -> Iterator[None]:
    """Let a `KeyboardInterrupt` say how to resume the run."""
    try:
        yield
    except KeyboardInterrupt:
        trainer.cancel_pushes()
        if trainer.terminated:  # all processes end, none of them waits for another one
            trainer.end()
        raise KeyboardInterrupt(how_to_resume(trainer)) from None


def how_to_resume(trainer: PALSTrainer) -> str:
    checkpoint = last_complete_checkpoint(trainer.args.output_dir)
    if checkpoint is None:
        return "there is no checkpoint yet, so start the run again"
    return f"{checkpoint} is saved, resume with --resume_from_checkpoint {checkpoint}"


def push(trainer: PALSTrainer) -> None:
    done = trainer.push_to_hub()
    if done is not None:
        print(f"pushed: {done.repo_url}", flush=True)
