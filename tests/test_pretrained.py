"""Models of others: their code never runs, and damaged files end in one line."""

import ast
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from conftest import tiny_segformer
from launching import call
from trained import NAMES, patches, save_checkpoint

from pals_hf.cli import demo, export, predict, push
from pals_hf.errors import InputError
from pals_hf.inference import load_for_inference
from pals_hf.models import build_image_processor, build_model

ROOT = Path(__file__).parents[1]
CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("good"), tiny_segformer(depths=[2, 1, 1, 1]))


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(load):
    with pytest.raises(InputError) as raised:
        load()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def for_training(folder):
    build_model(str(folder), NAMES)
    build_image_processor(str(folder))


LOADERS = [load_for_inference, for_training]


# ---- Custom code ----


ANY_AUTO = dict.fromkeys(
    ("AutoConfig", "AutoModelForSemanticSegmentation", "AutoBackbone", "AutoImageProcessor", "AutoFeatureExtractor"),
    "evil.Evil",
)
ASK_FOR_CODE = {
    "a processor of its own": (PROCESSOR, {"auto_map": ANY_AUTO, "image_processor_type": "Evil"}),
    "a processor beside that of transformers": (PROCESSOR, {"auto_map": ANY_AUTO}),
    "an old processor": (PROCESSOR, {"auto_map": ANY_AUTO, "image_processor_type": None}),
    "a config of its own": (CONFIG, {"auto_map": ANY_AUTO, "model_type": "evil"}),
    "a model beside that of transformers": (CONFIG, {"auto_map": ANY_AUTO}),
    "a backbone": (CONFIG, {"backbone_config": {"model_type": "bert", "auto_map": ANY_AUTO}}),
}


@pytest.fixture
def evil(model, tmp_path, monkeypatch):
    """Write a module that leaves a mark when it runs, and answer yes to every question."""
    marks = f"import os\nopen({str(tmp_path / 'EXECUTED')!r}, 'w').close()\nEvil = None\n"
    (model / "evil.py").write_text(marks)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 50))
    yield model
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize("case", ASK_FOR_CODE)
def test_custom_code_is_refused_without_a_question(case, evil, capsys):
    name, changes = ASK_FOR_CODE[case]
    change(evil / name, **changes)
    for load in LOADERS:
        assert "custom code (`auto_map`), which pals_hf never runs" in refused(lambda load=load: load(str(evil)))
    assert "[y/N]" not in "".join(capsys.readouterr())


def test_only_one_module_calls_the_auto_classes():
    """So no call can forget `trust_remote_code=False`."""
    for path in [*(ROOT / "pals_hf").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        auto = [ast.unparse(node) for node in calls if ast.unparse(node.func).startswith("Auto")]
        if path.name == "pretrained.py":
            assert len(auto) == 6
            assert all("trust_remote_code=False" in made for made in auto)
        else:
            assert not auto, path


# ---- Damage ----


class Evil:
    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


def pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(), protocol=2))


def cut(name, share):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def field(name, **changes):
    return lambda folder: change(folder / name, **changes)


DEEP = "[" * 100_000
DAMAGES = {
    "pickled weights": pickled,
    "cut weights": cut(WEIGHTS, 0.5),
    "cut header": cut(WEIGHTS, 0.001),
    "no weights": cut(WEIGHTS, 0),
    "weights are text": text(WEIGHTS, "x" * 1000),
    "cut config": cut(CONFIG, 0.5),
    "config is a list": text(CONFIG, "[1]"),
    "config is deep": text(CONFIG, DEEP),
    "config is empty": text(CONFIG, ""),
    "depths is text": field(CONFIG, depths="x"),
    "depths do not fit": field(CONFIG, depths=[2, 2]),
    "fewer layers than weights": field(CONFIG, depths=[1, 1, 1, 1]),
    "more layers than weights": field(CONFIG, depths=[3, 1, 1, 1]),
    "other sizes than the weights": field(CONFIG, patch_sizes=[9, 3, 3, 3]),
    "no layers": field(CONFIG, depths=[0, 0, 0, 0]),
    "negative depths": field(CONFIG, depths=[-1, -1, -1, -1]),
    "huge depths": field(CONFIG, depths=[10**9, 1, 1, 1]),
    "many depths": field(CONFIG, depths=[900_000] * 4),
    "negative sizes": field(CONFIG, hidden_sizes=[-16, 16, 16, 16]),
    "a petabyte": field(CONFIG, hidden_sizes=[10**6] * 4),
    "beyond a petabyte": field(CONFIG, hidden_sizes=[10**30] * 4),
    "no heads": field(CONFIG, num_attention_heads=[0, 0, 0, 0]),
    "labels are text": field(CONFIG, id2label="x"),
    "labels are a list": field(CONFIG, id2label=["a", "b"]),
    "labels are a number": field(CONFIG, id2label=3),
    "label indices are text": field(CONFIG, id2label={"a": "b"}),
    "a billion labels": field(CONFIG, id2label=None, label2id=None, num_labels=10**12),
    "model type is a list": field(CONFIG, model_type=["segformer"]),
    "dtype": field(CONFIG, dtype="float7"),
    "processor is a list": text(PROCESSOR, "[1]"),
    "processor is a number": text(PROCESSOR, "1"),
    "processor is deep": text(PROCESSOR, DEEP),
    "cut processor": cut(PROCESSOR, 0.5),
    "processor of an unknown type": field(PROCESSOR, image_processor_type="Nothing"),
    "type is a list": field(PROCESSOR, image_processor_type=["Nothing"]),
    "mean is text": field(PROCESSOR, image_mean="x", do_normalize=True),
    "mean of five channels": field(PROCESSOR, image_mean=[0.5] * 5, do_normalize=True),
}
ONLY_INFERENCE = {  # a training sets the size and the labels itself
    "size is text": field(PROCESSOR, size="x", do_resize=True),
    "label indices have a gap": field(CONFIG, id2label={"0": "a", "1": "b", "2": "c", "7": "d"}),
    "labels are numbers": field(CONFIG, id2label={"0": 0, "1": None, "2": ["c"], "3": "d"}),
    "a label is half a character": field(CONFIG, id2label={"0": "\ud800", "1": "b", "2": "c", "3": "d"}),
    "huge size": field(PROCESSOR, size={"height": 10**6, "width": 10**6}, do_resize=True),
    "negative size": field(PROCESSOR, size={"height": -5, "width": 5}, do_resize=True),
}


@pytest.mark.parametrize("case", [*DAMAGES, *ONLY_INFERENCE])
def test_damaged_files_end_in_one_line(case, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (DAMAGES | ONLY_INFERENCE)[case](model)
    for load in LOADERS if case in DAMAGES else LOADERS[:1]:
        if load is for_training and case in ("labels are a list", "label indices are text"):
            continue  # a training brings its own labels
        message = refused(lambda load=load: load(str(model)))
        assert str(model) in message
    assert not (tmp_path / "EXECUTED").exists()


def test_an_architecture_is_checked_before_it_is_built(model):
    for damage in (field(CONFIG, hidden_sizes=[10**6] * 4), field(CONFIG, depths=[900_000] * 4)):
        damage(model)
        assert "cannot load the model" in refused(lambda: build_model(str(model), NAMES, from_scratch=True))


def test_every_command_ends_in_one_line(good, model, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
    pytest.importorskip("gradio", reason="needs the extra `demo`")
    patches(60, 40).save(tmp_path / "street.png")
    (model / "model_card.json").write_text((CARDS / "model_card.json").read_text())
    change(model / PROCESSOR, auto_map=ANY_AUTO)
    before = sorted(tmp_path.rglob("*"))
    for main, *arguments in (
        (predict.main, tmp_path / "street.png", "--model", model, "--output_dir", tmp_path / "out"),
        (export.main, model, tmp_path / "model.onnx"),
        (demo.main, "--models", f"mine={model}"),
        (push.main, model, "--repo_id", "someone/streets"),
    ):
        result = call(main, *arguments)
        assert result.returncode == 2, main
        assert result.stderr.splitlines()[-1].startswith("error: cannot load the model")
    assert sorted(tmp_path.rglob("*")) == before


CARDS = ROOT / "model_cards" / "upernet-efficientnet-lite0-camvid-10-ce"
