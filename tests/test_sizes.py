import pytest
import torch
from architectures import BUILDERS, bare_backbone
from conftest import tiny_segformer, tiny_upernet
from PIL import Image
from test_trainer import Examples, config
from transformers import SwinConfig, UperNetConfig

from pals_hf import PALSTrainer
from pals_hf.errors import InputError
from pals_hf.inference import predict
from pals_hf.models import build_image_processor, build_model
from pals_hf.sizes import nearest_multiple, refuse_size, size_multiple

NAMES = dict(enumerate("abcd"))


class TestMultiple:
    @pytest.mark.parametrize("name", ["beit", "data2vec-vision", "dpt", "sapiens2", "tipsv2_dpt"])
    def test_plain_transformers(self, name):
        assert size_multiple(BUILDERS[name]().config) == 16

    @pytest.mark.parametrize("name", ["mobilenet_v2", "mobilevit", "mobilevitv2", "segformer", "upernet"])
    def test_hierarchical_networks(self, name):
        assert size_multiple(BUILDERS[name]().config) == 1

    def test_windows(self):
        assert size_multiple(UperNetConfig(backbone_config=SwinConfig())) == 1

    def test_backbone(self, tmp_path):
        bare_backbone("dinov2", tmp_path)
        assert size_multiple(build_model(str(tmp_path), NAMES).config) == 8


def test_nearest_multiple():
    assert nearest_multiple((180, 240), 14) == [182, 238]
    assert nearest_multiple((360, 480), 14) == [364, 476]
    assert nearest_multiple((7, 6), 14) == [14, 14]
    assert nearest_multiple((5, 6), 1) == [5, 6]


class TestRefusals:
    @pytest.fixture
    def network(self, tmp_path):
        bare_backbone("dinov2", tmp_path)
        return build_model(str(tmp_path), NAMES)

    def test_names_the_size_that_works(self, network):
        with pytest.raises(InputError, match=r"patches of 8x8 .* drop the rest of a crop of 30x44 pixels\. Use 32x48"):
            refuse_size(network.config, (30, 44), "a crop")
        refuse_size(network.config, (32, 48), "a crop")
        refuse_size(tiny_segformer().config, (31, 47), "a crop")

    def test_in_training_and_rehearsal(self, network, tmp_path):
        trainer = PALSTrainer(network, config(tmp_path), train_dataset=Examples(size=(30, 48)))
        for start in (trainer.train, trainer.dry_run):
            with pytest.raises(InputError, match="Use 32x48"):
                start()

    def test_in_evaluation(self, network, tmp_path):
        trainer = PALSTrainer(network, config(tmp_path), eval_dataset=Examples(size=(30, 48)))
        with pytest.raises(InputError, match=r"an image or window of 30x48 pixels\. Use 32x48"):
            trainer.evaluate()
        trainer = PALSTrainer(network, config(tmp_path, eval_window=[16, 20]), eval_dataset=Examples())
        with pytest.raises(InputError, match=r"of 16x20 pixels\. Use 16x24"):
            trainer.evaluate()

    def test_in_prediction(self, network):
        network.eval()
        with pytest.raises(InputError, match=r"of 30x48 pixels\. Use 32x48"):
            predict(network, build_image_processor(None), [Image.new("RGB", (48, 30))])
        (prediction,) = predict(network, build_image_processor(None, (32, 48)), [Image.new("RGB", (48, 30))])
        assert prediction.mask.shape == (30, 48)

    def test_others_take_any_size(self):
        (prediction,) = predict(tiny_upernet().eval(), build_image_processor(None), [Image.new("RGB", (47, 33))])
        assert prediction.mask.shape == torch.Size([33, 47])
