"""Repair without training: each output channel of a quantised layer gets back the mean that it had in float."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from tersor.core.apply import apply
from tersor.core.check_fields import check_fields
from tersor.core.edit import Write
from tersor.core.errors import InputError
from tersor.core.place import Everything, Selector, TensorPlace, aliases, module_at, select
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.observe.layerwise import calibration_arguments, stages_of
from tersor.observe.least_squares import is_conv1d
from tersor.observe.moments import Moments, channel_moments
from tersor.quantize.unquantized import quantizers, without_quantizers

_SAME = 1e-5  # relative: less is rounding, and nothing is written


@final
@dataclass(frozen=True)
class CorrectBias(Method):
    """Shift each output channel of a quantised model back to its mean without quantisers, on calibration data.

    Layer by layer in the order of the forward, in the model corrected so far, over all samples and positions:

        b ← b + E[y] − E[ỹ]

    y what the layer gives with all quantisers taken away, ỹ with them. Rounding shifts a channel's mean by
    (W̃ − W) E[x], which is large where a channel has few weights (depthwise convolutions) and bits are few.
    Convolutions and linear layers; one without a bias is given one. Weights and grids stay.

    What is held against is the weights as they are stored beneath their quantisers: values that were written onto the
    grid (``AdaRound``, ``GPTQ``) are taken as they are, so correct before, or not at all.

    Args:
        where: which layers.
        batches: calibration batches that the means are taken over.

    Raises InputError for ``batches`` < 1, a model without quantisers, no calibration data, and values that are not
    finite. Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2 and appendix D (empirical), whose means are taken
    before the activation too.
    """

    where: Selector = field(default_factory=Everything)
    batches: int = 8

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batches < 1:
            raise InputError("too few", where="CorrectBias.batches", got=self.batches, expected="1 or more")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """Correct a copy layer after layer; the biases written into it are the plan."""
        if not quantizers(model):
            raise InputError(
                "the model has no quantisers", where="CorrectBias",
                do="Put Quantize(learn=False) before it; if it is there, its skips say why nothing is quantised",
            )  # fmt: skip
        unquantized, corrected = without_quantizers(model), copy.deepcopy(model).eval()
        paths, skips = self._layers(corrected)
        stages = stages_of(corrected, paths, task)
        called = [path for stage in stages for path in stage.paths]
        skips += [Skip(path, "the forward does not call it as a module") for path in paths if path not in called]
        data = calibration_arguments(corrected, task, self.batches, 0, "CorrectBias") if stages else []
        wanted = channel_moments(unquantized, called, data)
        edits: list[Write] = []
        lines: list[tuple[str, str]] = []
        for stage in stages:
            for path, got in channel_moments(corrected, stage.paths, data, stage.calls).items():
                goal = wanted[path]
                if got.mean_like(goal, _SAME):
                    skips.append(Skip(path, "its means are the same without quantisers"))
                    continue
                new = _correction(corrected, path, goal.mean - got.mean)
                apply(corrected, Plan("CorrectBias", (new,)), in_place=True)
                edits.append(new)
                lines.append((path, _line(got, goal)))
        return Plan("CorrectBias", tuple(edits), tuple(skips), tuple(lines))

    def _layers(self, model: nn.Module) -> tuple[list[str], list[Skip]]:
        """Paths of the layers that can be corrected, and why others cannot."""
        found, skips = [], []
        for path, module in select(model, self.where).items():
            if isinstance(module, (_ConvNd, nn.Linear)) or is_conv1d(module):
                reason = _why_not(model, path)
                if reason:
                    skips.append(Skip(path, reason))
                else:
                    found.append(path)
        return found, skips


def _why_not(model: nn.Module, path: str) -> str:
    module = module_at(model, path)
    if parametrize.is_parametrized(module, "bias"):
        return "its bias is computed from what is stored"
    if "bias" not in module._parameters:
        return "it has no bias, and no place for one"
    if module._parameters["bias"] is None:
        return ""
    tied = [str(other) for other in aliases(model, TensorPlace(path, "bias")) if other.module != path]
    return f"its bias is tied to {', '.join(tied)}" if tied else ""


def _correction(model: nn.Module, path: str, shift: Tensor) -> Write:
    layer = module_at(model, path)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor), "convolutions and linear layers have weights"
    old = bias.detach().double() if isinstance(bias, Tensor) else torch.zeros_like(shift)
    return Write(TensorPlace(path, "bias"), (old + shift).to(weight.dtype))


def _line(got: Moments, goal: Moments) -> str:
    size = goal.variance.sqrt().clamp_min(1e-30)
    off = (got.mean - goal.mean).abs() / size
    return (
        f"means of {len(size)} channels were off by {float(off.median()):.3g} of their deviation in the median, "
        f"{float(off.max()):.3g} at most"
    )
