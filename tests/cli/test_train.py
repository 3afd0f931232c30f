"""The program, as users start it: on real files, through the real launcher, on one process and on two."""

import contextlib
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import data_sets
import numpy as np
import pytest
import torch
import yaml
from architectures import bare_backbone
from conftest import RAW_VOID, tiny_mobilenet_v2, tiny_segformer
from launching import call, launch
from PIL import Image
from test_checkpoints import files_of_at_most
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForSemanticSegmentation, pipeline

from pals_hf import PALSConfig, SegmentationMetrics, load_segmentation_dataset
from pals_hf.cli import train
from pals_hf.cli.arguments import TrainArguments
from pals_hf.cli.ending import fail
from pals_hf.data import FractionManifest, draw_ids
from pals_hf.errors import InputError
from pals_hf.models import build_model

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "run_seg_pals.py"
RECORDER = Path(__file__).parent / "record_ranks.py"

SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--disable_tqdm", "True"]


def on_folder(folder, output, *arguments):
    return ["--dataset_dir", str(folder), "--void_labels", str(RAW_VOID), "--output_dir", str(output), *arguments]


def read(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`accelerate launch examples/run_seg_pals.py --train_fraction 0.5`, cut to two steps."""
    folder = tmp_path_factory.mktemp("somewhere")
    printed = launch(SCRIPT, "--train_fraction", "0.5", *SHORT, cwd=folder)
    (output,) = (folder / "runs").iterdir()
    return output, printed


class TestBuiltIn:
    def test_ends_in_a_table(self, run):
        output, printed = run
        assert "100 training images, 50 validation images" in printed
        for name in ("sky", "pole", "mean", "all pixels"):
            assert f"\n{name} " in printed
        assert printed.rstrip().endswith(f"runs/{output.name}")

    def test_writes_everything(self, run):
        output, _ = run
        for name in (
            "model.safetensors",
            "config.json",
            "preprocessor_config.json",
            "eval_results.json",
            "train_results.json",
            "train_fraction.json",
            "trainer_state.json",
            "predictions.png",
        ):
            assert (output / name).stat().st_size > 0, name
        results = read(output / "eval_results.json")
        assert len(results["eval_per_category_iou"]) == 8
        for name in ("eval_mean_iou", "eval_mean_accuracy", "eval_overall_accuracy"):
            assert 0 <= results[name] <= 1
        assert Image.open(output / "predictions.png").width > 500

    def test_manifest(self, run):
        manifest = read(run[0] / "train_fraction.json")
        assert (manifest["fraction"], manifest["seed"], len(manifest["ids"])) == (0.5, 0, 100)

    def test_pipeline_gives_the_evaluated_figures(self, run):
        output, _ = run
        data = load_segmentation_dataset()
        model = AutoModelForSemanticSegmentation.from_pretrained(output)
        assert model.config.id2label == data.id2label
        segment, metrics = pipeline("image-segmentation", model=str(output)), SegmentationMetrics(len(data.id2label))
        for example in data.validation:
            mask = torch.full((example["image"].height, example["image"].width), -1)
            for found in segment(example["image"]):
                mask[torch.from_numpy(np.array(found["mask"])) > 0] = {v: k for k, v in data.id2label.items()}[
                    found["label"]
                ]
            metrics.update(mask, torch.from_numpy(np.array(example["labels"])))
        results = metrics.compute()
        for name, value in read(output / "eval_results.json").items():
            if name.removeprefix("eval_") in results:
                expected = [None if np.isnan(v) else v for v in np.atleast_1d(results[name.removeprefix("eval_")])]
                assert np.atleast_1d(value).tolist() == expected


class TestFolder:
    def test_trains_on_a_fraction_and_resumes(self, folder, tmp_path):
        output = tmp_path / "run"
        arguments = on_folder(folder, output, "--train_fraction", "0.5", "--crop_size", "32", "32", *SHORT)
        train.main([*arguments, "--save_steps", "1", "--loss", "ce", "--image_size", "32", "48"])
        ids = read(output / "train_fraction.json")["ids"]
        assert ids == draw_ids([f"street {index}" for index in range(8)], 0.5)
        assert read(output / "trainer_state.json")["global_step"] == 2
        # A crash while writing leaves a folder without its last file.
        (output / "checkpoint-2" / "trainer_state.json").unlink()
        more = ["--resume_from_checkpoint", "last", "--max_steps", "3", "--image_size", "32", "48", "--loss", "ce"]
        train.main([*arguments, *more])
        history = read(output / "trainer_state.json")
        assert history["global_step"] == 3
        assert read(output / "eval_results.json")["epoch"] == 1.5

    def test_resume_refuses_other_images_and_other_runs(self, folder, tmp_path, capsys):
        output, other = tmp_path / "run", tmp_path / "other"
        train.main(on_folder(folder, output, "--train_fraction", "0.5", "--save_steps", "1", *SHORT))
        (other / "checkpoint-7").mkdir(parents=True)
        checkpoint = str(output / "checkpoint-2")
        for folder_of_run, fraction, message in (
            (output, "1.0", "was trained on other images"),
            (tmp_path / "new", "1.0", "was trained on other images"),
            (other, "0.5", "already holds a run"),
        ):
            options = ["--train_fraction", fraction, "--resume_from_checkpoint", checkpoint]
            with pytest.raises(SystemExit):
                train.main(on_folder(folder, folder_of_run, *options, *SHORT))
            assert message in capsys.readouterr().err
        assert [path.name for path in other.iterdir()] == ["checkpoint-7"]

    def test_resume_refuses_another_loss(self, folder, tmp_path, capsys):
        start = on_folder(folder, tmp_path / "run", "--beta", "0.3", "--adaptive_beta", "False", *SHORT)
        train.main([*start, "--save_steps", "1"])
        on = ["--max_steps", "3", "--resume_from_checkpoint", "last"]
        for loss, flags in (("pals", "--beta 0.3 --adaptive_beta False,"), ("ce", "--loss pals --beta 0.3 ")):
            with pytest.raises(SystemExit):
                train.main(on_folder(folder, tmp_path / "run", "--loss", loss, *SHORT, *on))
            message = capsys.readouterr().err
            assert f"checkpoint-2 was trained with another loss. Resume it with {flags}" in message
        train.main([*start, *on])
        assert read(tmp_path / "run" / "trainer_state.json")["global_step"] == 3

    def test_going_back_needs_a_word(self, folder, tmp_path, capsys):
        """Else `last` would one day mean a checkpoint of the history that was given up."""
        output = tmp_path / "run"
        start = on_folder(folder, output, *SHORT, "--save_steps", "1")
        train.main(start)
        back = [*start, "--resume_from_checkpoint", str(output / "checkpoint-1")]
        with pytest.raises(SystemExit):
            train.main(back)
        assert "holds checkpoint-2, but the run would resume from checkpoint-1" in capsys.readouterr().err
        train.main([*back, "--overwrite", "--save_strategy", "no"])
        assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]

    def test_overwrite_replaces_a_run_and_spares_other_files(self, folder, tmp_path):
        output = tmp_path / "run"
        (output / "checkpoint-7").mkdir(parents=True)
        (output / "notes.txt").write_text("mine")
        (output / "reliability.png").write_bytes(b"of the old run")
        train.main(on_folder(folder, output, "--overwrite", "--save_strategy", "no", *SHORT))
        assert not (output / "checkpoint-7").exists()
        assert (output / "notes.txt").read_text() == "mine"
        assert not (output / "reliability.png").exists()
        assert (output / "model.safetensors").exists()

    def test_manifest_of_another_run(self, folder, tmp_path):
        manifest = tmp_path / "published.json"
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID])
        FractionManifest.draw(data.train, 0.3, seed=9, name="another run").save(manifest)
        output = tmp_path / "run"
        train.main(on_folder(folder, output, "--train_manifest", str(manifest), *SHORT))
        assert read(output / "train_fraction.json") == read(manifest)

    def test_manifest_of_other_data(self, folder, tmp_path, capsys):
        """Images of the same names do not do: what a run notes is what it was trained on."""
        flags = on_folder(folder, tmp_path / "run", "--train_manifest", str(tmp_path / "published.json"), *SHORT)
        data = load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID])
        FractionManifest.draw(data.train, 0.3, name="of before").save(tmp_path / "published.json")
        shutil.copy(folder / "train" / "masks" / "street 0.png", folder / "train" / "masks" / "street 1.png")
        with pytest.raises(SystemExit):
            train.main(flags)
        assert "published.json was drawn from other images (8 images of of before)" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_goes_on_where_the_data_lies_in_a_folder_of_another_name(self, folder, tmp_path):
        train.main(on_folder(folder, tmp_path / "run", "--train_fraction", "0.5", "--save_steps", "1", *SHORT))
        moved = folder.rename(folder.with_name("moved"))
        start = on_folder(moved, tmp_path / "run", "--train_fraction", "0.5", "--save_steps", "1", *SHORT)
        train.main([*start, "--max_steps", "3", "--resume_from_checkpoint", "last"])
        assert read(tmp_path / "run" / "trainer_state.json")["global_step"] == 3

    def test_a_stream_without_its_bad_samples(self, folder, tmp_path):
        """Also where pictures of the predictions are drawn."""
        first = min((folder / "val" / "images").iterdir())
        first.write_bytes(b"")
        flags = ["--streaming", "--skip_bad_samples", "--crop_size", "32", "32", *SHORT]
        train.main(on_folder(folder, tmp_path / "run", *flags))
        assert (tmp_path / "run" / "predictions.png").exists()
        assert read(tmp_path / "run" / "model_card.json")["settings"]["skip_bad_samples"] is True

    def test_published_list(self, folder, tmp_path):
        published, output = tmp_path / "labeled.txt", tmp_path / "run"
        published.write_text("images/street 4.jpg\nimages/street 1.jpg\n")
        train.main(on_folder(folder, output, "--train_manifest", str(published), *SHORT))
        manifest = read(output / "train_fraction.json")
        assert (manifest["method"], manifest["ids"]) == ("list", ["street 4", "street 1"])
        assert manifest["class_pixels"]["void"] == 2 * 48

    def test_balanced_count_with_help_for_rare_classes(self, folder, tmp_path):
        output = tmp_path / "run"
        options = ["--train_count", "3", "--fraction_method", "balanced", "--class_weighting", "median_frequency"]
        options += ["--rare_crop", "0.5", "--copy_paste", "0.5", "--image_size", "48", "72", "--crop_size", "32", "32"]
        options += ["--cache_images", "--eval_window", "32", "32", "--preprocessing_num_workers", "2"]
        train.main(on_folder(folder, output, *options, *SHORT, "--logging_steps", "1"))
        manifest = read(output / "train_fraction.json")
        assert (manifest["method"], len(manifest["ids"])) == ("balanced", 3)
        assert read(output / "trainer_state.json")["log_history"][0]["loss"] > 0

    def test_folds(self, folder, tmp_path):
        train.main(on_folder(folder, tmp_path / "run", "--num_folds", "4", "--fold", "1", *SHORT))
        assert read(tmp_path / "run" / "train_fraction.json")["available"] in (9, 10)

    def test_bad_samples_are_left_out_and_listed(self, folder, tmp_path, capsys):
        (folder / "train" / "images" / "street 5.jpg").write_bytes(b"")
        train.main(on_folder(folder, tmp_path / "run", "--skip_bad_samples", *SHORT))
        printed = capsys.readouterr()
        assert "skipped train/street 5: " in printed.err
        assert "7 training images, 5 validation images, 1 skipped" in printed.out
        assert read(tmp_path / "run" / "skipped_samples.json").keys() == {"train/street 5"}

    @pytest.mark.parametrize("suffix", ["yaml", "json"])
    def test_recipe_and_command_line(self, folder, tmp_path, suffix):
        recipe = tmp_path / f"recipe.{suffix}"
        settings = {"loss": "label_smoothing", "learning_rate": 1e-3, "image_size": [32, 48], "max_steps": 9}
        settings |= {"void_labels": 7, "overwrite": True, "recipe": None}
        lines = yaml.safe_dump(settings).replace("0.001", "1e-3")
        recipe.write_text(json.dumps(settings) if suffix == "json" else lines)
        arguments = ["--recipe", str(recipe), "--output_dir", str(tmp_path / "run"), *SHORT]
        args, config = train.parse_arguments(arguments, TrainArguments)
        assert (config.loss, config.learning_rate, args.image_size) == ("label_smoothing", 1e-3, [32, 48])
        assert (args.void_labels, args.overwrite) == ([7], True)
        assert config.max_steps == 2  # the command line wins

    def test_random_weights_learn_at_a_rate_of_their_own(self, folder, tmp_path):
        def rate(*flags):
            return train.parse_arguments(on_folder(folder, tmp_path, *flags), TrainArguments)[1].learning_rate

        model = ["--model_name_or_path", "some/model"]
        assert rate() == rate(*model, "--from_scratch") == 2e-3
        assert rate(*model) == 2e-4
        assert rate("--learning_rate", "1e-4") == 1e-4
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("learning_rate: 3e-4")
        assert rate("--recip", str(recipe)) == 3e-4

    def test_config_fields_are_flags(self, folder, tmp_path):
        arguments = on_folder(folder, tmp_path, "--preset", "paper", "--freeze_batch_norm", "True")
        arguments += ["--affinity", '{"tau": 0.2}', "--lr_scheduler_kwargs", '{"power": 2.0}']
        config = train.parse_arguments(arguments, TrainArguments)[1]
        assert (config.beta, config.affinity_settings.tau, config.freeze_batch_norm) == (0.5, 0.2, True)
        assert config.lr_scheduler_kwargs == {"power": 2.0}
        assert config.ignore_index == 255

    def test_unlabelled_pixels_are_distilled_and_padding_is_not(self, folder, tmp_path):
        options = ["--distill_unlabeled", "True", "--crop_size", "64", "64", "--logging_steps", "1"]
        train.main(on_folder(folder, tmp_path / "run", *options, *SHORT))
        (first, *_) = read(tmp_path / "run" / "trainer_state.json")["log_history"]
        assert first["loss_unlabeled"] > 0


class TestHelp:
    def show(self, *flags):
        out = io.StringIO()
        with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(out):
            train.main(list(flags))
        assert not stop.value.code
        return out.getvalue()

    def test_shows_our_options_on_two_screens(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        text = self.show("--help")
        assert len(text.splitlines()) <= 100
        for flag in ("--dataset_dir", "--train_fraction", "--loss", "--learning_rate", "--output_dir"):
            assert f"  {flag} " in text
        for flag in ("--ignore_index", "--dataloader_num_workers", "--num_folds", "--label_clicks"):
            assert flag not in text

    def test_help_all_shows_every_flag(self):
        text = self.show("--help_all")
        for flag in ("--dataset_dir", "--num_folds", "--distill_unlabeled", "--dataloader_num_workers"):
            assert f"  {flag}" in text
        assert "--ignore_index" not in text

    def test_every_option_has_a_sentence_of_its_own(self):
        for option in (*dataclasses.fields(TrainArguments), *dataclasses.fields(PALSConfig)):
            text = option.metadata["help"]
            assert text[0].isupper() or text[0] == "`", option.name
            if "group" in option.metadata:
                assert text.endswith("."), option.name


class TestRecipes:
    """The recipes of the paper's two data sets, cut to one step of tiny networks on fixtures in their layout."""

    @pytest.fixture(scope="class")
    def checkpoints(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("checkpoints")
        for name, network in {"segformer": tiny_segformer(), "deeplab": tiny_mobilenet_v2()}.items():
            network.save_pretrained(folder / name)
        bare_backbone("dinov2", folder / "dinov2")
        return folder

    @pytest.mark.parametrize("loss", ["ce", "pals"])
    @pytest.mark.parametrize("network", ["segformer", "deeplab", pytest.param("dinov2", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("name", ["cityscapes", "voc2012"])
    def test_trains_and_scores(self, name, network, loss, checkpoints, tmp_path):
        getattr(data_sets, name)(tmp_path / "data")
        recipe = ROOT / "examples" / "recipes" / f"{name}_{network}.yaml"
        small = ["--crop_size", "32", "32", "--per_device_train_batch_size", "2", "--dataloader_num_workers", "0"]
        small += ["--max_steps", "1", "--warmup_steps", "0", "--eval_window", "32", "32", "--bf16", "False"]
        model = ["--model_name_or_path", str(checkpoints / network), "--loss", loss]
        small += ["--image_size", "32", "64"] if network == "dinov2" else []
        output = tmp_path / "run"
        command = ["--recipe", recipe, "--dataset_dir", tmp_path / "data", "--train_fraction", "0.5", *model, *small]
        train.main([*map(str, command), "--output_dir", str(output), "--disable_tqdm", "True"])
        classes = {"cityscapes": 19, "voc2012": 21}[name]
        assert len(read(output / "eval_results.json")["eval_per_category_iou"]) == classes
        if network == "deeplab":
            assert read(output / "config.json")["output_stride"] == 8

    @pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml"))])
    def test_is_what_it_says(self, name):
        path = ROOT / "examples" / "recipes" / name
        args, config = train.parse_arguments(["--recipe", str(path), "--bf16", "False"], TrainArguments)
        assert args.crop_size == config.eval_window
        assert config.lr_scheduler_kwargs["lr_end"] == 0
        assert f"--recipe examples/recipes/{path.name}" in path.read_text()


class TestBackbones:
    """A bare backbone of patches of 8x8 pixels, by its name alone."""

    @pytest.fixture
    def bare(self, tmp_path):
        bare_backbone("dinov2", tmp_path / "bare")
        return ["--model_name_or_path", str(tmp_path / "bare")]

    def test_with_a_linear_head_and_adapters(self, bare, folder, tmp_path, capsys):
        pytest.importorskip("peft", reason="needs the extra `lora`")
        output = tmp_path / "run"
        flags = ["--head", "linear", "--lora_rank", "2", "--image_size", "30", "50", "--crop_size", "33", "32"]
        train.main(on_folder(folder, output, *bare, *flags, *SHORT))
        said = capsys.readouterr().err
        assert "note: image_size 32 48, not 30 50: the network needs multiples of its patch size, 8 pixels" in said
        assert "note: crop_size 32 32, not 33 32" in said
        assert "note: learning_rate 0.0005 and head_lr_multiplier 1, from peft's example" in said
        assert read(output / "preprocessor_config.json")["size"] == {"height": 32, "width": 48}
        network, info = AutoModelForSemanticSegmentation.from_pretrained(output, output_loading_info=True)
        assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
        assert network.decode_head.in_channels == [16]
        card = read(output / "model_card.json")["settings"]
        assert (card["head"], card["lora_rank"]) == ("linear", 2)

    def test_images_of_several_sizes(self, bare, folder, tmp_path, capsys):
        for path in (folder / "val").rglob("alley-0.*"):
            Image.open(path).crop((0, 0, 44, 30)).save(path)
        with pytest.raises(SystemExit):
            train.main(on_folder(folder, tmp_path / "run", *bare, *SHORT))
        said = capsys.readouterr().err
        assert "Your images differ in size: choose one, for example --image_size 32 48" in said
        assert not (tmp_path / "run").exists()

    def test_images_of_one_size(self, bare, folder, tmp_path, capsys):
        for path in folder.rglob("*.???"):
            Image.open(path).crop((0, 0, 44, 30)).save(path)
        args, config = train.parse_arguments(on_folder(folder, tmp_path / "run", *bare, *SHORT), TrainArguments)
        trainer = train.build_trainer(args, config, *train.load_data(args))
        assert args.image_size == [32, 48]
        assert trainer.train_dataset[0]["pixel_values"].shape == (3, 32, 48)
        assert trainer.eval_dataset[0]["pixel_values"].shape == (3, 32, 48)
        assert "note: image_size 32 48, not 30 44" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "rates"),
        [
            ([], (5e-6, 40.0)),
            (["--learning_rate", "1e-3"], (1e-3, 40.0)),
            (["--learning_rate", "2e-4", "--head_lr_multiplier", "5"], (2e-4, 5.0)),
            (["--freeze_backbone", "True"], (2e-4, 5.0)),
            (["--from_scratch", "True"], (2e-3, 5.0)),
        ],
    )
    def test_learn_at_published_rates(self, flags, rates, bare, folder, tmp_path, capsys):
        args, config = train.parse_arguments(on_folder(folder, tmp_path, *bare, *flags), TrainArguments)
        train.use_published_rates(args, config, build_model(bare[1], dict(enumerate("abcd"))))
        assert (config.learning_rate, config.head_lr_multiplier) == rates
        assert ("from UniMatch V2" in capsys.readouterr().err) == (40.0 in rates)


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise InputError("a.png: value 77 is not a class")


def test_an_error_in_a_worker_is_one_line_too(capsys):
    with pytest.raises(InputError) as error:
        list(DataLoader(Broken(), num_workers=1))
    with pytest.raises(SystemExit):
        fail(error.value)
    assert capsys.readouterr().err == "error: a.png: value 77 is not a class\n"


class TestCalibrate:
    TRAINED = ("--max_steps", "30", "--per_device_train_batch_size", "4", "--disable_tqdm", "True", "--calibrate")

    def test_a_run_ends_calibrated(self, folder, tmp_path, capsys):
        """The saved network has the temperature, also after a push saves it again; the checkpoint has not."""
        output = tmp_path / "run"
        train.main(on_folder(folder, output, *self.TRAINED, "--report_to", "none"))
        results, config = read(output / "eval_results.json"), read(output / "config.json")
        assert config["calibration_temperature"] == results["eval_temperature"] != 1
        assert results["eval_calibration_split"] == "validation"
        assert results["eval_uncalibrated_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
        assert "calibration_temperature" not in read(output / "checkpoint-30" / "config.json")
        assert f"temperature {results['eval_temperature']:.3f}" in capsys.readouterr().out
        score = ["--eval_only", "--model_name_or_path", str(output), "--eval_calibration", "--disable_tqdm", "True"]
        train.main(on_folder(folder, tmp_path / "scored", *score))
        scored = read(tmp_path / "scored" / "eval_results.json")
        assert scored["eval_per_category_iou"] == results["eval_per_category_iou"]
        assert scored["eval_loss"] < results["eval_loss"]

    def test_images_that_determine_no_temperature_cost_no_results(self, folder, tmp_path, capsys):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pals_hf.temperature.RANGE", (0.999, 1.001))
            train.main(on_folder(folder, tmp_path / "run", *SHORT, "--calibrate"))
        assert "note: the checkpoint is not calibrated: the best temperature is " in capsys.readouterr().err
        assert "eval_temperature" not in read(tmp_path / "run" / "eval_results.json")

    @pytest.mark.parametrize(
        ("change", "flags", "problem"),
        [
            (None, ["--eval_only", "--model_name_or_path", "x"], "Use `pals-hf calibrate`"),
            (None, ["--streaming", "--crop_size", "32", "32"], "reads the validation images twice"),
            (lambda mask: np.full_like(mask, 2), [], "which shows fewer than two classes"),
        ],
    )
    def test_refuses_before_training(self, folder, tmp_path, change, flags, problem):
        for path in folder.glob("val/masks/*.png") if change else []:
            Image.fromarray(change(np.array(Image.open(path))).astype(np.uint8)).save(path)
        ended = call(train.main, *on_folder(folder, tmp_path / "run", *SHORT, "--calibrate", *flags))
        assert ended.returncode == 2
        assert problem in ended.stderr
        assert not (tmp_path / "run").exists()

    def test_one_labelled_validation_image(self, folder, tmp_path):
        for path in sorted(folder.glob("val/masks/*.png"))[1:]:
            Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
        ended = call(train.main, *on_folder(folder, tmp_path / "run", *SHORT, "--calibrate"))
        assert "has labels in fewer than two images" in ended.stderr


class TestTwoProcesses:
    def test_score_the_same_and_train_on_the_same_split(self, folder, tmp_path):
        """Five images of two sizes on two processes: one image is seen twice and must count once."""
        trained, ranks = tmp_path / "trained", tmp_path / "ranks"
        once = [*SHORT, "--max_steps", "1", "--crop_size", "32", "32"]  # one pass over four images
        arguments = on_folder(folder, trained, "--train_fraction", "0.5", *once)
        launch(RECORDER, ranks, *arguments, "--logging_steps", "1", processes=2)
        records = [read(ranks / f"rank-{rank}.json") for rank in range(2)]
        assert [record["world_size"] for record in records] == [2, 2]
        seen = [set(record["trained_on"]) for record in records]
        assert all(seen)
        assert not seen[0] & seen[1]
        assert read(trained / "train_fraction.json")["ids"] == draw_ids([f"street {i}" for i in range(8)], 0.5)
        assert seen[0] | seen[1] <= set(read(trained / "train_fraction.json")["ids"])

        results = []
        for processes in (1, 2):
            output = tmp_path / f"scored by {processes}"
            score = on_folder(folder, output, "--eval_only", "--model_name_or_path", trained, "--disable_tqdm", "True")
            launch(RECORDER, ranks, *score, processes=processes)
            assert read(ranks / "rank-0.json")["world_size"] == processes
            results.append(read(output / "eval_results.json"))
            assert not (output / "curves.png").exists()  # nothing was trained
        timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
        one, two = ({k: v for k, v in result.items() if k not in timings} for result in results)
        assert one.pop("eval_loss") == pytest.approx(two.pop("eval_loss"), rel=1e-6)
        assert one == two
        at_the_end_of_training = read(trained / "eval_results.json")
        for name in one.keys() - {"epoch"}:
            assert one[name] == at_the_end_of_training[name]

    def test_a_stream_is_shared_and_scored_like_a_data_set(self, folder, tmp_path):
        """Two processes train on a stream and score one; one process scores the data set."""
        trained, scored, ranks = tmp_path / "trained", tmp_path / "scored", tmp_path / "ranks"
        launch(
            RECORDER, ranks, *on_folder(folder, trained, "--streaming", "--crop_size", "32", "32", *SHORT), processes=2
        )
        assert read(ranks / "rank-1.json")["world_size"] == 2
        score = ["--eval_only", "--model_name_or_path", str(trained), "--disable_tqdm", "True"]
        train.main(on_folder(folder, scored, *score))
        streamed, loaded = (read(output / "eval_results.json") for output in (trained, scored))
        for name in ("eval_mean_iou", "eval_mean_accuracy", "eval_overall_accuracy", "eval_per_category_iou"):
            assert streamed[name] == loaded[name]


class TestClassesOfACheckpoint:
    """They are matched to those of the data by name."""

    def test_in_another_order(self, folder, tmp_path):
        """The same images, with masks that number the same classes otherwise."""
        train.main(on_folder(folder, tmp_path / "trained", *SHORT))
        score = ["--eval_only", "--model_name_or_path", str(tmp_path / "trained"), "--disable_tqdm", "True"]
        train.main(on_folder(folder, tmp_path / "before", *score))
        names = json.loads((folder / "id2label.json").read_text())
        number = np.arange(256, dtype=np.uint8)
        number[:4] = [2, 0, 3, 1]
        changed = {int(number[int(value)]): name for value, name in names.items()}
        (folder / "id2label.json").write_text(json.dumps(changed))
        for path in folder.glob("*/masks/*.png"):
            Image.fromarray(number[np.array(Image.open(path))]).save(path)
        train.main(on_folder(folder, tmp_path / "after", *score))
        before, after = (read(tmp_path / name / "eval_results.json") for name in ("before", "after"))
        order = [1, 3, 0, 2]
        assert after["eval_per_category_iou"] == [before["eval_per_category_iou"][index] for index in order]
        assert after["eval_overall_accuracy"] == before["eval_overall_accuracy"]

    def test_of_other_names(self, folder, tmp_path, capsys):
        train.main(on_folder(folder, tmp_path / "trained", *SHORT))
        (folder / "id2label.json").write_text(json.dumps(["ground", "wall", "sky", "bus"]))
        score = ["--eval_only", "--model_name_or_path", str(tmp_path / "trained")]
        with pytest.raises(SystemExit):
            train.main(on_folder(folder, tmp_path / "scored", *score))
        message = capsys.readouterr().err
        assert "predicts the classes 0: ground, 1: wall, 2: sky, 3: car, but the data set has 0: ground" in message
        assert not (tmp_path / "scored").exists()


def test_says_what_of_the_data_is_not_used(folder, tmp_path, capsys):
    shutil.copytree(folder / "val", folder / "more")
    path = folder / "train" / "masks" / "street 0.png"
    Image.fromarray(np.minimum(np.array(Image.open(path)), 1)).save(path)
    (tmp_path / "list.txt").write_text("street 0")
    train.main(on_folder(folder, tmp_path / "run", "--train_manifest", str(tmp_path / "list.txt"), *SHORT))
    message = capsys.readouterr().err
    assert f"note: {folder / 'more' / 'images'} has 5 images that are not used" in message
    assert "note: no training image shows sky, car" in message


class TestWrongInput:
    """One line that names what is wrong, exit code 2, no traceback, nothing written."""

    @pytest.fixture
    def fails(self, folder, tmp_path, capsys):
        output = tmp_path / "run"

        def check(*parts, extra=(), untouched=True):
            with pytest.raises(SystemExit) as stop:
                train.main([*on_folder(folder, output), *SHORT, *extra])
            assert stop.value.code == 2
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            for part in parts:
                assert str(part) in line
            if untouched:
                assert not output.exists()

        return check

    @pytest.mark.parametrize(
        ("extra", "parts"),
        [
            (["--dataset_dir", "/nowhere/at/all"], ["/nowhere/at/all", "not a folder"]),
            (["--train_fraction", "0"], ["train_fraction", "got 0.0"]),
            (["--train_fraction", "1.5"], ["train_fraction", "got 1.5"]),
            (["--loss", "dice"], ["--loss", "dice", "pals"]),
            (["--beta", "1.5"], ["beta must lie in [0, 1], got 1.5"]),
            (["--beta", "much"], ["--beta", "much"]),
            (["--affinity", '{"tau": 0}'], ["affinity: tau must be positive, got 0"]),
            (["--label_smoothing_factor", "0.1"], ["--label_smoothing_factor", "loss='label_smoothing'"][1:]),
            (["--image_size", "32"], ["image_size", "two positive numbers"]),
            (["--crop_size", "32", "0"], ["crop_size"]),
            (["--no_such_flag", "1"], ["--no_such_flag"]),
            (["--recipe", "/no/recipe.yaml"], ["/no/recipe.yaml"]),
            (["--void_labels", "9"], ["value 11", "0..3"]),
            (["--model_name_or_path", "/no/model"], ["/no/model"]),
            (["--train_manifest", "/no/manifest.json"], ["/no/manifest.json"]),
            (["--resume_from_checkpoint", "last"], ["no complete checkpoint"]),
            (["--early_stopping_patience", "2"], ["load_best_model_at_end"]),
            (["--eval_only"], ["model_name_or_path"]),
            (["--scale_range", "2", "1"], ["scale_range"]),
            (["--train_fraction", "0.5", "--train_count", "3"], ["train_fraction and train_count"]),
            (["--train_count", "9"], ["train_count must be between 1 and 8"]),
            (["--fraction_method", "best"], ["--fraction_method", "best"]),
            (["--num_folds", "1"], ["num_folds must be between 2 and 13"]),
            (["--rare_crop", "2"], ["rare_crop must lie in [0, 1]"]),
            (["--class_weighting", "best"], ["--class_weighting", "best"]),
            (["--eval_window", "32"], ["eval_window must be two positive numbers"]),
            (["--eval_overlap", "1"], ["eval_overlap must lie in [0, 1)"]),
            (["--cache_images"], ["Set image_size"]),
            (["--streaming"], ["crop_size"]),
            (["--label_clicks", "2"], ["--label_clicks"]),
            (["--enable_jit_checkpoint"], ["enable_jit_checkpoint must be False"]),
            (["--streaming", "--train_fraction", "0.5"], ["train_fraction", "train_manifest"]),
            (["--streaming", "--crop_size", "8", "8", "--class_weighting", "inverse"], ["class_pixels"]),
            (["--output_stride", "8"], ["output_stride 8 cannot be chosen"]),
            (["--from_scratch"], ["from_scratch", "model_name_or_path"]),
            (["--palette", "/no/palette.json"], ["combined with id2label or void_labels"]),
            (["--lr_scheduler_type", "triangle"], ["triangle"]),
            (["--ignore_index", "-100"], ["--ignore_index"]),
            (["--num_threads", "0"], ["num_threads must be positive"]),
            (["--per_device_train_batch_size", "0"], ["per_device_train_batch_size must be positive"]),
            (["--report_to", "nothing"], ["nothing"]),
        ],
        ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
    )
    def test_flags(self, fails, extra, parts):
        fails(*parts, extra=extra)

    def test_chosen_images_of_one_class(self, fails, folder):
        path = folder / "train" / "masks" / "street 0.png"
        Image.fromarray(np.zeros((32, 48), dtype=np.uint8)).save(path)
        (folder / "list.txt").write_text("street 0")
        parts = ["the 1 chosen training images have labels of the class 'ground' only", "Choose more images"]
        fails(*parts, extra=["--train_manifest", str(folder / "list.txt")])

    def test_image_without_mask(self, fails, folder):
        (folder / "train" / "masks" / "street 1.png").unlink()
        fails(folder / "train" / "images" / "street 1.jpg", "has no mask")

    def test_truncated_image(self, fails, folder):
        path = folder / "train" / "images" / "street 5.jpg"
        path.write_bytes(path.read_bytes()[:300])
        fails(path, "not a readable image")

    @pytest.mark.parametrize(
        ("content", "parts"),
        [
            ("learning_rat: 1e-3", ["recipe.yaml", "learning_rat"]),
            ("- 1", ["recipe.yaml", "flags and their values"]),
            ("a: [", ["recipe.yaml", "cannot be read"]),
            ("image_size: 32", ["image_size"]),
            ("void_labels: []\nbeta: 7", ["beta must lie in"]),
            ("smoothing: [0.1, 0.2]", ["0.2"]),
            ("loss: dice", ["--loss", "dice"]),
        ],
    )
    def test_recipe(self, fails, tmp_path, content, parts):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(content)
        fails(*parts, extra=["--recipe", str(recipe)])

    def test_nothing_of_a_failed_start_blocks_the_next(self, folder, tmp_path, capsys):
        """The checkpoint turns out to be damaged only when it is loaded."""
        output = tmp_path / "run"
        start = [*on_folder(folder, output), *SHORT]
        train.main([*start, "--save_steps", "1"])
        (output / "checkpoint-2" / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(SystemExit) as stop:
            train.main([*start, "--resume_from_checkpoint", "last"])
        assert stop.value.code == 2
        assert "checkpoint-2 cannot be loaded: " in capsys.readouterr().err
        (output / "checkpoint-2" / "scheduler.pt").unlink()
        train.main([*start, "--resume_from_checkpoint", "last"])
        assert read(output / "trainer_state.json")["global_step"] == 2

    def test_a_disk_that_is_full_at_the_end(self, folder, tmp_path, capsys):
        start = [*on_folder(folder, tmp_path / "run"), *SHORT, "--save_strategy", "no", "--max_steps", "1"]
        with files_of_at_most(1_000_000), pytest.raises(SystemExit) as stop:
            train.main(start)
        assert stop.value.code == 1
        assert "error: a file of the run cannot be read or written: " in capsys.readouterr().err
        assert not (tmp_path / "run" / "model.safetensors").exists()

    def test_a_damaged_checkpoint_is_found_before_others_are_deleted(self, folder, tmp_path, capsys):
        output = tmp_path / "run"
        start = [*on_folder(folder, output), *SHORT, "--save_steps", "1"]
        train.main(start)
        for step, name in ((2, "optimizer.pt"), (1, "rng_state.pth")):
            checkpoint = output / f"checkpoint-{step}"
            (checkpoint / name).write_bytes(b"damaged")
            with pytest.raises(SystemExit) as stop:
                train.main([*start, "--resume_from_checkpoint", str(checkpoint), "--overwrite"])
            assert stop.value.code == 2
            assert f"error: checkpoint {checkpoint} cannot be loaded: {name}: " in capsys.readouterr().err
            assert (output / "checkpoint-2" / "model.safetensors").exists()

    def test_output_folder_that_holds_a_run(self, fails, tmp_path):
        (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
        fails(tmp_path / "run", "already holds a run", "--overwrite", untouched=False)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-3"]

    def test_as_a_process(self, folder, tmp_path):
        command = [sys.executable, str(SCRIPT), *on_folder(folder, tmp_path / "run", "--beta", "7")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert result.stderr.strip().splitlines()[-1] == "error: beta must lie in [0, 1], got 7.0"


@pytest.mark.slow
def test_the_first_command_of_the_readme(tmp_path):
    """Learns something, and is hard enough that not everything is learned."""
    launch(SCRIPT, "--train_fraction", "0.5", cwd=tmp_path)
    (output,) = (tmp_path / "runs").iterdir()
    assert 0.4 < read(output / "eval_results.json")["eval_mean_iou"] < 0.95


CAMVID = ROOT.parent / "shared" / "data" / "camvid"
BACKBONE = ROOT.parent / "shared" / "checkpoints" / "upernet-efficientnet-lite0-imagenet"


@pytest.mark.skipif(
    not (CAMVID.is_dir() and BACKBONE.is_dir()), reason="CamVid or the backbone is not beside the clone"
)
def test_camvid_with_a_pretrained_backbone(tmp_path):
    pytest.importorskip("timm")
    output = tmp_path / "run"
    sizes = ["--image_size", "180", "240", "--crop_size", "180", "240"]
    where = ["--dataset_dir", str(CAMVID), "--void_labels", "11", "--model_name_or_path", str(BACKBONE)]
    where += ["--num_folds", "39", "--fold", "0"]  # twelve images to score
    steps = ["--train_fraction", "0.01", "--eval_strategy", "no", "--save_strategy", "no", "--output_dir", str(output)]
    train.main([*where, *sizes, *steps, *SHORT])
    results = read(output / "eval_results.json")
    assert len(results["eval_per_category_iou"]) == 11
    processor = read(output / "preprocessor_config.json")
    assert processor["size"] == {"height": 180, "width": 240}
    assert processor["image_mean"] == pytest.approx([127 / 255] * 3)
