"""Models of timm, one or two of each family: convolutional, attention, hybrid, MLP, gated, shuffled."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.zoo.catalogue import Entry, pixels
from benchmarks.zoo.schemas import declare

declare()

import timm  # noqa: E402

# name -> (pixels, arguments of create_model)
CONVOLUTIONAL: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet26d": (64, {}),
    "resnetv2_50": (64, {}),
    "resnetv2_50d_gn": (64, {}),
    "resnetaa50": (64, {}),
    "res2net50_14w_8s": (64, {}),
    "resnest14d": (64, {}),
    "skresnet18": (64, {}),
    "legacy_seresnet18": (64, {}),
    "ecaresnet26t": (64, {}),
    "gcresnext26ts": (64, {}),
    "cs3darknet_s": (64, {}),
    "cspresnet50": (64, {}),
    "dla34": (64, {}),
    "dpn68": (64, {}),
    "rdnet_tiny": (64, {}),
    "ese_vovnet19b_dw": (64, {}),
    "hrnet_w18_small": (64, {}),
    "hgnetv2_b0": (64, {}),
    "inception_v4": (107, {}),
    "xception41": (64, {}),
    "nf_regnet_b0": (64, {}),
    "eca_nfnet_l0": (64, {}),
    "regnety_002": (64, {}),
    "rexnet_100": (64, {}),
    "selecsls42b": (64, {}),
    "tresnet_m": (64, {}),
    "repvgg_a0": (64, {}),
    "mobileone_s0": (64, {}),
    "repvit_m1": (64, {}),
    "ghostnet_100": (64, {}),
    "tf_mixnet_s": (64, {}),
    "mobilenetv3_small_100": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "lcnet_050": (64, {}),
    "convnextv2_atto": (64, {}),
    "convmixer_768_32": (64, {}),
    "inception_next_atto": (64, {}),
    "fasternet_t0": (64, {}),
    "starnet_s1": (64, {}),
}
ATTENTION: dict[str, tuple[int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (96, {"img_size": 96}),
    "deit_tiny_distilled_patch16_224": (96, {"img_size": 96}),
    "deit3_small_patch16_224": (96, {"img_size": 96}),
    "vit_relpos_small_patch16_224": (96, {"img_size": 96}),
    "beit_base_patch16_224": (96, {"img_size": 96, "depth": 4}),
    "eva02_tiny_patch14_224": (98, {"img_size": 98}),
    "cait_xxs24_224": (96, {"img_size": 96}),
    "xcit_nano_12_p16_224": (96, {"img_size": 96}),
    "swin_tiny_patch4_window7_224": (224, {}),
    "swinv2_tiny_window8_256": (256, {}),
    "pvt_v2_b0": (96, {}),
    "twins_svt_small": (224, {}),
    "crossvit_9_240": (240, {}),
    "tnt_s_legacy_patch16_224": (96, {"img_size": 96}),
    "pit_ti_224": (96, {"img_size": 96}),
    "levit_128s": (224, {}),
    "coat_lite_tiny": (96, {"img_size": 96}),
    "convit_tiny": (96, {"img_size": 96}),
    "davit_tiny": (224, {}),
    "mvitv2_tiny": (224, {}),
    "hiera_tiny_224": (224, {}),
    "volo_d1_224": (224, {}),
    "nest_tiny": (224, {}),
    "efficientvit_m0": (224, {}),
}
HYBRID: dict[str, tuple[int, dict[str, Any]]] = {
    "maxvit_rmlp_pico_rw_256": (256, {}),
    "coatnet_nano_rw_224": (224, {}),
    "mobilevit_xxs": (128, {}),
    "mobilevitv2_050": (128, {}),
    "edgenext_xx_small": (128, {}),
    "efficientformer_l1": (224, {}),
    "efficientvit_b0": (96, {}),
    "fastvit_t8": (128, {}),
    "nextvit_small": (96, {}),
    "poolformer_s12": (96, {}),
    "caformer_s18": (96, {}),
    "swiftformer_xs": (96, {}),
    "shvit_s1": (224, {}),
    "botnet26t_256": (256, {}),
    "halonet26t": (256, {}),
    "lambda_resnet26t": (128, {}),
    "tiny_vit_5m_224": (224, {}),
    "visformer_tiny": (224, {}),
}
MIXING: dict[str, tuple[int, dict[str, Any]]] = {
    "mixer_s32_224": (224, {}),
    "resmlp_12_224": (224, {}),
    "gmixer_12_224": (224, {}),
    "gmlp_ti16_224": (224, {}),
    "sequencer2d_s": (224, {}),
    "mambaout_femto": (96, {}),
    "focalnet_tiny_srf": (96, {}),
}
FAMILIES = {"convolutional": CONVOLUTIONAL, "attention": ATTENTION, "hybrid": HYBRID, "MLP, gated": MIXING}


def timm_entries() -> list[Entry]:
    """The models, family by family."""
    return [
        Entry("timm", name, partial(_build, name, arguments), pixels(size), note=_note(family, arguments))
        for family, models in FAMILIES.items()
        for name, (size, arguments) in models.items()
    ]


def _note(family: str, arguments: dict[str, Any]) -> str:
    return "; ".join([family, *(f"{key}={value}" for key, value in arguments.items())])


def _build(name: str, arguments: dict[str, Any]) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=1000, **arguments)
