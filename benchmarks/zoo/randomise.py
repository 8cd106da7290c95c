"""Draw what fresh models leave constant, so that no mistake hides behind a zero layer scale or a unit batch norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

SPREAD = 0.3  # of what was constant
TINY = 1e-3
LEAST = 0.1  # what a layer scale of 1e-6 or 0 becomes the middle of


def randomise(model: nn.Module, inputs: tuple[Tensor, ...], seed: int) -> None:
    """Give constant parameters and running statistics random values, in place; leaves ``model`` in eval mode.

    A parameter whose elements are all equal or negligible (the ones and zeros of norms, biases, layer scales, class
    tokens, gates that start closed) is drawn anew around its value. Running statistics are first those of ``inputs``,
    so that activations stay finite however deep the model, then scattered. Weak weights are scaled up; everything
    else keeps its fresh value.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() and _is_constant(parameter):
                parameter.copy_(_around(parameter, generator))
            elif parameter.is_floating_point() and parameter.ndim >= 2:
                _strengthen(parameter)
        _measure_statistics(model, inputs)
        for module in model.modules():
            if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None:
                _scatter(module.running_mean, module.running_var, generator)
    model.eval()


def _is_constant(parameter: Tensor) -> bool:
    """Whether all elements are equal, or those of a vector so small that nobody would notice them."""
    first = parameter.flatten()[0]
    return bool((parameter == first).all()) or (parameter.ndim == 1 and bool((parameter.abs() < TINY).all()))


def _strengthen(weight: Tensor) -> None:
    """Scale a weight up to a standard deviation of 1 / √fan-in where it starts weaker, as transformers' 0.02 does:
    through many such layers a signal fades into what the comparison tolerates, and attention is uniform."""
    spread = weight.std()
    wanted = 1 / math.sqrt(math.prod(weight.shape[1:]))
    if 0 < spread < wanted:
        weight.mul_(wanted / spread)


def _around(parameter: Tensor, generator: torch.Generator) -> Tensor:
    constant = parameter.flatten()[0].item()
    if parameter.ndim >= 2 and parameter.shape[0] > 1 and math.prod(parameter.shape[1:]) > 1 and constant == 0:
        return _noise(parameter, generator) / math.sqrt(math.prod(parameter.shape[1:]))  # a weight that starts at zero
    if abs(constant) < 1e-2 and constant != 0:
        constant = LEAST
    if constant == 0:
        return LEAST * _noise(parameter, generator)
    return constant * (1 + SPREAD * _noise(parameter, generator).clamp(-2, 2))


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _measure_statistics(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Set all running statistics to those of one training forward."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _scatter(mean: Tensor, variance: Tensor, generator: torch.Generator) -> None:
    typical = variance.mean().clamp_min(1e-6)
    # Two samples of one pixel can agree by chance; divided by next to nothing, rounding errors grow with every layer.
    variance.clamp_min_(typical)
    mean.add_(SPREAD * variance.sqrt() * _noise(mean, generator))
    variance.mul_(1 + SPREAD * _noise(variance, generator).clamp(-2, 2))
