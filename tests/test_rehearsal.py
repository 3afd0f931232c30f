"""The rehearsal: what it refuses, and that nothing is left of it."""

import random

import datasets
import numpy as np
import pytest
import torch
from architectures import dpt
from conftest import load_folder, tiny_mobilenet_v2, tiny_segformer
from test_trainer import Examples, config

from pals_hf import PALSTrainer
from pals_hf.data import EvalTransform, TransformedDataset
from pals_hf.errors import InputError, TrainingError
from pals_hf.models import build_image_processor


def refuses(trainer, message):
    with pytest.raises(InputError, match=message):
        trainer.dry_run()


def allocate_too_much(*_):
    torch.empty(2**50)


class Sized(torch.utils.data.Dataset):
    """Validation images of two sizes, as `TransformedDataset` knows them."""

    dataset = datasets.Dataset.from_dict({"class_pixels": [[64 * 64], [64 * 128], [64 * 64]]})

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return Examples(1, (64, 128 if index == 1 else 64))[0]


class TestLeavesNoTrace:
    def test_in_network_trainer_and_random_numbers(self, tmp_path):
        model = tiny_mobilenet_v2()
        trainer = PALSTrainer(model, config(tmp_path, freeze_backbone=True), train_dataset=Examples(2, (32, 32)))
        first, *others = model.parameters()
        first.grad = gradient = torch.ones_like(first)
        model.eval().segmentation_head.train()

        def state():
            numbers = [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))]
            return [*model.state_dict().values(), *numbers, *(module.training for module in model.modules())]

        before, python = [torch.as_tensor(value).clone() for value in state()], random.getstate()
        trainer.dry_run()
        assert all(torch.equal(torch.as_tensor(now), then) for now, then in zip(state(), before, strict=True))
        assert random.getstate() == python
        assert trainer.optimizer is None
        assert first.grad is gradient
        assert all(parameter.grad is None for parameter in others)
        assert not trainer.accelerator._dataloaders

    def test_the_training_is_bit_identical(self, folder, tmp_path):
        """With dropout, batch norm, shuffled data and random crops."""
        processor, weights = build_image_processor(None), []
        data = load_folder(folder)
        for is_rehearsed in (False, True):
            torch.manual_seed(0)
            sets = [TransformedDataset(split, EvalTransform(processor)) for split in (data.train, data.validation)]
            args = config(tmp_path, max_steps=3, per_device_train_batch_size=3)
            trainer = PALSTrainer(tiny_segformer(), args, train_dataset=sets[0], eval_dataset=sets[1])
            if is_rehearsed:
                trainer.dry_run()
            trainer.train()
            weights.append([value.clone() for value in trainer.model.state_dict().values()])
        assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


class TestTrainingStep:
    def test_backward(self, tmp_path):
        model = tiny_segformer()
        next(model.parameters()).register_hook(lambda gradient: 1 / 0)
        refuses(PALSTrainer(model, config(tmp_path), train_dataset=Examples()), "fails on 4 training images of 32x48")

    def test_last_batch_of_one_image(self, tmp_path):
        """Batch norm behind the global pooling of DeepLab needs two of them."""

        def trainer(count, **options):
            args = config(tmp_path, **{"loss": "ce", "max_steps": -1, "per_device_train_batch_size": 2, **options})
            return PALSTrainer(tiny_mobilenet_v2(), args, train_dataset=Examples(count, (32, 32)))

        refuses(
            trainer(3), "1 training image of 32x32 pixels in the last batch of an epoch: .* --dataloader_drop_last"
        )
        refuses(trainer(2, per_device_train_batch_size=1), "fails on 1 training image of .*--freeze_batch_norm")
        trainer(3, dataloader_drop_last=True).dry_run()
        trainer(3, max_steps=1).dry_run()  # never gets there

    def test_size_of_the_network(self, tmp_path):
        network = dpt(use_auxiliary_head=False)
        trainer = PALSTrainer(network, config(tmp_path), train_dataset=Examples(size=(48, 64)))
        refuses(trainer, "fails on 4 training images of 48x64 pixels: .* try --image_size 64 64")

    def test_too_little_memory(self, tmp_path):
        model = tiny_segformer()
        model.register_forward_pre_hook(allocate_too_much)
        trainer = PALSTrainer(model, config(tmp_path), train_dataset=Examples())
        refuses(trainer, "allocate .* Use a smaller --per_device_train_batch_size")
        with pytest.raises(TrainingError, match=r"out of memory after step 0: .*the last checkpoint is none yet"):
            trainer.train()
        args = config(tmp_path, auto_find_batch_size=True)
        PALSTrainer(model, args, train_dataset=Examples()).dry_run()  # the training will look for a size

    def test_images_of_several_sizes(self, tmp_path):
        examples = [Examples(1)[0], Examples(1, (64, 64))[0]]
        refuses(PALSTrainer(tiny_segformer(), config(tmp_path), train_dataset=examples), "differ in size")

    def test_optimizer_and_schedule(self, tmp_path):
        for options in ({"optim": "adafactor", "optim_args": "nonsense"}, {"lr_scheduler_type": "cosine_with_min_lr"}):
            trainer = PALSTrainer(tiny_segformer(), config(tmp_path, **options), train_dataset=Examples())
            with pytest.raises(ValueError, match=r"min_lr|unpack"):
                trainer.dry_run()


class TestEvaluation:
    def test_smallest_and_largest_image(self, tmp_path):
        """The first image would pass."""
        network = dpt(use_auxiliary_head=False)
        options = {"train_dataset": Examples(size=(64, 64)), "eval_dataset": Sized()}
        refuses(
            PALSTrainer(network, config(tmp_path), **options),
            "a validation image of 64x128 pixels.* --image_size 64 64",
        )
        PALSTrainer(network, config(tmp_path, eval_window=[64, 64]), **options).dry_run()

    @pytest.mark.parametrize("metric", ["dice", "per_category_iou"])
    def test_metric_that_does_not_exist(self, metric, tmp_path):
        args = config(tmp_path, eval_strategy="steps", metric_for_best_model=metric)
        trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples(), eval_dataset=Examples(1))
        refuses(trainer, f"metric_for_best_model must be one of loss, mean_accuracy, .*, got {metric}")

    def test_metrics_of_several_sets(self, tmp_path):
        args = config(tmp_path, eval_strategy="steps", metric_for_best_model="eval_night_mean_ioU")
        sets = {"day": Examples(1), "night": Examples(1)}
        trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples(), eval_dataset=sets)
        refuses(trainer, "must be one of day_loss, .*night_mean_iou")
        trainer.args.metric_for_best_model = "eval_night_mean_iou"
        trainer.dry_run()

    def test_empty_set(self, tmp_path):
        trainer = PALSTrainer(tiny_segformer(), config(tmp_path), train_dataset=Examples(), eval_dataset=Examples(0))
        refuses(trainer, "the validation data set is empty")
