"""Networks around bare backbones of every family: built, trained, saved, piped."""

import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import transformers
from architectures import BACKBONES, TIMM_BACKBONES, bare_backbone, dpt
from conftest import NUM_LABELS, tiny_segformer, tiny_upernet
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForSemanticSegmentation, pipeline

from pals_hf import PALSConfig, PALSTrainer, SegmentationMetrics
from pals_hf.backbones import default_width, layer_scales, published_rates
from pals_hf.data import EvalTransform
from pals_hf.errors import InputError
from pals_hf.models import backbone_of, build_image_processor, build_model
from pals_hf.tap import ClassifierTap

NAMES = dict(enumerate(("ground", "wall", "sky", "car")))
FIXED_SIZE = {"timm vit": (160, 160), "timm maxvit": (160, 160)}  # timm's networks for one size of images
HEADS = [(family, "upernet") for family in (*BACKBONES, *TIMM_BACKBONES)]
HEADS += [(family, "linear") for family in ("dinov2", "dinov3_vit", "swin", "resnet", "timm efficientnet", "timm vit")]
HEADS += [(family, "dpt") for family in ("dinov2", "dinov2_with_registers", "tipsv2_vision_model")]
# One of each kind is quick: a plain transformer, windows, stages of convolutions, and of timm.
QUICK = {("dinov2", head) for head in ("upernet", "linear", "dpt")}
QUICK |= {("beit", "upernet"), ("swin", "upernet"), ("convnext", "upernet"), ("resnet", "linear")}
QUICK |= {("timm efficientnet", "upernet")}
HEADS = [pytest.param(at, marks=[] if at in QUICK else [pytest.mark.slow], id=", ".join(at)) for at in HEADS]


def picture(size):
    generator = np.random.default_rng(0)
    pixels, labels = generator.integers(0, 255, (*size, 3)), generator.integers(0, NUM_LABELS, size)
    return Image.fromarray(pixels.astype(np.uint8)), Image.fromarray(labels.astype(np.uint8))


def trainer_of(model, processor, folder, size, **settings):
    """A trainer of one step on a random picture."""
    example = EvalTransform(processor)(*picture(size))
    args = PALSConfig(folder, eval_strategy="no", disable_tqdm=True, **settings)
    return PALSTrainer(model, args, train_dataset=[example] * 2, eval_dataset=[example], processing_class=processor)


def take_step(trainer):
    """One step of a training. `train` itself takes a second for the garbage collection of Accelerate."""
    batch = trainer.data_collator(trainer.train_dataset)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    trainer.create_optimizer().step()


def copies(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module, before):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.fixture(scope="module", params=HEADS)
def run(request, tmp_path_factory):
    """A network around a bare backbone, before and after a step of PALS, and the folder of its checkpoint."""
    torch.manual_seed(0)
    family, head = request.param
    bare_folder, folder = (str(tmp_path_factory.mktemp(name)) for name in ("bare", "run"))
    source = bare_backbone(family, bare_folder).state_dict()
    size = FIXED_SIZE.get(family, (64, 96))
    # The architecture of BEiT has a head of its own, so the default is not upernet.
    model = build_model(bare_folder, NAMES, head=None if head == "upernet" and family != "beit" else head)
    processor = build_image_processor(bare_folder, size)
    before, backbone_before = copies(model), copies(model.backbone)
    trainer = trainer_of(model, processor, folder, size)
    take_step(trainer)
    trainer.save_model()
    return SimpleNamespace(**locals())


class TestEveryFamily:
    def test_has_the_weights_of_its_backbone(self, run):
        """Under whatever name. Only the norms of single stages are new."""
        given = {(tensor.shape, tensor.double().sum().item()) for tensor in run.source.values()}
        kernels = {name: tensor for name, tensor in run.backbone_before.items() if tensor.ndim > 1}
        assert len(kernels) > 5
        assert [name for name, of in kernels.items() if (of.shape, of.double().sum().item()) not in given] == []

    def test_learns_in_head_and_backbone(self, run):
        moved = changed(run.model, run.before)
        assert any(name.startswith("backbone.") for name in moved)
        *_, classifier = ClassifierTap(run.model).layers
        assert f"{classifier}.weight" in moved
        assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())

    def test_the_tap_finds_the_classifier(self, run):
        model, images = run.model.eval(), torch.randn(1, 3, *run.size)
        with torch.no_grad(), (tap := ClassifierTap(model)):
            logits = model(images).logits
        reading = tap.read()
        assert reading.features.shape[2:] == reading.logits.shape[2:]
        resized = nn.functional.interpolate(reading.logits, logits.shape[2:], mode="bilinear")
        torch.testing.assert_close(resized, logits)

    def test_pipeline_equals_evaluation(self, run):
        metrics = run.trainer.evaluate()
        loaded, info = AutoModelForSemanticSegmentation.from_pretrained(run.folder, output_loading_info=True)
        assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
        assert type(loaded).__module__.startswith("transformers.")
        image, labels = picture(run.size)
        mask = np.full(run.size, -1)
        for found in pipeline("image-segmentation", model=run.folder)(image):
            mask[np.asarray(found["mask"]) > 0] = loaded.config.label2id[found["label"]]
        scored = SegmentationMetrics(NUM_LABELS)
        scored.update(torch.from_numpy(mask)[None], torch.from_numpy(np.asarray(labels, dtype=np.int64))[None])
        assert scored.compute()["overall_accuracy"] == metrics["eval_overall_accuracy"]
        assert scored.compute()["mean_iou"] == metrics["eval_mean_iou"]

    def test_frozen_is_frozen(self, run, tmp_path):
        before = copies(run.model)
        take_step(trainer_of(run.model, run.processor, tmp_path, run.size, freeze_backbone=True))
        moved = changed(run.model, before)
        assert moved
        assert not {name for name in moved if name.startswith("backbone.")}


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_normalisation_is_that_of_the_backbone(tmp_path):
    bare_backbone("dinov2", tmp_path)
    assert list(build_image_processor(str(tmp_path)).image_mean) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_normalisation_of_timm(is_wrapped, tmp_path):
    if is_wrapped:
        config = transformers.TimmBackboneConfig(backbone="test_resnet")
        transformers.AutoBackbone.from_config(config).save_pretrained(tmp_path)
    else:
        bare_backbone("timm resnet", tmp_path)
    expected = timm.get_pretrained_cfg("test_resnet").mean
    assert tuple(build_image_processor(str(tmp_path)).image_mean) == expected


@pytest.mark.parametrize("architecture", ["test_resnet", "test_convnext"])
@pytest.mark.parametrize("layout", ["timm", "wrapper", "backbone"])
def test_layouts_of_timm(architecture, layout, tmp_path):
    """As timm saves, as transformers saves a model of timm, and as it saves a backbone of timm."""
    source = timm.create_model(architecture).eval()
    if layout == "timm":
        timm.models.save_for_hf(source, tmp_path, safe_serialization=True)
    elif layout == "wrapper":
        config = transformers.TimmWrapperConfig(architecture=architecture, num_labels=1000)
        network = transformers.TimmWrapperForImageClassification(config)
        network.timm_model.load_state_dict(source.state_dict())
        network.save_pretrained(tmp_path)
    else:
        source = transformers.AutoBackbone.from_config(transformers.TimmBackboneConfig(backbone=architecture)).eval()
        source.save_pretrained(tmp_path)
    model, images = build_model(str(tmp_path), NAMES).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = model.backbone(images).feature_maps[-1]
        expected = source(images).feature_maps[-1] if layout == "backbone" else source.forward_features(images)
    torch.testing.assert_close(found, expected)


class TestBuilding:
    def test_around_the_backbone_of_a_segmentation_network(self, tmp_path):
        source = tiny_upernet()
        source.save_pretrained(tmp_path)
        model = build_model(str(tmp_path), NAMES, head="linear")
        assert model.config.backbone_config.out_features == ["stage4"]
        kept = source.backbone.state_dict()
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.backbone.state_dict().items())

    def test_from_scratch(self, tmp_path):
        source = bare_backbone("swin", tmp_path)
        (tmp_path / "model.safetensors").unlink()
        model = build_model(str(tmp_path), NAMES, from_scratch=True)
        assert model.config.name_or_path == ""
        assert sum(p.numel() for p in model.backbone.parameters()) > sum(p.numel() for p in source.parameters())

    @pytest.mark.parametrize(
        ("layers", "stages"), [(12, [3, 6, 9, 12]), (24, [6, 12, 18, 24]), (6, [2, 3, 5, 6]), (2, [1, 2])]
    )
    def test_layers_of_a_plain_transformer(self, layers, stages, tmp_path):
        settings = BACKBONES["dinov2"][1]
        transformers.Dinov2Config(**{**settings, "num_hidden_layers": layers}).save_pretrained(tmp_path)
        model = build_model(str(tmp_path), NAMES, from_scratch=True)
        assert model.config.backbone_config.out_indices == stages

    @pytest.mark.parametrize(("channels", "width"), [(320, 128), (384, 128), (768, 256), (2048, 512), (16, 64)])
    def test_width(self, channels, width):
        assert default_width(channels) == width

    def test_width_of_the_head_that_is_asked_for(self, tmp_path):
        bare_backbone("resnet", tmp_path)
        assert build_model(str(tmp_path), NAMES, head_channels=24).decode_head.classifier.in_channels == 24

    def test_refuses_weights_of_another_network(self, tmp_path):
        bare_backbone("dinov2", tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
        with pytest.raises(InputError, match=r"its config has more layers than its weights, see .*layer\.4"):
            build_model(str(tmp_path), NAMES)

    def test_refuses_weights_of_something_else(self, tmp_path):
        bare_backbone("dinov2", tmp_path)
        save_file({"classifier.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=r"it has no weights for embeddings.* other parameters of the backbone"):
            build_model(str(tmp_path), NAMES)

    @pytest.mark.parametrize(
        ("network", "options", "message"),
        [
            ("swin", {"head": "dpt"}, "head dpt does not fit .* Use head upernet or linear"),
            ("swin", {"head": "fcn"}, "head must be one of upernet, linear, dpt, got 'fcn'"),
            ("swin", {"output_stride": 8}, "output_stride 8 cannot be chosen"),
            ("swin", {"head": "linear", "head_channels": 8}, "head_channels has no effect with head linear"),
            (
                tiny_segformer,
                {"head": "linear"},
                "'segformer', which transformers has not as a backbone. Leave",
            ),
            (tiny_segformer, {"head_channels": 8}, "head_channels needs a new head"),
            (None, {"head": "linear"}, "head and head_channels need a backbone"),
        ],
    )
    def test_refuses(self, network, options, message, tmp_path):
        if network == "swin":
            bare_backbone(network, tmp_path)
        elif network is not None:
            network().save_pretrained(tmp_path)
        with pytest.raises(InputError, match=message):
            build_model(None if network is None else str(tmp_path), NAMES, **options)

    def test_refuses_what_is_no_backbone(self, tmp_path):
        transformers.ViTConfig().save_pretrained(tmp_path)
        with pytest.raises(InputError, match="'vit'"):
            build_model(str(tmp_path), NAMES)
        with pytest.raises(InputError, match=r"'vit', .* Use a model of timm, or"):
            build_model(str(tmp_path), NAMES, head="upernet")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"architecture": "no_such_net"}, "timm has no architecture 'no_such_net'"),
            ({"architecture": "hf-hub:someone/else"}, "timm has no architecture 'hf-hub:someone/else'"),
            ({"model_args": {"img_size": 32}}, "has the model_args img_size=32"),
        ],
    )
    def test_refuses_models_of_timm(self, change, message, tmp_path):
        bare_backbone("timm resnet", tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=message):
            build_model(str(tmp_path), NAMES)

    def test_never_runs_the_code_of_a_pickle(self, tmp_path):
        """Weights of timm are read by this package itself."""
        bare_backbone("timm resnet", tmp_path)
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "EXECUTED"), protocol=2))
        with pytest.raises(InputError, match="damaged, or contains code, which pals_hf never runs"):
            build_model(str(tmp_path), NAMES)
        assert not (tmp_path / "EXECUTED").exists()


def test_the_rehearsal_names_the_size_of_a_transformer_of_timm(tmp_path):
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build_model(str(tmp_path), NAMES, from_scratch=True)
    trainer = trainer_of(model, build_image_processor(None), tmp_path, (64, 96))
    with pytest.raises(InputError, match="of 224x224 pixels, and may take no others: try --image_size 224 224"):
        trainer.dry_run()


class TestRates:
    def test_published(self, tmp_path):
        bare_backbone("dinov2", tmp_path)
        rates = published_rates(build_model(str(tmp_path), NAMES).config)
        assert (rates.learning_rate, rates.head_lr_multiplier) == (5e-6, 40.0)
        assert published_rates(tiny_segformer().config) is None

    def test_layers_of_a_plain_transformer(self, tmp_path):
        bare_backbone("dinov2", tmp_path)
        backbone = build_model(str(tmp_path), NAMES).backbone
        scales = layer_scales(backbone, 0.5)
        found = {name: scales[id(parameter)] for name, parameter in backbone.named_parameters()}
        assert found["embeddings.cls_token"] == 0.5**5
        assert [found[f"encoder.layer.{n}.norm1.weight"] for n in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
        assert found["layernorm.weight"] == 0.5

    @pytest.mark.parametrize(
        ("family", "number"),
        [("swin", 4), ("convnext", 4), ("resnet", 4), ("timm efficientnet", 5), ("timm convnext", 4)],
    )
    def test_stages(self, family, number, tmp_path):
        bare_backbone(family, tmp_path)
        backbone = build_model(str(tmp_path), NAMES).backbone
        scales = layer_scales(backbone, 0.9)
        factors = [scales[id(parameter)] for parameter in backbone.parameters()]
        assert factors == sorted(factors)
        assert sorted(set(factors)) == [0.9**power for power in range(number + 1, 0, -1)]

    def test_groups_of_the_optimizer(self, tmp_path):
        model = dpt()
        rates = {"learning_rate": 1e-3, "head_lr_multiplier": 10.0, "layer_lr_decay": 0.5}
        args = PALSConfig(tmp_path, eval_strategy="no", **rates)
        optimizer = PALSTrainer(model, args).create_optimizer()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)  # the last layer, whose rate is logged
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert len(rates) == len([p for p in model.parameters() if p.requires_grad])
        assert rates[id(model.head.head[4].weight)] == pytest.approx(1e-2)
        first, *_ = backbone_of(model).parameters()
        assert rates[id(first)] == pytest.approx(1e-3 * 0.5**5)
