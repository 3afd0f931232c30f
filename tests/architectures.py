"""Tiny random networks of every architecture of `AutoModelForSemanticSegmentation`, auxiliary heads too."""

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
