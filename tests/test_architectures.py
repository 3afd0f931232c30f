"""What holds for every architecture of `AutoModelForSemanticSegmentation`, and for torchvision's DeepLabV3."""

import pytest
import torch
import torch.nn.functional as F
from architectures import BUILDERS, SIZE
from conftest import NUM_LABELS
from PIL import Image
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large
from transformers import AutoModelForSemanticSegmentation, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from pals_hf import PALSConfig, PALSLoss, PALSTrainer
from pals_hf.functional import SOURCES
from pals_hf.inference import predict
from pals_hf.models import build_image_processor
from pals_hf.tap import ClassifierTap

EVERY = pytest.mark.parametrize("architecture", BUILDERS)


def batch():
    labels = torch.randint(0, NUM_LABELS, (2, SIZE, SIZE))
    labels[0, : SIZE // 3] = 255
    return {"pixel_values": torch.randn(2, 3, SIZE, SIZE), "labels": labels}


def trainer_of(model, folder, **settings):
    return PALSTrainer(model, PALSConfig(folder, eval_strategy="no", **settings))


def outspoken(architecture):
    """A network with batch statistics and distinct predictions: those of untrained ones are nearly uniform.

    In evaluation mode, so that two passes have the same dropout and statistics.
    """
    model, images = BUILDERS[architecture](), batch()["pixel_values"]
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad(), (tap := ClassifierTap(model)):
        model.train()(images)
        model.eval()(images)
        logits = tap.read().logits
        for layer in tap.layers.values():
            layer.weight /= (logits - logits.mean(dim=(0, 2, 3), keepdim=True)).std() / 2
    return model


def own_loss(model, inputs):
    if model.config.model_type == "dpt" and not model.config.use_auxiliary_head:
        # transformers 5.23 has no loss for this case: it looks for the auxiliary logits.
        logits = F.interpolate(model(inputs["pixel_values"]).logits, size=(SIZE, SIZE), mode="bilinear")
        return F.cross_entropy(logits, inputs["labels"], ignore_index=255)
    return model(**inputs).loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_all_of_them_are_here():
    assert {name.split(",")[0] for name in BUILDERS} == set(MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES)


@EVERY
def test_cross_entropy_is_the_models_own(architecture, tmp_path):
    """The same loss, and gradients for exactly the parameters that the model's own loss reaches."""
    model, inputs = outspoken(architecture), batch()
    trainer = trainer_of(model, tmp_path, loss="ce")
    loss, own = trainer.compute_loss(model, inputs), own_loss(model, inputs)
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)
    expected = gradients(model, own)
    reached = gradients(model, loss)
    assert reached.keys() == expected.keys()
    for name, gradient in reached.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


@EVERY
@pytest.mark.parametrize("source", SOURCES)
def test_pals_differs_from_cross_entropy(architecture, source, tmp_path):
    model, inputs = outspoken(architecture), batch()
    cross_entropy = trainer_of(model, tmp_path, loss="ce").compute_loss(model, inputs)
    trainer = trainer_of(model, tmp_path, affinity={"source": source}, beta=0.0)
    torch.testing.assert_close(trainer.compute_loss(model, inputs), cross_entropy, rtol=1e-5, atol=1e-6)
    # The labels are drawn at random and contradict the network, which adaptive beta would leave as they are.
    trainer = trainer_of(model, tmp_path, affinity={"source": source}, beta=0.5, adaptive_beta=False)
    loss = trainer.compute_loss(model, inputs)
    assert abs(loss - cross_entropy) > 1e-3
    assert gradients(model, loss)


@EVERY
def test_saves_loads_and_serves_a_pipeline(architecture, tmp_path):
    model, processor = BUILDERS[architecture]().eval(), build_image_processor(None, (SIZE, SIZE))
    trainer = PALSTrainer(model, PALSConfig(tmp_path, eval_strategy="no"), processing_class=processor)
    trainer.save_model()
    images = torch.randn(1, 3, SIZE, SIZE)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images).logits, model(images).logits, rtol=1e-4, atol=1e-5)
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    found = pipeline("image-segmentation", model=str(tmp_path))(picture)
    mask = predict(loaded, processor, [picture])[0].mask
    assert {loaded.config.label2id[segment["label"]] for segment in found} == set(mask.unique().tolist())
    for segment in found:
        expected = mask == loaded.config.label2id[segment["label"]]
        assert Image.fromarray(expected.numpy()).convert("L").tobytes() == segment["mask"].tobytes()


@EVERY
def test_the_tap_reads_what_the_output_is_made_of(architecture):
    model = outspoken(architecture)
    tap = ClassifierTap(model)
    with tap:
        outputs = model(pixel_values=batch()["pixel_values"])
    reading = tap.read()
    assert reading.features.shape[2:] == reading.logits.shape[2:]
    at_output = reading.logits if reading.resize is None else reading.resize(reading.logits)
    size = outputs.logits.shape[2:]
    expected = F.interpolate(at_output, size, mode="bilinear") if at_output.shape[2:] != size else at_output
    torch.testing.assert_close(outputs.logits, expected)
    assert (reading.auxiliary_logits is not None) == ("auxiliary" in architecture)


def test_torchvisions_deeplabv3():
    """A model of another library, through the plain loss; its features come from an ordinary hook."""
    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=NUM_LABELS)
    features = []
    model.classifier[-1].register_forward_hook(lambda layer, inputs, output: features.extend([inputs[0], output]))
    inputs = batch()
    model(inputs["pixel_values"])
    loss = PALSLoss()(features[1], inputs["labels"], features[0])
    assert loss.isfinite()
    reached = gradients(model, loss)
    assert "backbone.0.0.weight" in reached
    assert "classifier.4.weight" in reached
