"""The steps of weights that integer kernels multiply: widened where a bias would not fit, kept where they stand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from tersor.core.edit import Quantizer
from tersor.core.errors import InputError
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.intercept import Intercept
from tersor.core.place import TensorPlace, tensor_at
from tersor.core.standing import quantizer_on

ROOM = 2**20  # of a bias's integer: far finer than an 8-bit result needs, and 2^11 for scales that training moves
MOST = 2**28  # where a grid stands that is to stay


def widened(scale: Tensor, rows: Tensor, bias: Tensor | None, input_scale: float, largest: int = ROOM) -> Tensor:
    """Widen steps that integer kernels could not work with: ``scale`` [channels] or [1], ``rows`` [channels, n].

    A channel without a weight other than 0 takes the mean step of the others. A bias b is stored as the 32-bit integer
    b / (input scale · weight scale), so a step must keep that within ``largest``.
    """
    alive = rows.abs().amax(dim=1) > 0
    if not bool(alive.all()):
        scale = torch.where(alive, scale, scale[alive].mean() if bool(alive.any()) else torch.ones(()))
    if bias is None:
        return scale
    needed = bias.abs().float() if len(scale) == len(bias) else bias.abs().max().float()[None]
    return torch.maximum(scale, needed.to(scale.device) / (input_scale * largest))


def expect_float_activations(model: nn.Module) -> None:
    """Raise InputError where quantisers stand on activations: those of weights alone may be built upon."""
    taps = [f"{path}.{key}" for path, module in model.named_modules() if isinstance(module, Intercept)
            for key in module.taps]  # fmt: skip
    if taps:
        found = [path for path, module in model.named_modules() if isinstance(module, FakeQuantize)] or taps
        raise InputError(
            "the model is quantised already", where=found[0], got=f"{len(found)} quantisers",
            do="Quantise the model as it was before",
        )  # fmt: skip


def expect_float_weights(model: nn.Module, where: str) -> None:
    """Raise InputError where any quantiser stands, on weights too."""
    expect_float_activations(model)
    found = [path for path, module in model.named_modules() if isinstance(module, FakeQuantize)]
    if found:
        raise InputError(
            "the weights are quantised already", where=f"{where}, {found[0]}", got=f"{len(found)} quantisers",
            do="Give the model as it was before, or Quantize() alone, which keeps these weights",
        )  # fmt: skip


def unfit(model: nn.Module, place: TensorPlace, axis: int) -> str:
    """Why no integer kernel takes a weight on the grid that stands on it; "" where one does, and where none stands."""
    standing = quantizer_on(model, place)
    if standing is None:
        return ""
    if standing.group_size is not None:
        return f"stays weights alone: its weights have groups of {standing.group_size}, which no integer kernel takes"
    if standing.axis not in (None, axis):
        return f"stays weights alone: its weights have scales along axis {standing.axis}, not for each output"
    if standing.quant_max - standing.quant_min > 255:
        return "stays weights alone: its weights have more than 8 bits"
    return ""


def kept(model: nn.Module, place: TensorPlace, bias: Tensor | None, input_scale: float) -> Quantizer | None:
    """The quantiser that stands on a weight, as an edit; None where none does.

    Steps are as they were, but where a channel has no weight other than 0, which is on every grid, or where its bias
    would not fit 32 bits.
    """
    standing = quantizer_on(model, place)
    if standing is None:
        return None
    scale = standing.scale.detach()
    edit = Quantizer(
        (place,), scale, standing.zero_point, standing.quant_min, standing.quant_max, axis=standing.axis,
        learn=standing.log_growth is not None, group_size=standing.group_size,
    )  # fmt: skip
    if standing.group_size is not None:
        return edit
    value = tensor_at(model, place).detach()
    rows = value.reshape(1, -1) if standing.axis is None else value.movedim(standing.axis, 0).flatten(1)
    return replace(edit, scale=widened(scale.flatten(), rows, bias, input_scale, MOST).reshape(scale.shape))
