"""Repair without training: each output channel gets back the mean and the variance that it had in the original."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from tersor.core.apply import apply
from tersor.core.check_fields import check_fields
from tersor.core.edit import Write
from tersor.core.errors import InputError
from tersor.core.place import Everything, Selector, TensorPlace, module_at, select, stored_at
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.observe.layerwise import calibration_arguments, held_otherwise, stages_of
from tersor.observe.moments import Moments, channel_moments

_SAME = 1e-5  # relative: less is rounding, and nothing is written


@final
@dataclass(frozen=True)
class CorrectVariance(Method):
    """Rescale each output channel so that its mean and variance on calibration data are those of ``task.reference``.

    Layer by layer in the order of the forward, in the model corrected so far: with m, v a channel's mean and variance
    before the activation, and s = √(v_reference / v),

        w ← s · w,   b ← s · b + m_reference − s · m

    in convolutions and linear layers; one without a bias gets its variance only. A batch norm is corrected at its own
    output, by its running statistics, so that it also takes over the mean of a convolution without bias, and training
    on starts from them unharmed. Masks stay, and zeros are zeros times s. A channel that does not vary (all of its
    weights are gone) gets its mean only. A layer that is called more than once is corrected once, over all its calls.

    Args:
        where: which layers.
        batches: calibration batches that the moments are taken over.

    Raises InputError for ``batches`` < 1, no calibration data, no reference, and values that are not finite.
    Source: Jordan et al. 2022, REPAIR (arXiv 2211.08403), section 3, for interpolated networks; Nagel et al. 2019
    (arXiv 1906.04721), section 4.2, on the mean alone. Ours aims at the unpruned network and goes layer by layer.
    """

    where: Selector = field(default_factory=Everything)
    batches: int = 8

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batches < 1:
            raise InputError("too few", where="CorrectVariance.batches", got=self.batches, expected="1 or more")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """Correct a copy layer after layer; what was written into it is the plan."""
        if task.reference is None:
            raise InputError("the task has no reference", where="CorrectVariance", do="Pass task.complete()")
        reference, corrected = copy.deepcopy(task.reference).eval(), copy.deepcopy(model).eval()
        paths, skips = self._layers(corrected, reference)
        stages = stages_of(corrected, paths, task)
        called = [path for stage in stages for path in stage.paths]
        skips += [Skip(path, "the forward does not call it as a module") for path in paths if path not in called]
        data = calibration_arguments(corrected, task, self.batches, 0, "CorrectVariance") if stages else []
        wanted = channel_moments(reference, called, data, None)
        edits: list[Write] = []
        lines: list[tuple[str, str]] = []
        for stage in stages:
            for path, got in channel_moments(corrected, stage.paths, data, stage.calls).items():
                goal = wanted.get(path)
                if goal is None or got.like(goal, _SAME):
                    reason = "its moments are the reference's" if goal else "the reference does not call it"
                    skips.append(Skip(path, reason))
                    continue
                new = _correction(corrected, path, got, goal)
                apply(corrected, Plan("correct variance", new), in_place=True)
                edits += new
                lines.append((path, _line(got, goal)))
        return Plan("correct variance", tuple(edits), tuple(skips), tuple(lines))

    def _layers(self, model: nn.Module, reference: nn.Module) -> tuple[list[str], list[Skip]]:
        """Paths of the layers that can be corrected, and why others that have weights cannot."""
        found, skips = [], []
        others = dict(reference.named_modules())
        for path, module in select(model, self.where).items():
            if isinstance(module, parametrize.ParametrizationList) or not _holds_weights(module):
                continue
            reason = _why_not(model, path, others.get(path))
            if reason is None:
                found.append(path)
            else:
                skips.append(Skip(path, reason))
        return found, skips


def _correction(model: nn.Module, path: str, got: Moments, goal: Moments) -> tuple[Write, ...]:
    layer = module_at(model, path)
    varies = got.variance > 0
    scale = torch.where(varies, (goal.variance / got.variance).sqrt(), 1.0)
    new = (
        _statistics(layer, scale, got, goal)
        if isinstance(layer, _BatchNorm)
        else _affine(model, path, scale, got, goal)
    )
    places = {name: TensorPlace(path, name) for name in new}
    return tuple(Write(places[name], value.to(stored_at(model, places[name]))) for name, value in new.items())


def _affine(model: nn.Module, path: str, scale: Tensor, got: Moments, goal: Moments) -> dict[str, Tensor]:
    """What is stored is rescaled, under a mask too."""
    weight = stored_at(model, TensorPlace(path, "weight")).detach().double()
    new = {"weight": weight * scale.view(-1, *[1] * (weight.ndim - 1))}
    bias = cast("Tensor | None", module_at(model, path).bias)
    if bias is not None:
        new["bias"] = scale * bias.detach().double() + goal.mean - scale * got.mean
    return new


def _statistics(layer: _BatchNorm, scale: Tensor, got: Moments, goal: Moments) -> dict[str, Tensor]:
    """Running mean and variance with which γ (x − μ) / √(σ² + ε) + β has the moments of ``goal``."""
    assert layer.running_mean is not None and layer.running_var is not None
    mean, variance = layer.running_mean.double(), layer.running_var.double()
    gamma = torch.ones_like(mean) if layer.weight is None else layer.weight.detach().double()
    beta = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().double()
    moves = (gamma != 0) & (scale > 0)
    deviation = (variance + layer.eps).sqrt()
    shift = deviation / gamma * (got.mean - beta - (goal.mean - beta) / scale)
    return {
        "running_mean": torch.where(moves, mean + shift, mean),
        "running_var": torch.where(moves, ((variance + layer.eps) / scale.square() - layer.eps).clamp_min(0), variance),
    }


def _line(got: Moments, goal: Moments) -> str:
    deviation, size = got.variance.sqrt(), goal.variance.sqrt().clamp_min(1e-30)
    off = ((got.mean - goal.mean).abs() / size).median()
    ratio = (deviation / size).median()
    constant = int((got.variance == 0).sum())
    text = f"deviation {ratio:.3g} of the reference's, mean off by {off:.3g} of it (medians of {len(size)} channels)"
    return text + (f"; {constant} do not vary" if constant else "")


def _holds_weights(module: nn.Module) -> bool:
    return bool(module._parameters) or parametrize.is_parametrized(module) or isinstance(module, _BatchNorm)


def _why_not(model: nn.Module, path: str, other: nn.Module | None) -> str | None:
    layer = module_at(model, path)
    if other is None:
        return "the reference has no such layer"
    if isinstance(layer, _BatchNorm):
        if layer.running_mean is None:
            return "it keeps no running statistics"
        return _differs(layer.num_features, getattr(other, "num_features", None))
    if not isinstance(layer, (_ConvNd, nn.Linear)) or isinstance(layer, _ConvTransposeNd):
        return f"only convolutions, linear layers and batch norms are corrected, not {type(layer).__name__}"
    if (reason := held_otherwise(model, path)) is not None:
        return reason
    if parametrize.is_parametrized(layer, "bias"):
        return "its bias is computed from what is stored"
    weight = getattr(other, "weight", None)
    return _differs(len(layer.weight), len(weight) if isinstance(weight, Tensor) else None)


def _differs(ours: int, theirs: int | None) -> str | None:
    return None if ours == theirs else f"{ours} channels, {theirs} in the reference"
