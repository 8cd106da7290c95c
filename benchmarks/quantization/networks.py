"""The architectures whose speed and size are measured: untrained, with inputs of the usual shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.schemas import declare
from tersor.core.task import Task
from tersor.zoo.batches import TensorBatches

CALIBRATION = 8  # inputs
TOKENS, VOCABULARY = 128, 30_522


def _vision(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def _bert_small() -> nn.Module:
    """Turc et al. 2019 (arXiv 1908.08962): 4 layers of width 512."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes))


def _vit_tiny() -> nn.Module:
    """Touvron et al. 2021 (arXiv 2012.12877), DeiT-Ti: 12 layers of width 192, patches of 16."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    return ViTForImageClassification(ViTConfig(**sizes, num_labels=1000))


def _images() -> Tensor:
    return torch.randn(CALIBRATION, 3, 224, 224)


def _tokens() -> Tensor:
    return torch.randint(VOCABULARY, (CALIBRATION, TOKENS))


NETWORKS: Mapping[str, tuple[Callable[..., nn.Module], tuple[Any, ...], Callable[[], Tensor]]] = {
    "ResNet-18": (_vision, ("resnet18",), _images),
    "MobileNet-v2": (_vision, ("mobilenet_v2",), _images),
    "MobileNet-v3 large": (_vision, ("mobilenet_v3_large",), _images),
    "EfficientNet-b0": (_vision, ("efficientnet_b0",), _images),
    "BERT-small, 128 tokens": (_bert_small, (), _tokens),
    "ViT-tiny": (_vit_tiny, (), _images),
}
OF_LINEAR_LAYERS = ("BERT-small, 128 tokens", "ViT-tiny")


def network_task(name: str) -> Task:
    """The network with weights drawn from seed 0, norms' statistics set by a few batches, and random inputs."""
    declare()
    make, arguments, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = make(*arguments)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(inputs())
    data = inputs()
    batches = TensorBatches(data, torch.zeros(len(data), dtype=torch.long), 2)
    return Task(model=model.eval(), name=name, calibration=batches, example_inputs=(data[:2],))
