"""Segmentation and detection: feature pyramids, outputs in a dictionary, attention between queries and pixels."""

import importlib.util

import pytest
import torch

from benchmarks.zoo.randomise import randomise
from benchmarks.zoo.schemas import declare
from tersor.core.task import Task
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.scores import Random

if importlib.util.find_spec("torchvision") is not None:
    declare()  # transformers imports it where it is installed
transformers = pytest.importorskip("transformers")

CLASSES = 5
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
HEADS = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_queries": 6, "num_labels": CLASSES, "d_model": 32,
}  # fmt: skip


def segformer():
    config = transformers.SegformerConfig(
        **STAGES, num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16, num_labels=CLASSES
    )
    return transformers.SegformerForSemanticSegmentation(config)


def upernet():
    backbone = transformers.ConvNextConfig(**STAGES, out_features=[f"stage{n}" for n in (1, 2, 3, 4)])
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], use_auxiliary_head=False, num_labels=CLASSES
    )
    return transformers.UperNetForSemanticSegmentation(config)


def detr():
    backbone = transformers.ResNetConfig(**STAGES, embedding_size=8, out_features=["stage4"])
    config = transformers.DetrConfig(**HEADS, backbone_config=backbone, use_timm_backbone=False, backbone=None)
    return transformers.DetrForObjectDetection(config)


def rt_detr():
    backbone = transformers.RTDetrResNetConfig(
        **STAGES, embedding_size=8, layer_type="basic", out_features=["stage2", "stage3", "stage4"]
    )
    config = transformers.RTDetrConfig(
        **HEADS, backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[16, 24, 32],
        decoder_in_channels=[32, 32, 32], num_denoising=0,
    )  # fmt: skip
    return transformers.RTDetrForObjectDetection(config)


# What may stay for another reason than that it is in the model's output.
MODELS = {
    segformer: (0.35, []),
    upernet: (0.35, []),
    detr: (0.6, ["position_embedding", "is a position of the sequence"]),
    rt_detr: (0.5, ["position_embedding", "is searched by model:max", "the forward computes with its size"]),
}


def every(result):
    return torch.cat([result[key].flatten() for key in ("logits", "pred_boxes") if key in result])


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_half_of_the_channels_go_and_the_dictionary_keeps_its_shapes(make):
    left, reasons = MODELS[make]
    torch.manual_seed(0)
    net, inputs = make(), (torch.randn(2, 3, 64, 64),)
    randomise(net, inputs, 0)
    net, inputs = net.double().eval(), (inputs[0].double(),)
    result = PruneChannels(sparsity=0.5, score=Random()).run(net, Task(net, example_inputs=inputs, output_of=every))
    assert result.facts["verified"] < 1e-9
    assert size(result.model) < left * size(net), result.plans[0]
    for skip in result.plans[0].skips:
        assert "reaches the model's output" in skip.reason or any(text in skip.reason for text in reasons), skip
    before, after = net(*inputs), result.model(*inputs)
    assert type(before) is type(after) and list(before) == list(after)
    assert before["logits"].shape == after["logits"].shape
    assert not torch.allclose(every(before), every(after)), "what was removed was of no effect before"
    every(result.model.train()(*inputs)).square().sum().backward()
