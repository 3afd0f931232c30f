"""Fixtures shared by all tests: tiny networks of three architectures and a small folder of real image files."""

import json
import os
import shutil
import tempfile

# Before anything imports huggingface_hub: tests use no network.
if "PALS_HF_TESTS_ON_LOOPBACK" not in os.environ:  # tests of the Hub have one of their own
    os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("OMP_NUM_THREADS", None)
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="pals-hf-tests-")

import numpy as np
import pytest
import torch
from PIL import Image

# Processes of pytest-xdist share the cores.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))

NUM_LABELS = 4
RAW_VOID = 11


def tiny_segformer(**overrides):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 8, 16, 16],
        "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16,
        "num_labels": NUM_LABELS,
    }
    return SegformerForSemanticSegmentation(SegformerConfig(**{**config, **overrides}))


def tiny_mobilenet_v2(**overrides):
    """DeepLab-style: MobileNetV2 at output stride 8 with a DeepLabV3+ head."""
    from transformers import MobileNetV2Config, MobileNetV2ForSemanticSegmentation

    config = {"depth_multiplier": 0.25, "output_stride": 8, "num_labels": NUM_LABELS}
    return MobileNetV2ForSemanticSegmentation(MobileNetV2Config(**{**config, **overrides}))


def tiny_upernet(**overrides):
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = {
        "backbone_config": backbone,
        "hidden_size": 16,
        "pool_scales": [1, 2],
        "use_auxiliary_head": False,
        "num_labels": NUM_LABELS,
    }
    return UperNetForSemanticSegmentation(UperNetConfig(**{**config, **overrides}))


ARCHITECTURES = {"segformer": tiny_segformer, "mobilenet_v2": tiny_mobilenet_v2, "upernet": tiny_upernet}


@pytest.fixture(scope="session", autouse=True)
def _cache_of_datasets():
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def zygote():
    """Starts programs in processes of their own."""
    from zygote import Zygote

    with Zygote() as zygote:
        yield zygote


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment_of_accelerate():
    """What Accelerate writes there, like ACCELERATE_USE_FSDP, would reach the processes that later tests start."""
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:
        if name.startswith("ACCELERATE_"):
            del os.environ[name]


@pytest.fixture(params=ARCHITECTURES)
def any_model(request):
    return ARCHITECTURES[request.param]()


def write_pair(folder, name, size=(32, 48), seed=0):
    """One JPEG and its PNG mask, whose colour follows the class; raw value 11 is void."""
    generator = np.random.default_rng(seed)
    mask = np.zeros(size, dtype=np.uint8)
    for label in range(1, NUM_LABELS):
        top, left = generator.integers(0, size[0] - 8), generator.integers(0, size[1] - 8)
        mask[top : top + 12, left : left + 16] = label
    image = mask[..., None] * 60 + generator.integers(0, 40, (*size, 3))
    mask[0] = RAW_VOID
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{name}.jpg", quality=95)
    Image.fromarray(mask).save(folder / "masks" / f"{name}.png")


def load_folder(folder, **options):
    """Load the fixture `folder`."""
    from pals_hf import load_segmentation_dataset

    return load_segmentation_dataset(dataset_dir=folder, **{"void_labels": [RAW_VOID], **options})


def rewrite_mask(folder, change):
    """Change the first training mask of the fixture `folder`."""
    path = sorted((folder / "train" / "masks").iterdir())[0]
    mask = Image.fromarray(change(np.array(Image.open(path))))
    mask.save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A data set folder: 8 training and 5 validation images; the validation images differ in size."""
    root = tmp_path / "data set"
    for index in range(8):
        write_pair(root / "train", f"street {index}", seed=index)
    for index in range(5):
        write_pair(root / "val", f"alley-{index}", size=(32 + 8 * (index % 2), 48), seed=100 + index)
    names = {str(index): name for index, name in enumerate(("ground", "wall", "sky", "car"))}
    (root / "id2label.json").write_text(json.dumps(names))
    return root
