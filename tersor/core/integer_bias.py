"""Biases on the grid on which integer kernels add them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor.core.place import TensorPlace, module_at
from tersor.core.standing import quantizer_at, quantizer_on


def rounded_bias(model: nn.Module, path: str) -> Tensor | None:
    """The bias of the layer at ``path`` as integer kernels add it; None where none does.

    b̂ = round(b / (s_x · s_w)) · s_x · s_w, computed in float64: kernels keep biases as 32-bit integers in steps of the
    products. s_x is the scale of the activation that the weight's quantiser ``reads``, s_w the weight's, [] or
    [outputs]. Jacob et al. 2018 (arXiv 1712.05877), section 2.4.
    """
    layer = module_at(model, path)
    bias = layer._parameters.get("bias")
    weight = quantizer_on(model, TensorPlace(path, "weight"))
    if bias is None or weight is None or weight.reads is None:
        return None
    activation = quantizer_at(model, weight.reads)
    if activation is None or weight.scale.shape not in ((), bias.shape):
        return None
    step = activation.scale.detach().double() * weight.scale.detach().double().to(activation.scale.device)
    rounded: Tensor = torch.round(bias.detach().double() / step.to(bias.device)) * step.to(bias.device)
    return rounded.to(bias.dtype)
