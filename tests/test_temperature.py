import json
import math

import pytest
import torch
import torch.nn.functional as F
from architectures import BUILDERS, SIZE
from conftest import NUM_LABELS, load_folder
from launching import call
from PIL import Image
from test_architectures import outspoken
from transformers import AutoModelForSemanticSegmentation, pipeline

from pals_hf import PALSConfig, PALSTrainer
from pals_hf.calibration import calibration_metrics, calibration_sums
from pals_hf.cli import calibrate
from pals_hf.data import EvalTransform, TransformedDataset
from pals_hf.errors import InputError
from pals_hf.inference import load_for_inference, predict
from pals_hf.model_card import CardData
from pals_hf.models import build_image_processor, classifier_of
from pals_hf.temperature import RANGE, Calibration, Scorer, fit_temperature, fold_temperature


def sampled(temperature, count=20_000, classes=4):
    """Logits, and labels that are drawn from `softmax(logits / temperature)`."""
    z = 3 * torch.randn(count, classes)
    return z, torch.multinomial((z / temperature).softmax(dim=1), 1)[:, 0]


class Examples:
    """Images of different sizes whose masks are partly unlabelled, as a list. The network predicts half of them."""

    def __init__(self, model, count=6):
        self.items = []
        for index in range(count):
            image = torch.randn(3, SIZE, SIZE)
            with torch.no_grad():
                logits = model(image[None]).logits
            labels = F.interpolate(logits, (SIZE + index, SIZE), mode="bilinear").argmax(dim=1)[0]
            noise = torch.randint(0, NUM_LABELS, labels.shape)
            labels = torch.where(torch.rand(labels.shape) < 0.4, noise, labels)
            labels[:3] = 255
            self.items.append({"pixel_values": image, "labels": labels, "id": f"{index}"})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.fixture
def model():
    return outspoken("segformer")


class TestFit:
    @pytest.mark.parametrize("temperature", [0.4, 1.0, 2.3])
    def test_finds_the_temperature_of_the_labels(self, temperature):
        assert fit_temperature([sampled(temperature)]) == pytest.approx(temperature, rel=0.05)

    def test_is_the_minimum_of_the_nll(self):
        z, y = sampled(1.7)
        best = fit_temperature([(z[:5000], y[:5000]), (z[5000:], y[5000:])])  # pixels of two images
        at = {t: F.cross_entropy(z.double() / t, y).item() for t in (best, 0.999 * best, 1.001 * best)}
        assert min(at, key=at.get) == best

    def test_refuses_what_does_not_determine_one(self):
        z, y = sampled(1.0, count=50)
        right, wrong = z.argmax(dim=1), z.argmin(dim=1)
        for labels, problem in (
            (torch.zeros_like(y), "labels of class 0 only"),
            (right, "is below 0.05: the network makes hardly any error"),
            (wrong, "is above 20: the network is no better than chance"),
        ):
            with pytest.raises(InputError, match=problem):
                fit_temperature([(z, labels)])
        with pytest.raises(InputError, match="have no labels"):
            fit_temperature([(z[:0], y[:0])])

    def test_the_range_is_wide_enough_for_any_sane_network(self):
        for temperature in (2 * RANGE[0], RANGE[1] / 2):
            z, y = sampled(1.0)
            assert fit_temperature([(z * temperature, y)]) == pytest.approx(temperature, rel=0.05)


class TestScorer:
    def test_pixels_are_labelled_ones_of_the_upsampled_logits(self, model, monkeypatch):
        """All of them where there are few, and otherwise some, the same every time."""
        examples = Examples(model)
        for (z, y), item in zip(Scorer(model).pixels(examples), examples.items, strict=True):
            logits = model(item["pixel_values"][None]).logits
            up = F.interpolate(logits, item["labels"].shape, mode="bilinear")[0].movedim(0, -1)
            torch.testing.assert_close(z, up[item["labels"] != 255])
            assert torch.equal(y, item["labels"][item["labels"] != 255])
        monkeypatch.setattr("pals_hf.temperature.NUM_PIXELS", 60)
        few, again = (Scorer(model).pixels(examples) for _ in range(2))
        assert [len(y) for _, y in few] == [10] * 6
        assert all(torch.equal(z, other) for (z, _), (other, _) in zip(few, again, strict=True))

    def test_scores_with_a_temperature_for_each_image(self, model):
        examples = Examples(model, 2)
        (scores,) = Scorer(model).scores(examples, [[0.5, 2.0]])
        sums, loss, pixels = 0.0, 0.0, 0
        for item, temperature in zip(examples.items, (0.5, 2.0), strict=True):
            z, y = model(item["pixel_values"][None]).logits.detach() / temperature, item["labels"][None]
            sums = sums + calibration_sums(z, y)
            up = F.interpolate(z, y.shape[1:], mode="bilinear")
            loss += F.cross_entropy(up, y, ignore_index=255, reduction="sum").item()
            pixels += int((y != 255).sum())
        assert scores == {"loss": pytest.approx(loss / pixels, rel=1e-5), **calibration_metrics(sums)}

    def test_is_cross_fitted(self, model):
        """No image is scored with a temperature that was fitted to it: with labels of one half that ask for another
        temperature, both halves lose."""
        examples = Examples(model)
        halves = torch.randperm(6, generator=torch.Generator().manual_seed(0)) % 2
        for item, half in zip(examples.items, halves, strict=True):
            noise = torch.rand(item["labels"].shape) < 0.6
            if half:
                item["labels"][noise] = torch.randint(0, NUM_LABELS, (int(noise.sum()),))
        result, scorer = Scorer(model).calibrate(examples), Scorer(model)
        pixels = scorer.pixels(examples)
        of_half = [fit_temperature([p for p, half in zip(pixels, halves, strict=True) if half == h]) for h in (0, 1)]
        own, crossed = scorer.scores(
            examples, [[of_half[half] for half in halves.tolist()], [of_half[1 - half] for half in halves.tolist()]]
        )
        assert result.after == crossed
        assert own["loss"] < crossed["loss"]
        assert result.temperature == fit_temperature(pixels)
        assert min(of_half) < result.temperature < max(of_half)

    def test_leaves_the_network_as_it_is(self, model):
        examples = Examples(model)
        before = {name: value.clone() for name, value in model.train().state_dict().items()}
        Scorer(model).calibrate(examples)
        assert model.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_refuses(self, model):
        examples = Examples(model, 2)
        with pytest.raises(InputError, match="at least two labelled images, got 1"):
            Scorer(model).calibrate(Examples(model, 1))
        for item in examples.items:
            item["labels"].fill_(255)
        with pytest.raises(InputError, match="have no labels"):
            Scorer(model).calibrate(examples)
        classifier_of(model)[1].weight.data.fill_(math.nan)
        with pytest.raises(InputError, match="logits of the network are not finite"):
            Scorer(model).calibrate(examples)


@pytest.mark.parametrize("architecture", BUILDERS)
def test_folds_into_every_architecture(architecture, tmp_path):
    """The logits are divided by T, the classes are the same, and what is saved has it for every pipeline."""
    model, images = outspoken(architecture), torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        before = model(images).logits
        fold_temperature(model, 1.75, images[:1])
        after = model(images).logits
    torch.testing.assert_close(after, before / 1.75, rtol=1e-4, atol=1e-5)
    assert torch.equal(after.argmax(dim=1), before.argmax(dim=1))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert loaded.config.calibration_temperature == 1.75
    torch.testing.assert_close(loaded(images).logits, after)


def test_refuses_a_head_that_is_not_linear(model):
    model.decode_head.register_forward_hook(lambda layer, inputs, logits: logits.tanh())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match="SegformerForSemanticSegmentation cannot be calibrated: its logits are not"):
        fold_temperature(model, 2.0, torch.randn(1, 3, SIZE, SIZE))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model.config, "calibration_temperature")


def test_a_trainer_calibrates_once(model, tmp_path):
    """The calibrated network has the NLL of the fit, twice is the same as once, and the card has the figures."""
    examples = Examples(model)
    trainer = PALSTrainer(model, PALSConfig(tmp_path, report_to=[]), eval_dataset=examples)
    metrics = trainer.calibrate()
    temperature = metrics["eval_temperature"]
    assert abs(temperature - 1) > 0.1
    assert model.config.calibration_temperature == temperature
    (fitted,) = Scorer(model).scores(examples, [[1.0] * 6])
    assert fitted["loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    assert fitted["loss"] < metrics["eval_uncalibrated_loss"]
    weights = classifier_of(model)[1].weight.clone()
    again = trainer.calibrate()
    assert again["eval_temperature"] == pytest.approx(1, abs=1e-5)
    assert torch.equal(classifier_of(model)[1].weight, weights)
    assert not Calibration(again["eval_temperature"], 6, {}, {}).has_effect


def test_a_stream_cannot_be_calibrated_on(model, tmp_path):
    trainer = PALSTrainer(model, PALSConfig(tmp_path, report_to=[], eval_strategy="no"))
    with pytest.raises(InputError, match="can be read by their index, not a stream"):
        trainer.calibrate(iter([]))


class TestProgram:
    @pytest.fixture
    def run(self, folder, tmp_path, model):
        """A finished run, whose card and results are there."""
        model.config.id2label = dict(enumerate(("ground", "wall", "sky", "car")))
        model.config.label2id = {name: index for index, name in model.config.id2label.items()}
        classifier_of(model)[1].bias.data[0] += 6.0  # most pixels are ground
        trainer = PALSTrainer(
            model,
            PALSConfig(tmp_path / "run", report_to=[]),
            eval_dataset=self.images(folder),
            processing_class=build_image_processor(None),
        )
        trainer.save_metrics("eval", trainer.evaluate())
        trainer.save_model()
        return tmp_path / "run"

    def images(self, folder, split="validation"):
        return TransformedDataset(getattr(load_folder(folder), split), EvalTransform(build_image_processor(None)))

    def calibrate(self, run, folder, *flags):
        return call(calibrate.main, "--model_name_or_path", run, "--dataset_dir", folder, "--void_labels", 11, *flags)

    def test_calibrates_a_folder(self, run, folder):
        picture = load_folder(folder).validation[0]["image"]
        before, processor = load_for_inference(run, "cpu")
        ended = self.calibrate(run, folder)
        assert ended.returncode == 0, ended.stderr
        after, _ = load_for_inference(run, "cpu")
        temperature = after.config.calibration_temperature
        old, new = (predict(network, processor, [picture])[0] for network in (before, after))
        assert torch.equal(old.mask, new.mask)
        assert not torch.equal(old.entropy, new.entropy)
        for segment in pipeline("image-segmentation", model=str(run))(picture):
            expected = old.mask == after.config.label2id[segment["label"]]
            assert Image.fromarray(expected.numpy()).convert("L").tobytes() == segment["mask"].tobytes()
        results = json.loads((run / "eval_results.json").read_text())
        card, text = CardData.load(run), (run / "README.md").read_text()
        assert results["eval_temperature"] == card.metrics["eval_temperature"] == temperature
        assert {"eval_mean_iou", "eval_uncalibrated_ece", "eval_calibrated_ece"} <= results.keys()
        assert f"One temperature, {temperature:.3f}, was fitted to 5 labelled images (validation split of" in text
        assert "| before calibration |" in text
        assert "| 90.0 % |" in text
        assert f"calibrated by the temperature {temperature:.3f}" in ended.stdout
        assert not list(run.glob("_calibrated*"))
        weights = (run / "model.safetensors").read_bytes()
        again = self.calibrate(run, folder)
        assert "is already calibrated for these images, and stays as it is" in again.stdout
        assert (run / "model.safetensors").read_bytes() == weights

    def test_images_that_were_trained_on_are_left_out(self, run, folder):
        from pals_hf.data import FractionManifest
        from pals_hf.data.fractions import MANIFEST

        ended = self.calibrate(run, folder, "--calibration_split", "train")
        assert (ended.returncode, "it is not known which images" in ended.stderr) == (2, True)
        train = load_folder(folder).train
        for count, printed in ((3, "fitted to 5 images (train split of"), (7, "has 1 images that the model was not")):
            FractionManifest.draw(train, count=count, name="x").save(run / MANIFEST)
            ended = self.calibrate(run, folder, "--calibration_split", "train")
            assert printed in ended.stdout + ended.stderr

    @pytest.mark.parametrize(
        ("flags", "problem"),
        [
            (["--calibration_split", "test"], "has no test split"),
            (["--model_name_or_path", "some/model"], "hf download some/model --local-dir FOLDER"),
            (["--eval_window", "0", "8"], "eval_window must be two positive numbers"),
        ],
    )
    def test_refuses(self, run, folder, flags, problem):
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        ended = self.calibrate(run, folder, *flags)
        assert ended.returncode == 2
        assert problem in ended.stderr
        assert ended.stderr.count("\n") == 1
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "_lock"} == {
            path: time for path, time in before.items() if path.name != "_lock"
        }

    def test_a_network_whose_logits_are_not_finite(self, run, folder):
        model, _ = load_for_inference(run, "cpu")
        classifier_of(model)[1].bias.data.fill_(math.inf)
        model.save_pretrained(run)
        ended = self.calibrate(run, folder)
        assert (ended.returncode, "not finite" in ended.stderr) == (2, True)


def test_training_on_starts_without_a_calibration(tmp_path, model):
    from pals_hf.models import build_model

    fold_temperature(model, 2.0, torch.randn(1, 3, SIZE, SIZE))
    model.save_pretrained(tmp_path)
    assert not hasattr(build_model(str(tmp_path), model.config.id2label).config, "calibration_temperature")


def test_sizes_of_the_thresholds():
    """Pixels with a confidence of 0.8, of which 3 in 4 are right."""
    labels = (torch.arange(1000) % 4 == 0).long().view(1, 20, 50)
    logits = torch.tensor([math.log(4.01), 0.0]).view(1, 2, 1, 1).expand(1, 2, 20, 50)
    found = calibration_metrics(calibration_sums(logits, labels))["confident_pixels"]
    assert found[:4] == [[0.5, 1.0, 0.75], [0.7, 1.0, 0.75], [0.8, 1.0, 0.75], [0.9, 0.0, None]]
