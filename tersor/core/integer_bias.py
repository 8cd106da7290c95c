"""Biases on the grid on which integer kernels add them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.fake_quantize import FakeQuantize
from tersor.core.intercept import CHILD, Intercept
from tersor.core.place import ActivationPlace, module_at


def rounded_bias(model: nn.Module, path: str) -> Tensor | None:
    """The bias of the layer at ``path`` as integer kernels add it; None where none does.

    b̂ = round(b / (s_x · s_w)) · s_x · s_w, computed in float64: kernels keep biases as 32-bit integers in steps of the
    products. s_x is the scale of the activation that the weight's quantiser ``reads``, s_w the weight's, [] or
    [outputs]. Jacob et al. 2018 (arXiv 1712.05877), section 2.4.
    """
    layer = module_at(model, path)
    bias = layer._parameters.get("bias")
    weight = _weight_quantizer(layer)
    if bias is None or weight is None or weight.reads is None:
        return None
    activation = quantizer_at(model, weight.reads)
    if activation is None or weight.scale.shape not in ((), bias.shape):
        return None
    step = activation.scale.detach().double() * weight.scale.detach().double().to(activation.scale.device)
    rounded: Tensor = torch.round(bias.detach().double() / step.to(bias.device)) * step.to(bias.device)
    return rounded.to(bias.dtype)


def quantizer_at(model: nn.Module, place: ActivationPlace) -> FakeQuantize | None:
    """The quantiser that stands on an activation; None where none does."""
    taps = module_at(model, place.module)._modules.get(CHILD)
    key = f"{place.operator}_{place.ordinal}"
    if not isinstance(taps, Intercept) or key not in taps.taps:
        return None
    return next((tap for tap in reversed(list(taps.taps[key].modules())) if isinstance(tap, FakeQuantize)), None)


def _weight_quantizer(layer: nn.Module) -> FakeQuantize | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    entries = layer.get_submodule("parametrizations.weight").children()
    return next((entry for entry in entries if isinstance(entry, FakeQuantize)), None)
