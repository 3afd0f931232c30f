import copy
import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from architectures import AUXILIARY
from conftest import ARCHITECTURES, NUM_LABELS, RAW_VOID, tiny_mobilenet_v2, tiny_segformer, tiny_upernet
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    AutoModelForSemanticSegmentation,
    EarlyStoppingCallback,
    Mask2FormerConfig,
    Mask2FormerModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)
from transformers.trainer import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

from pals_hf import PALSConfig, PALSLoss, PALSTrainer, SegmentationMetrics, load_segmentation_dataset
from pals_hf.checkpoints import last_complete_checkpoint
from pals_hf.data import EvalTransform, TrainTransform, TransformedDataset, collate
from pals_hf.data.balance import class_weights
from pals_hf.errors import InputError, TrainingError
from pals_hf.functional import PADDING_INDEX, Affinity, upsample
from pals_hf.inference import predict
from pals_hf.losses import PRESETS, CrossEntropyLoss
from pals_hf.models import build_image_processor
from pals_hf.network_loss import compute_loss_func
from pals_hf.tap import ClassifierTap

NO_RANDOMNESS = {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0, "hidden_dropout_prob": 0.0}


class Examples(Dataset):
    """Random images whose share of void pixels differs: 0, 30, 60, 90 %."""

    def __init__(self, count=4, size=(32, 48)):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(count, 3, *size, generator=generator)
        self.labels = torch.randint(0, NUM_LABELS, (count, *size), generator=generator)
        for index, labels in enumerate(self.labels):
            labels[: round(size[0] * 0.3 * (index % 4))] = 255

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def config(folder, **overrides):
    settings = {
        "max_steps": 1,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
        "max_grad_norm": 1e9,
    }
    return PALSConfig(folder, **{**settings, **overrides})


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class OnStepEnd(TrainerCallback):
    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function()


class TestTraining:
    @pytest.mark.parametrize("loss", ["pals", "ce", "label_smoothing"])
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_trains_a_step_and_comes_back(self, architecture, loss, tmp_path):
        model = ARCHITECTURES[architecture]()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        trainer = PALSTrainer(model, config(tmp_path, loss=loss), train_dataset=Examples(size=(64, 64)))
        trainer.train()
        trainer.save_model()
        assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
        images = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(loaded(images).logits, model.eval()(images).logits, rtol=1e-5, atol=1e-6)
        assert not any(layer._forward_hooks for layer in trainer._tap.layers.values())

    @pytest.mark.parametrize("loss", ["pals", "ce", "label_smoothing"])
    def test_mean_is_over_the_pixels_of_the_whole_batch(self, loss, tmp_path):
        """4 x 1, 2 x 2 and 1 x 4 images with unevenly void masks: one gradient. Batch norm is frozen for it."""
        norms, losses = [], []
        for size in (4, 2, 1):
            torch.manual_seed(0)
            model = tiny_segformer(**NO_RANDOMNESS)
            args = config(
                tmp_path,
                loss=loss,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
                freeze_batch_norm=True,
            )
            trainer = PALSTrainer(model, args, train_dataset=Examples())
            trainer.train()
            norms += logged(trainer, "grad_norm")
            losses += logged(trainer, "loss")
        assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)

    def test_cross_entropy_is_the_models_own(self, any_model, tmp_path):
        any_model.eval()  # the same dropout and statistics on both sides
        trainer = PALSTrainer(any_model, config(tmp_path, loss="ce"))
        batch = collate([Examples(size=(64, 64))[index] for index in range(3)])
        torch.testing.assert_close(trainer.compute_loss(any_model, batch), any_model(**batch).loss)

    def test_all_void_batch(self, tmp_path):
        examples = Examples()
        examples.labels[:] = 255
        trainer = PALSTrainer(model := tiny_segformer(), config(tmp_path), train_dataset=examples)
        trainer.train()
        assert logged(trainer, "loss") == [0.0]
        assert logged(trainer, "grad_norm") == [0.0]
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    def test_logs_the_parts_of_the_loss(self, tmp_path):
        args = config(
            tmp_path, max_steps=4, logging_steps=2, per_device_train_batch_size=2, beta=0.4, adaptive_beta=False
        )
        args.gradient_accumulation_steps = 2
        trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples(8))
        trainer.train()
        lines = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [line["step"] for line in lines] == [2, 4]
        for line in lines:
            mixed = 0.6 * line["loss_one_hot"] + 0.4 * line["loss_aggregated"]
            assert line["loss"] == pytest.approx(mixed, rel=1e-5)
            assert 0 < line["q_entropy"] <= math.log(NUM_LABELS) + 1e-6

    def test_another_training_starts_from_nothing(self, tmp_path):
        """With its own time and log lines, and what the first one saved is not its own."""
        args = config(tmp_path, max_steps=2, logging_steps=9, save_strategy="steps", save_steps=2)
        trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples())
        steps = []
        trainer.add_callback(OnStepEnd(lambda: steps.append(trainer._loss_parts["steps"])))
        trainer.train()
        (tmp_path / "checkpoint-2").rename(tmp_path / "of the first")
        trainer._seconds = 1e6
        args.max_steps, args.save_steps = 4, 9
        trainer.add_callback(OnStepEnd(lambda: os.kill(os.getpid(), signal.SIGTERM)))
        trainer.train()
        assert steps == [1, 2, 1, 2]
        assert trainer.card_data().seconds < 1e6
        assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"

    def test_labels_outside_the_classes(self, tmp_path):
        examples = Examples()
        examples.labels[examples.labels == 255] = -100
        trainer = PALSTrainer(tiny_segformer(), config(tmp_path), train_dataset=examples)
        with pytest.raises(InputError, match=r"label -100 is not one of the classes 0 to 3, nor ignore_index=255"):
            trainer.train()
        PALSTrainer(tiny_segformer(), config(tmp_path, ignore_index=-100), train_dataset=examples).train()

    @pytest.mark.parametrize("length", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}])
    def test_no_step_is_an_error(self, length, tmp_path):
        """An untrained network is neither saved nor a result."""

        class Nothing(IterableDataset):
            def __iter__(self):
                return iter(())

        options = {**length, "save_strategy": "epoch"}
        few = {"train_dataset": Examples(3)}
        args = config(tmp_path, dataloader_drop_last=True, **options)
        with pytest.raises(InputError, match="dataloader_drop_last leaves no batch to train on: there are 3 training"):
            PALSTrainer(tiny_segformer(), args, **few).train()
        with pytest.raises(InputError, match="the training data set is empty"):
            PALSTrainer(tiny_segformer(), config(tmp_path, **options), train_dataset=Examples(0)).train()
        if "num_train_epochs" not in length:
            with pytest.raises(ValueError, match="does not contain any data"):
                PALSTrainer(tiny_segformer(), config(tmp_path, **options), train_dataset=Nothing()).train()
        args = config(tmp_path, **{**options, "warmup_steps": 1, "max_steps": 1})
        with pytest.raises(InputError, match="warmup_steps 1 leaves no step after the warmup"):
            PALSTrainer(tiny_segformer(), args, **few).train()
        assert not list(tmp_path.iterdir())

    def test_fewer_batches_than_accumulated_ones_make_a_step(self, tmp_path):
        args = config(tmp_path, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=9)
        trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples(3))
        trainer.train()
        assert trainer.state.global_step == 1

    def test_ruined_weights_are_an_error(self, tmp_path):
        args = config(tmp_path, learning_rate=1e38, head_lr_multiplier=1e38)
        with pytest.raises(TrainingError, match="the weights of the network are not finite after step 1"):
            PALSTrainer(tiny_segformer(), args, train_dataset=Examples()).train()

    def test_ruined_logits_are_no_result(self, tmp_path):
        trainer = PALSTrainer(tiny_segformer(), config(tmp_path), eval_dataset=Examples())
        trainer.model.decode_head.classifier.bias.data.fill_(math.nan)
        with pytest.raises(TrainingError, match="the logits of the network are not finite after step 0"):
            trainer.evaluate()

    def test_dry_run_shows_errors_before_training(self, tmp_path):
        model = tiny_mobilenet_v2()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        PALSTrainer(model, config(tmp_path), train_dataset=Examples(size=(64, 64))).dry_run()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        args = config(tmp_path, affinity={"source": "encoder", "encoder_stage": 99})
        with pytest.raises(InputError, match="encoder_stage 99"):
            PALSTrainer(model, args, train_dataset=Examples(size=(64, 64))).dry_run()

    def test_a_backbone_that_keeps_its_stages_to_itself(self, tmp_path):
        """Those of timm, in transformers."""
        pytest.importorskip("timm", reason="needs the extra `timm`")
        from transformers import TimmBackboneConfig

        backbone = TimmBackboneConfig(
            backbone="test_efficientnet", use_pretrained_backbone=False, out_indices=[1, 2, 3, 4]
        )
        network = tiny_upernet(backbone_config=backbone)
        trainer = PALSTrainer(network, config(tmp_path, affinity={"source": "encoder"}), train_dataset=Examples(2))
        with pytest.raises(InputError, match="does not return its hidden states"):
            trainer.dry_run()

    def test_padding_is_never_distilled(self, folder, tmp_path):
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID])
        dataset = TransformedDataset(data.train, TrainTransform(build_image_processor(None), (64, 64)))
        with pytest.raises(InputError, match="distill_unlabeled would learn from padding"):
            PALSTrainer(tiny_segformer(), config(tmp_path, distill_unlabeled=True), train_dataset=dataset)

    def test_distilled_unlabelled_pixels(self, tmp_path):
        """Their mean, too, is over the whole batch; padding is in no mean."""
        examples = Examples()
        examples.labels[:, :, :5] = PADDING_INDEX
        norms = []
        for size in (4, 1):
            torch.manual_seed(0)
            args = config(
                tmp_path,
                distill_unlabeled=True,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
                freeze_batch_norm=True,
            )
            trainer = PALSTrainer(tiny_segformer(**NO_RANDOMNESS), args, train_dataset=examples)
            trainer.train()
            norms += logged(trainer, "grad_norm")
            assert logged(trainer, "loss_unlabeled")[0] > 0
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)
        batch = collate([examples[index] for index in range(4)])
        counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        labels = batch["labels"]
        assert counts.tolist() == [(labels >= 0).sum() - (labels == 255).sum(), (labels == 255).sum()]

    def test_class_weights_are_of_the_whole_batch(self, folder, tmp_path):
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID]).train
        examples, norms = TransformedDataset(data, EvalTransform(build_image_processor(None))), []
        for size in (4, 1):
            args = config(
                tmp_path,
                loss="pals",
                class_weighting="inverse",
                per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
                freeze_batch_norm=True,
            )
            torch.manual_seed(0)
            trainer = PALSTrainer(tiny_segformer(**NO_RANDOMNESS), args, train_dataset=examples)
            trainer.train()
            norms += logged(trainer, "grad_norm")
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)
        expected = class_weights([row[:-1] for row in data["class_pixels"]], "inverse")
        assert trainer.loss_function.class_weights.tolist() == pytest.approx(expected)
        plain = PALSTrainer(tiny_segformer(), args, train_dataset=data.with_transform(lambda rows: 1 / 0))
        assert plain.loss_function.class_weights.tolist() == pytest.approx(expected)
        with pytest.raises(InputError, match="class_weighting needs a training set with a column class_pixels"):
            PALSTrainer(tiny_segformer(), args, train_dataset=Examples())

    def test_auxiliary_head_learns_with_its_weight(self, tmp_path):
        model = tiny_upernet(**AUXILIARY, auxiliary_in_channels=16, auxiliary_loss_weight=0.3)
        args = config(tmp_path, loss="pals", adaptive_beta=False)
        trainer = PALSTrainer(model, args, train_dataset=Examples(size=(64, 64)))
        before = model.auxiliary_head.classifier.weight.detach().clone()
        trainer.train()
        assert not torch.equal(model.auxiliary_head.classifier.weight, before)
        (loss,), (auxiliary,) = logged(trainer, "loss"), logged(trainer, "loss_auxiliary")
        (one_hot,), (aggregated,) = (logged(trainer, name) for name in ("loss_one_hot", "loss_aggregated"))
        assert loss == pytest.approx(0.5 * one_hot + 0.5 * aggregated + 0.3 * auxiliary, rel=1e-4)

    def test_cross_entropy_logs_no_q(self, tmp_path):
        trainer = PALSTrainer(tiny_segformer(), config(tmp_path, loss="ce"), train_dataset=Examples())
        trainer.train()
        assert logged(trainer, "loss") == pytest.approx(logged(trainer, "loss_one_hot"))
        assert not logged(trainer, "q_entropy")

    def test_head_learns_faster(self, any_model, tmp_path):
        trainer = PALSTrainer(any_model, config(tmp_path, learning_rate=1e-4, head_lr_multiplier=10.0))
        optimizer = trainer.create_optimizer()
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert len(rates) == len(list(any_model.parameters()))
        (layer,) = trainer._tap.layers.values()
        assert rates[id(layer.weight)] == pytest.approx(1e-3)
        assert rates[id(next(any_model.parameters()))] == pytest.approx(1e-4)
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decays[id(layer.weight)] == trainer.args.weight_decay
        assert decays[id(layer.bias)] == 0

    def test_channels_last_changes_nothing_but_memory(self, any_model, tmp_path):
        other = copy.deepcopy(any_model)
        losses = []
        for model, channels_last in ((any_model, False), (other, True)):
            torch.manual_seed(0)
            options = {"channels_last": channels_last, "freeze_batch_norm": True}
            trainer = PALSTrainer(model, config(tmp_path, **options), train_dataset=Examples(size=(64, 64)))
            trainer.train()
            losses += logged(trainer, "loss") + logged(trainer, "grad_norm")
            kernels = [p for p in trainer.model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
            assert all(k.is_contiguous(memory_format=torch.channels_last) is channels_last for k in kernels)
        assert losses[2:] == pytest.approx(losses[:2], rel=1e-3)

    def test_frozen_backbone(self, tmp_path):
        model = tiny_mobilenet_v2()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = PALSTrainer(model, config(tmp_path, freeze_backbone=True), train_dataset=Examples(size=(64, 64)))
        trainer.train()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed
        assert not [name for name in changed if name.startswith("mobilenet_v2.")]

    def test_frozen_batch_norm(self, tmp_path):
        model = tiny_mobilenet_v2()
        before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
        PALSTrainer(model, config(tmp_path, freeze_batch_norm=True), train_dataset=Examples(size=(64, 64))).train()
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())

    def test_model_init(self, tmp_path):
        """The network is made anew when training starts."""
        models = []
        trainer = PALSTrainer(
            args=config(tmp_path, freeze_backbone=True),
            model_init=lambda: models.append(tiny_segformer()) or models[-1],
            train_dataset=Examples(),
        )
        before = {name: value.clone() for name, value in models[-1].state_dict().items()}
        trainer.train()
        assert logged(trainer, "loss")[0] > 0
        assert trainer.model is models[-1] is not models[0]
        changed = {name for name, value in models[-1].state_dict().items() if not torch.equal(value, before[name])}
        assert changed
        assert not [name for name in changed if name.startswith("segformer.")]

    def test_gradient_checkpointing(self, tmp_path):
        losses = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            args = config(tmp_path, activation_checkpointing=checkpointing)
            trainer = PALSTrainer(tiny_segformer(**NO_RANDOMNESS), args, train_dataset=Examples())
            trainer.train()
            losses.append((logged(trainer, "loss"), logged(trainer, "grad_norm")))
        assert losses[0][0] == pytest.approx(losses[1][0])
        assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-4)

    def test_compiled(self, tmp_path):
        """The tap hears inside of a compiled network: a backend that generates no code shows it sooner."""
        values = []
        for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
            torch.manual_seed(0)
            args = config(tmp_path, max_steps=2, **compiled)
            trainer = PALSTrainer(tiny_segformer(**NO_RANDOMNESS), args, train_dataset=Examples())
            trainer.train()
            values.append(logged(trainer, "loss") + logged(trainer, "grad_norm"))
            assert bool(compiled) == isinstance(trainer.model_wrapped, OptimizedModule)
        assert values[1] == pytest.approx(values[0], rel=1e-4)

    def test_bf16(self, tmp_path):
        trainer = PALSTrainer(tiny_segformer(), config(tmp_path, bf16=True, use_cpu=True), train_dataset=Examples())
        trainer.train()
        assert 0 < logged(trainer, "loss")[0] < 10

    def test_every_epoch_has_its_own_crops(self, folder, tmp_path):
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID])
        epochs = []

        class Recording(TransformedDataset):
            def __getitem__(self, index):
                epochs.append(int(self._epoch))
                return super().__getitem__(index)

        dataset = Recording(data.train, TrainTransform(build_image_processor(None), (32, 32)))
        PALSTrainer(tiny_segformer(), config(tmp_path, max_steps=6), train_dataset=dataset).train()
        assert epochs == [0] * 8 + [1] * 8 + [2] * 8

    def test_images_of_different_sizes_in_a_training_batch(self, tmp_path):
        examples = [Examples(1, (32, 32))[0], Examples(1, (48, 32))[0]]
        trainer = PALSTrainer(tiny_segformer(), config(tmp_path), train_dataset=examples)
        with pytest.raises(InputError, match="differ in size"):
            trainer.train()

    @pytest.mark.parametrize("preset", ["default", "paper"])
    @pytest.mark.parametrize("build", [tiny_segformer, tiny_upernet])
    def test_loss_is_the_formula_with_the_classifiers_features(self, build, preset, tmp_path):
        """On a network that is sure of itself: at random initialisation q is uniform, whatever it is made of."""
        model = build().eval()
        tap = ClassifierTap(model)
        (classifier,) = tap.layers.values()
        with torch.no_grad():
            classifier.weight.mul_(200)
        batch = collate([Examples(size=(64, 64))[index] for index in range(3)])
        with torch.no_grad(), tap:
            model(pixel_values=batch["pixel_values"])
        features, logits, *_ = tap.read()
        values = PRESETS[preset]
        q = reference.aggregate(features, logits.double().softmax(dim=1), values["affinity"])
        assert (q - q.mean(dim=(2, 3), keepdim=True)).abs().max() > 1e-3  # there is something to tell apart
        expected = reference.soft_label_loss(
            logits, batch["labels"], q, values["beta"], adaptive=values["adaptive_beta"]
        )
        loss = PALSTrainer(model, config(tmp_path, preset=preset)).compute_loss(model, batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_self_distillation_compares_nothing(self, tmp_path):
        """Its q is the prediction itself: at the classifier's grid, as PALS with weight 0."""
        model, batch = tiny_segformer().eval(), collate([Examples()[index] for index in range(3)])
        trainer = PALSTrainer(model, config(tmp_path, loss="self_distillation"))
        loss = trainer.compute_loss(model, batch)
        with torch.no_grad(), (tap := ClassifierTap(model)):
            model(pixel_values=batch["pixel_values"])
        logits = tap.read().logits
        p = logits.double().softmax(dim=1)
        expected = reference.soft_label_loss(logits, batch["labels"], p, trainer.args.beta, adaptive=True)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
    def test_every_schedule_runs(self, schedule, tmp_path):
        args = config(tmp_path, lr_scheduler_type=schedule, max_steps=2)
        trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples())
        trainer.train()
        assert len(logged(trainer, "learning_rate")) == 2

    def test_norms_and_biases_do_not_decay(self, any_model, tmp_path):
        trainer = PALSTrainer(any_model, config(tmp_path))
        decayed = set(trainer.get_decay_parameter_names(any_model))
        shapes = {name: parameter.ndim for name, parameter in any_model.named_parameters()}
        assert decayed
        assert not [name for name in decayed if shapes[name] < 2]
        assert not [name for name, ndim in shapes.items() if ndim == 4 and name not in decayed]


class TestEvaluation:
    @pytest.fixture
    def data(self, folder):
        return load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID])

    @pytest.mark.parametrize("batch_size", [1, 2])
    @pytest.mark.parametrize("image_size", [None, (32, 32)])
    def test_scores_each_image_at_its_own_size(self, data, image_size, batch_size, tmp_path):
        """Against a loop over single images. Without image_size the images differ in size too."""
        model, processor = tiny_segformer(id2label=data.id2label).eval(), build_image_processor(None, image_size)
        metrics, total, pixels = SegmentationMetrics(NUM_LABELS), 0.0, 0
        for example in data.validation:
            inputs = EvalTransform(processor)(example["image"], example["labels"])
            with torch.no_grad():
                logits = upsample(model(inputs["pixel_values"][None]).logits, inputs["labels"].shape)
            metrics.update(logits.argmax(dim=1)[0], inputs["labels"])
            total += F.cross_entropy(logits, inputs["labels"][None], ignore_index=255, reduction="sum").item()
            pixels += int((inputs["labels"] != 255).sum())

        args = config(tmp_path, per_device_eval_batch_size=batch_size)
        trainer = PALSTrainer(model, args, eval_dataset=TransformedDataset(data.validation, EvalTransform(processor)))
        for _ in range(2):  # the second time must start from nothing
            results = trainer.evaluate()
            for name, value in metrics.compute().items():
                assert results[f"eval_{name}"] == pytest.approx(value, abs=1e-3, nan_ok=True)
            assert results["eval_loss"] == pytest.approx(total / pixels, rel=1e-5)
        assert torch.equal(trainer.metrics.counts.sum(), metrics.counts.sum())

    def test_gathers_one_count_matrix_per_image(self, data, tmp_path):
        trainer = PALSTrainer(model := tiny_segformer(), config(tmp_path))
        dataset = TransformedDataset(data.validation, EvalTransform(build_image_processor(None)))
        loss, counts, losses = trainer.prediction_step(model, collate([dataset[0], dataset[1]]), False)
        assert loss is None
        assert counts.shape == (2, NUM_LABELS, NUM_LABELS)
        assert losses.shape == (2,)
        assert counts.sum(dim=(1, 2)).tolist() == [int((dataset[i]["labels"] != 255).sum()) for i in range(2)]

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_pipeline_masks_are_the_predictions_of_evaluation(self, data, architecture, tmp_path):
        processor = build_image_processor(None, (64, 64))
        trainer = PALSTrainer(
            model := ARCHITECTURES[architecture](id2label=data.id2label),
            config(tmp_path, max_steps=2),
            train_dataset=TransformedDataset(data.train, TrainTransform(processor, (64, 64))),
            eval_dataset=TransformedDataset(data.validation, EvalTransform(processor)),
            processing_class=processor,
        )
        trainer.train()
        trainer.save_model()
        results = trainer.evaluate()
        segment = pipeline("image-segmentation", model=str(tmp_path))
        metrics, label2id = SegmentationMetrics(NUM_LABELS), {name: label for label, name in data.id2label.items()}
        for example in data.validation:
            mask = torch.full((example["image"].height, example["image"].width), -1)
            for segment_of_class in segment(example["image"]):
                mask[torch.from_numpy(np.array(segment_of_class["mask"])) > 0] = label2id[segment_of_class["label"]]
            assert torch.equal(mask, predict(model, processor, [example["image"]])[0].mask)
            metrics.update(mask, torch.from_numpy(np.array(example["labels"])))
        assert torch.equal(metrics.counts, trainer.metrics.counts)
        assert metrics.compute()["mean_iou"] == results["eval_mean_iou"]

    def test_undefined_values_are_null_in_every_file(self, tmp_path):
        examples = Examples()
        examples.labels[examples.labels == 2] = 255
        examples.labels[examples.labels == 3] = 255
        model = tiny_segformer()
        with torch.no_grad():
            model.decode_head.classifier.bias.copy_(torch.tensor([1e3, 0, 0, 0]))
        trainer = PALSTrainer(
            model, config(tmp_path, eval_strategy="steps", save_strategy="steps"), eval_dataset=examples
        )
        metrics = trainer.evaluate()
        assert math.isnan(metrics["eval_per_category_iou"][2])
        trainer.save_metrics("eval", metrics)
        trainer.save_state()
        for name in ("eval_results.json", "trainer_state.json"):
            json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
        saved = json.loads((tmp_path / "eval_results.json").read_text())
        assert saved["eval_per_category_iou"][2] is None

    def test_nothing_to_score(self, tmp_path):
        examples = Examples()
        examples.labels[:] = 255
        args = config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
        trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples(), eval_dataset=examples)
        trainer.train()
        assert logged(trainer, "eval_mean_iou") == [None, None]

    def test_best_checkpoint_and_early_stopping(self, tmp_path):
        args = config(
            tmp_path,
            max_steps=30,
            learning_rate=0.5,  # ruins the network at once
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=1,
            save_steps=1,
            load_best_model_at_end=True,
        )
        trainer = PALSTrainer(
            tiny_segformer(**NO_RANDOMNESS),
            args,
            train_dataset=Examples(),
            eval_dataset=Examples(),
            callbacks=[EarlyStoppingCallback(2, early_stopping_threshold=0.5)],
        )
        trainer.train()
        assert trainer.state.global_step == 3
        assert trainer.state.best_metric == pytest.approx(max(logged(trainer, "eval_mean_iou")))
        best = AutoModelForSemanticSegmentation.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
        assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())

    def test_several_evaluation_sets(self, tmp_path):
        trainer = PALSTrainer(tiny_segformer(), config(tmp_path), eval_dataset={"a": Examples(1), "b": Examples(4)})
        results = trainer.evaluate()
        assert {"eval_a_mean_iou", "eval_b_mean_iou", "eval_a_loss", "eval_b_loss"} <= results.keys()
        assert trainer.metrics.counts.sum() == (Examples(4).labels != 255).sum()

    def test_several_evaluation_sets_while_training(self, tmp_path):
        """Of which one must be named to find the best checkpoint."""
        sets = {"a": Examples(1), "b": Examples(4)}
        args = config(tmp_path, eval_strategy="steps", eval_steps=1)
        with pytest.raises(InputError, match="must name an evaluation set, like a_mean_iou, or be None, got mean_iou"):
            PALSTrainer(tiny_segformer(), args, train_dataset=Examples(), eval_dataset=sets)
        args.metric_for_best_model = "b_mean_iou"
        trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples(), eval_dataset=sets)
        trainer.train()
        assert trainer.state.best_metric == logged(trainer, "eval_b_mean_iou")[0]

    def test_on_a_training_set_with_padding(self, tmp_path):
        """What a crop adds around an image is not scored."""
        padded, void = Examples(), Examples()
        padded.labels[:, :, 40:], void.labels[:, :, 40:] = PADDING_INDEX, 255
        trainer = PALSTrainer(tiny_segformer(), config(tmp_path, eval_calibration=True))
        scores = [trainer.evaluate(examples) for examples in (padded, void)]
        for name in ("eval_mean_iou", "eval_loss", "eval_ece"):
            assert scores[0][name] == scores[1][name]

    def test_needs_labels(self, tmp_path):
        trainer = PALSTrainer(model := tiny_segformer(), config(tmp_path))
        with pytest.raises(InputError, match="evaluation needs labels"):
            trainer.prediction_step(model, {"pixel_values": torch.randn(1, 3, 32, 32)}, False)


class Search:
    """Stands in for a package that tries arguments: `trials` are theirs."""

    ensure_available = default_hp_space = staticmethod(lambda *_: None)

    def run(self, trainer, trials, direction, **options):
        seen = []
        for number, params in enumerate(trials):
            trainer.train(trial=SimpleNamespace(number=number, params=params))
            seen.append(self.look(trainer))
        return direction, trainer.compute_objective, options or seen

    def look(self, trainer):
        """What a training was made with."""
        backbone, (layer,) = trainer.model.segformer, trainer._tap.layers.values()
        assert layer is trainer.model.decode_head.classifier
        kernel = next(p for p in backbone.parameters() if p.ndim == 4 and min(p.shape) > 1)
        return {
            "freeze_backbone": not any(parameter.requires_grad for parameter in backbone.parameters()),
            "channels_last": kernel.is_contiguous(memory_format=torch.channels_last),
            "beta": trainer.loss_function.beta,
            "class_weighting": "none" if trainer.loss_function.class_weights is None else "inverse",
        }


class TestSearch:
    @pytest.fixture(autouse=True)
    def _backend(self, monkeypatch):
        for backend in HPSearchBackend:
            monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, backend, Search)
        monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)

    def search(self, tmp_path, dataset, trials, backend="optuna", **options):
        trainer = PALSTrainer(model_init=lambda: tiny_segformer(), args=config(tmp_path), train_dataset=dataset)
        return trainer.hyperparameter_search(lambda trial: trial.params, n_trials=trials, backend=backend, **options)

    @pytest.mark.parametrize(
        ("trial", "message"),
        [({"beta": 3.0}, "beta must lie in"), ({"preset": "paper"}, "a search cannot set preset")],
    )
    def test_refuses_a_trial(self, trial, message, tmp_path):
        with pytest.raises(InputError, match=message):
            self.search(tmp_path, Examples(), [trial])

    def test_a_trial_has_its_own_arguments(self, folder, tmp_path):
        """Not those of the one before."""
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID]).train
        examples = TransformedDataset(data, EvalTransform(build_image_processor(None)))
        one = {"freeze_backbone": True, "channels_last": True, "beta": 0.25, "class_weighting": "inverse"}
        other = {"freeze_backbone": False, "channels_last": False, "beta": 0.75, "class_weighting": "none"}
        trials = [one, other, one]
        assert self.search(tmp_path, examples, trials)[2] == trials

    def test_is_for_the_mean_iou_unless_told(self, tmp_path):
        metrics = PALSTrainer(tiny_segformer(), config(tmp_path), eval_dataset=Examples()).evaluate()
        direction, objective, _ = self.search(tmp_path, None, [])
        assert direction == "maximize"
        assert objective(metrics) == metrics["eval_mean_iou"]
        direction, objective, _ = self.search(tmp_path, None, [], compute_objective=lambda m: m["eval_loss"])
        assert direction == "minimize"
        assert objective(metrics) == metrics["eval_loss"]
        assert self.search(tmp_path, None, [], direction=["maximize"])[0] == ["maximize"]
        assert self.search(tmp_path, None, [], backend="wandb")[2] == {"metric": "eval/mean_iou"}


class TestRefuses:
    def test_a_model_that_predicts_masks(self, tmp_path):
        sizes = {"hidden_dim": 32, "encoder_feedforward_dim": 16, "dim_feedforward": 16, "num_attention_heads": 2}
        settings = {**sizes, "encoder_layers": 1, "decoder_layers": 2, "feature_size": 32, "mask_feature_size": 32}
        settings["backbone_config"] = {
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1] * 4,
        }
        settings["backbone_config"]["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
        model = Mask2FormerModel(Mask2FormerConfig(**settings))
        with pytest.raises(InputError, match="'mask2former' models"):
            PALSTrainer(model, config(tmp_path))

    def test_one_class(self, tmp_path):
        with pytest.raises(InputError, match="num_labels=1"):
            PALSTrainer(tiny_segformer(num_labels=1), config(tmp_path))

    def test_plain_training_arguments(self, tmp_path):
        with pytest.raises(InputError, match="needs a PALSConfig, got TrainingArguments"):
            PALSTrainer(tiny_segformer(), TrainingArguments(tmp_path))

    @pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func"])
    def test_functions_it_has_itself(self, name, tmp_path):
        with pytest.raises(InputError, match=name):
            PALSTrainer(tiny_segformer(), config(tmp_path), **{name: print})


def test_no_token_in_any_saved_file(tmp_path):
    args = config(tmp_path, hub_token="hf_secret", save_strategy="steps", save_steps=1, push_to_hub=False)
    trainer = PALSTrainer(tiny_segformer(), args, train_dataset=Examples())
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "training_args.bin" in {path.name for path in files}
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]


class TestComputeLossFunc:
    """The adapter for a plain Trainer."""

    def train(self, tmp_path, size, examples, ignore_index):
        torch.manual_seed(0)
        model = tiny_segformer(**NO_RANDOMNESS)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
                module.track_running_stats = False
        args = TrainingArguments(
            tmp_path,
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=len(examples) // size,
            remove_unused_columns=False,
            disable_tqdm=True,
            save_strategy="no",
            max_grad_norm=1e9,
            dataloader_pin_memory=False,
        )
        loss = PALSLoss(ignore_index=ignore_index)
        trainer = Trainer(
            model,
            args,
            train_dataset=examples,
            data_collator=collate,
            compute_loss_func=compute_loss_func(loss, model),
        )
        trainer.train()
        return logged(trainer, "loss")[0]

    def test_one_batch_is_exact_with_any_ignore_index(self, tmp_path):
        value = self.train(tmp_path, 4, Examples(), 255)
        torch.manual_seed(0)
        model = tiny_segformer(**NO_RANDOMNESS)
        trainer = PALSTrainer(model, config(tmp_path))
        batch = collate([Examples()[index] for index in range(4)])
        expected = trainer.compute_loss(model.train(), batch)
        assert value == pytest.approx(expected.item(), rel=1e-5)

    def test_accumulation_is_exact_with_trainers_own_void(self, tmp_path):
        """One image fills every micro-batch, so that batch statistics are the same: only the pixel counts differ."""
        examples = Examples(1)
        images, labels = examples.images.repeat(4, 1, 1, 1), Examples(4).labels
        labels[labels == 255] = -100
        examples.images, examples.labels = images, labels
        values = [self.train(tmp_path, size, examples, -100) for size in (4, 1)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_compute_loss_func_with_an_auxiliary_head():
    model = tiny_upernet(**AUXILIARY, auxiliary_in_channels=16).eval()
    compute_loss_func(CrossEntropyLoss(), model)
    compute = compute_loss_func(CrossEntropyLoss(), model)  # as when a notebook cell runs twice
    inputs = collate([Examples(size=(64, 64))[index] for index in range(2)])
    loss = compute(model(inputs["pixel_values"]), inputs["labels"])
    torch.testing.assert_close(loss, model(**inputs).loss)


@pytest.mark.parametrize("source", ["logits", "before_dropout"])
def test_compute_loss_func_compares_the_features_of_the_affinity(source, tmp_path):
    """As the trainer does. The dropout of the classifier is not active in evaluation mode."""
    model, batch = tiny_segformer().eval(), collate([Examples()[index] for index in range(2)])
    compute = compute_loss_func(PALSLoss(affinity=Affinity(source=source)), model)
    value = compute(model(batch["pixel_values"]), batch["labels"])
    trainer = PALSTrainer(model, config(tmp_path, affinity={"source": source}))
    torch.testing.assert_close(value, trainer.compute_loss(model, batch))
    with pytest.raises(InputError, match="cannot read hidden states"):
        compute_loss_func(PALSLoss(affinity=Affinity(source="encoder")), model)


def test_compute_loss_func_with_distillation():
    model, loss = tiny_segformer().eval(), PALSLoss(distill_unlabeled=True)
    inputs = collate([Examples()[index] for index in range(3)])
    labels = inputs["labels"]
    labels[:, :, :4] = PADDING_INDEX
    compute = compute_loss_func(loss, model)
    outputs = model(inputs["pixel_values"])
    value = compute(outputs, labels, num_items_in_batch=torch.tensor(labels.numel()))
    model(inputs["pixel_values"])
    torch.testing.assert_close(value, compute(outputs, labels))


class TestCheckpoints:
    def test_a_damaged_checkpoint_and_one_of_another_model(self, tmp_path):
        def trainer(**settings):
            args = config(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
            return PALSTrainer(tiny_segformer(**settings), args, train_dataset=Examples())

        trainer().train()
        checkpoint = last_complete_checkpoint(tmp_path)
        with pytest.raises(InputError, match=f"checkpoint {checkpoint} cannot be loaded: "):
            trainer(decoder_hidden_size=32).train(resume_from_checkpoint=str(checkpoint))
        weights = checkpoint / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(InputError, match=f"checkpoint {checkpoint} cannot be loaded: "):
            trainer().train(resume_from_checkpoint=str(checkpoint))
