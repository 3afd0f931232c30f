"""`pals-hf export`: onnxruntime runs the exported files."""

import functools
import sys

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES
from launching import call
from test_checkpoints import files_of_at_most
from torch import nn
from trained import patches, save_checkpoint
from transformers.modeling_outputs import SemanticSegmenterOutput

from pals_hf.cli import export
from pals_hf.errors import InputError
from pals_hf.inference import load_for_inference

pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def run(*arguments):
    return call(export.main, *arguments)


# Supported sizes: UperNet pools to a grid, and the padding of MobileNetV2 depends on the image size.
SIZES = {
    "segformer": ("The model takes images of any size.", [(1, 64, 96), (3, 45, 131)]),
    "mobilenet_v2": (
        "The model takes images whose sides are multiples of 32.",
        [(1, 64, 96), (2, 160, 96)],
    ),
    "upernet": (
        "The model takes images of height 64 and width 96.",
        [(1, 64, 96), (3, 64, 96)],
    ),
}


# MobileNetV2 has many layers and exports slowly. `Padding` below tests its special padding.
@pytest.mark.parametrize(
    "architecture", [pytest.param("mobilenet_v2", marks=pytest.mark.slow), "segformer", "upernet"]
)
def test_the_exported_file_computes_the_same_logits(architecture, tmp_path):
    model, file = save_checkpoint(tmp_path / "model", ARCHITECTURES[architecture](), (64, 96)), tmp_path / "m.onnx"
    patches(150, 90).save(tmp_path / "street.png")
    result = run(model, file, "--image", tmp_path / "street.png")
    assert result.returncode == 0, result.stderr
    rule, sizes = SIZES[architecture]
    lines = result.stdout.splitlines()
    assert lines[0] == rule
    assert lines[1].startswith("at 64x96: largest difference ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "model", "street.png"]
    network, _ = load_for_inference(str(model), "cpu")
    session = onnxruntime.InferenceSession(file)
    for size in sizes:
        images = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            expected = network(pixel_values=images).logits.numpy()
        (found,) = session.run(["logits"], {"pixel_values": images.numpy()})
        assert expected.std() > 0.1
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.999


class Small(nn.Module):
    """A network that exports in a second. With another factor, the exported file computes other logits."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.head, self.factor = nn.Conv2d(3, 4, 3, stride=2), factor

    def forward(self, pixel_values):
        factor = self.factor if torch.compiler.is_exporting() else 1.0
        return SemanticSegmenterOutput(logits=factor * self.head(pixel_values))


class Padding(Small):
    """A network that pads odd sizes with a Python condition, of which the exporter records only one branch."""

    def forward(self, pixel_values):
        if pixel_values.shape[2] % 2 == 0:
            return super().forward(pixel_values)
        return super().forward(nn.functional.pad(pixel_values, (2, 2, 2, 2)))


def test_sizes_that_were_traced_in_another_way_are_not_promised(tmp_path):
    network = Padding()
    lines = export.export(network, torch.randn(1, 3, 32, 48), tmp_path / "even.onnx")
    assert lines[0] == "The model takes images whose sides are multiples of 32."
    session, image = onnxruntime.InferenceSession(tmp_path / "even.onnx"), torch.randn(2, 3, 96, 32)
    (logits,) = session.run(None, {"pixel_values": image.numpy()})
    assert np.allclose(logits, network(image).logits.detach(), atol=1e-5)
    lines = export.export(network, torch.randn(1, 3, 33, 49), tmp_path / "odd.onnx")
    assert lines[0] == "The model takes images of height 33 and width 49."
    assert onnxruntime.InferenceSession(tmp_path / "odd.onnx").get_inputs()[0].shape == ["batch", 3, 33, 49]


def test_a_file_that_computes_other_logits_is_not_kept(tmp_path):
    file = tmp_path / "m.onnx"
    file.write_text("an older one")
    with pytest.raises(InputError, match="Small cannot be exported: at 32x48: largest difference"):
        export.export(Small(factor=1.001), torch.randn(1, 3, 32, 48), file)
    assert file.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_keeps_the_older_file(tmp_path):
    file = tmp_path / "m.onnx"
    file.write_text("an older one")
    with files_of_at_most(500), pytest.raises(InputError, match=r"m\.onnx cannot be written: "):
        export.export(Small(), torch.randn(1, 3, 32, 48), file)
    assert file.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [file]


def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    """Torch writes weights above 2 GB into a second file. Here it is told to do so."""
    write = functools.partialmethod(torch.onnx.ONNXProgram.save, external_data=True)
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", write)
    network, image = Small(), torch.randn(1, 3, 32, 48)
    lines = export.export(network, image, tmp_path / "new" / "m.onnx")
    assert lines[0] == "The model takes images of any size."
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["m.onnx", "m.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "new" / "m.onnx")
    (logits,) = session.run(None, {"pixel_values": image.numpy()})
    assert np.allclose(logits, network(image).logits.detach(), atol=1e-5)


def test_compare_sees_differences():
    class Copy:
        """A session that returns changed logits of the network."""

        def __init__(self, change):
            self.change = change

        def run(self, names, inputs):
            return [self.change(network(torch.from_numpy(inputs["pixel_values"]))).numpy()]

    network, image = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 8, 8)
    line = export.compare(network, Copy(lambda logits: logits), image, (16, 16))
    assert line.startswith("at 16x16: largest difference 0 (largest logit ")
    for change in (lambda logits: 1.001 * logits, lambda logits: logits[..., 1:], lambda logits: logits * torch.nan):
        with pytest.raises(InputError, match="at 16x16"):
            export.compare(network, Copy(change), image, (16, 16))


def test_wrong_input(model, tmp_path, monkeypatch):
    (tmp_path / "there.onnx").touch()
    cases = [
        ((model, tmp_path / "m.pt"), "m.pt must be a file with the extension .onnx"),
        ((model, tmp_path / "there.onnx"), "there.onnx exists. Use --overwrite"),
        ((tmp_path / "nowhere", tmp_path / "m.onnx"), "there is no such folder"),
        ((model, tmp_path / "m.onnx", "--image", tmp_path / "no.png"), "no.png is not a readable image"),
    ]
    for arguments, reason in cases:
        result = run(*arguments)
        assert result.returncode == 2
        assert reason in result.stderr.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run(model, tmp_path / "m.onnx")
    assert result.stderr == "error: the export needs onnxruntime. Install it with: pip install 'pals_hf[onnx]'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]
