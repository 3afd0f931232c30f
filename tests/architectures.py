"""Tiny random networks of every architecture of `AutoModelForSemanticSegmentation`, auxiliary heads too."""

import pytest
import transformers
from conftest import NUM_LABELS, tiny_mobilenet_v2, tiny_segformer, tiny_upernet
from transformers.models.sapiens2.configuration_sapiens2 import Sapiens2HeadConfig

# One tiny vision transformer; its four stages feed the decoders.
SIZE = 64
VIT = {"image_size": SIZE, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
LABELS = {"num_labels": NUM_LABELS}
BEIT = {**VIT, **LABELS, "intermediate_size": 16, "pool_scales": [1, 2]}
AUXILIARY = {"use_auxiliary_head": True, "auxiliary_channels": 8, "auxiliary_num_convs": 1}
NO_AUXILIARY = {"use_auxiliary_head": False}


def beit(**options):
    config = transformers.BeitConfig(**{**BEIT, "out_indices": [1, 2, 3, 4], "add_fpn": True, **options})
    return transformers.BeitForSemanticSegmentation(config)


def data2vec_vision(**options):
    config = transformers.Data2VecVisionConfig(**{**BEIT, "out_indices": [0, 1, 2, 3], **options})
    return transformers.Data2VecVisionForSemanticSegmentation(config)


def dpt(**options):
    neck = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
    options.pop("auxiliary_channels", None), options.pop("auxiliary_num_convs", None)
    config = transformers.DPTConfig(**{**VIT, **LABELS, "intermediate_size": 16, **neck, **options})
    return transformers.DPTForSemanticSegmentation(config)


def mobilevit():
    widths = {"hidden_sizes": [12, 16, 20], "neck_hidden_sizes": [8, 8, 16, 16, 32, 32, 32], "aspp_out_channels": 16}
    config = transformers.MobileViTConfig(**widths, **LABELS, image_size=SIZE, output_stride=16)
    return transformers.MobileViTForSemanticSegmentation(config)


def mobilevitv2():
    config = transformers.MobileViTV2Config(width_multiplier=0.25, image_size=SIZE, output_stride=16, **LABELS)
    return transformers.MobileViTV2ForSemanticSegmentation(config)


def sapiens2():
    head = {"upsample_out_channels": [8, 8], "upsample_kernel_sizes": [4, 4], "use_pixel_shuffle": False}
    head |= {"conv_out_channels": [8], "conv_kernel_sizes": [1]}
    vit = {**VIT, "intermediate_size": 16, "num_key_value_attention_heads": 2}
    config = transformers.Sapiens2Config(**vit, **LABELS, head_config=Sapiens2HeadConfig(**head))
    return transformers.Sapiens2ForSemanticSegmentation(config)


def tipsv2_dpt():
    backbone = transformers.Tipsv2VisionConfig(
        **VIT, mlp_ratio=1, out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False
    )
    neck = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
    return transformers.Tipsv2DptForSemanticSegmentation(
        transformers.Tipsv2DptConfig(backbone_config=backbone, **neck, **LABELS)
    )


BUILDERS = {
    "beit": lambda: beit(**NO_AUXILIARY),
    "beit, auxiliary head": lambda: beit(**AUXILIARY),
    "data2vec-vision": lambda: data2vec_vision(**NO_AUXILIARY),
    "data2vec-vision, auxiliary head": lambda: data2vec_vision(**AUXILIARY),
    "dpt": lambda: dpt(**NO_AUXILIARY),
    "dpt, auxiliary head": lambda: dpt(**AUXILIARY),
    "mobilenet_v2": tiny_mobilenet_v2,
    "mobilevit": mobilevit,
    "mobilevitv2": mobilevitv2,
    "sapiens2": sapiens2,
    "segformer": tiny_segformer,
    "tipsv2_dpt": tipsv2_dpt,
    "upernet": tiny_upernet,
    "upernet, auxiliary head": lambda: tiny_upernet(**AUXILIARY, auxiliary_in_channels=16),
}

# Tiny random backbones of every family that transformers can put a head on, as (name of the config, its settings).
PLAIN = {**VIT, "image_size": 32, "patch_size": 8, "mlp_ratio": 1}
WINDOWS = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2, "image_size": 32}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
PYRAMID = {**STAGES, "num_attention_heads": [1, 1, 2, 2], "mlp_ratios": [1, 1, 1, 1], "image_size": 32}
GROUPS = {"stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 8, 8], "stage_mid_channels": [4, 4, 4, 4]}
GROUPS |= {"stage_out_channels": [8, 8, 8, 8], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1]}
BACKBONES = {
    "beit": ("Beit", {**PLAIN, "intermediate_size": 16}),
    "bit": ("Bit", {"embedding_size": 8, "hidden_sizes": [32] * 4, "depths": [1] * 4, "num_groups": 2}),
    "convnext": ("ConvNext", STAGES),
    "convnextv2": ("ConvNextV2", STAGES),
    "dinov2": ("Dinov2", PLAIN),
    "dinov2_with_registers": ("Dinov2WithRegisters", PLAIN),
    "dinov3_convnext": ("DINOv3ConvNext", STAGES),
    "dinov3_vit": ("DINOv3ViT", {**PLAIN, "intermediate_size": 16, "num_register_tokens": 2}),
    "focalnet": ("FocalNet", {"embed_dim": 8, "depths": [1] * 4, "hidden_sizes": [16, 32, 64, 64], "image_size": 32}),
    "hgnet_v2": ("HGNetV2", {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, **GROUPS}),
    "maskformer-swin": ("MaskFormerSwin", WINDOWS),
    "pixio": ("Pixio", PLAIN),
    "pvt_v2": ("PvtV2", PYRAMID),
    "resnet": ("ResNet", {"embedding_size": 8, **STAGES, "layer_type": "basic"}),
    "swin": ("Swin", WINDOWS),
    "swinv2": ("Swinv2", WINDOWS),
    "tipsv2_vision_model": ("Tipsv2Vision", PLAIN),
    "vitdet": ("VitDet", PLAIN),
}
TIMM_BACKBONES = {"timm resnet": "test_resnet", "timm efficientnet": "test_efficientnet", "timm vit": "test_vit"}
TIMM_BACKBONES |= {"timm convnext": "test_convnext", "timm maxvit": "test_maxvit"}  # tiny networks of timm's own tests


def bare_backbone(family, folder):
    """Save a tiny bare backbone as it would be published, with its image processor, and return the network."""
    if family in TIMM_BACKBONES:
        return _bare_timm(TIMM_BACKBONES[family], folder)
    name, settings = BACKBONES[family]
    config = getattr(transformers, f"{name}Config")(**settings)
    network = transformers.AutoModel.from_config(config)
    network.save_pretrained(folder)
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    return network


def _bare_timm(architecture, folder):
    timm = pytest.importorskip("timm", reason="needs the extra `timm`")
    network = timm.create_model(architecture)
    timm.models.save_for_hf(network, folder, safe_serialization=True)
    return network
