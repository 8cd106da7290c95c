"""Which reals the integers must reach: range estimators for weights and activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.quantize.schemes import Int
from tersor.tensor.affine import choose_parameters, dequantize, quantize


class Range(ABC):
    """Chooses, for each row of values, the interval that the integers cover; what lies outside is clipped."""

    @abstractmethod
    def bounds(self, values: Tensor, scheme: Int) -> tuple[Tensor, Tensor]:
        """``values`` [rows, n] → (low [rows], high [rows])."""

    def parameters(self, values: Tensor, scheme: Int) -> tuple[Tensor, Tensor]:
        """``values`` [rows, n] → (scale [rows] float32, zero_point [rows] int32)."""
        low, high = self.bounds(values, scheme)
        return _parameters(low, high, scheme)


def _parameters(low: Tensor, high: Tensor, scheme: Int) -> tuple[Tensor, Tensor]:
    return choose_parameters(
        low, high, quant_min=scheme.quant_min, quant_max=scheme.quant_max, symmetric=scheme.symmetric
    )


@dataclass(frozen=True)
class MinMax(Range):
    """From the smallest to the largest value: nothing is clipped."""

    def bounds(self, values: Tensor, scheme: Int) -> tuple[Tensor, Tensor]:
        """``values`` [rows, n] → (min [rows], max [rows])."""
        low, high = torch.aminmax(values.float(), dim=1)
        return low, high


@dataclass(frozen=True)
class Percentile(Range):
    """The interval that holds ``percent`` of the values, the rest being cut off in equal parts at both ends.

    Where all values lie on one side of zero (after ReLU) only that end is cut. Linear interpolation between values.
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise InputError(
                "impossible share", where="Percentile.percent", got=self.percent, expected="above 50, at most 100"
            )

    def bounds(self, values: Tensor, scheme: Int) -> tuple[Tensor, Tensor]:
        """``values`` [rows, n] → (low [rows], high [rows])."""
        ordered = values.double().sort(dim=1).values
        one_sided = (ordered[:, 0] >= 0) | (ordered[:, -1] <= 0)
        cuts = (100 - self.percent) / 100 / (2 - one_sided.double())
        low = torch.where(ordered[:, 0] >= 0, ordered[:, 0], _quantile(ordered, cuts))
        high = torch.where(ordered[:, -1] <= 0, ordered[:, -1], _quantile(ordered, 1 - cuts))
        return low.float(), high.float()


def _quantile(ordered: Tensor, share: Tensor) -> Tensor:
    """``ordered`` [rows, n] increasing, ``share`` [rows] in [0, 1] → [rows]. (torch.quantile stops at 16 M values.)"""
    position = share * (ordered.shape[1] - 1)
    below = position.floor().long()
    above = (below + 1).clamp_max(ordered.shape[1] - 1)
    pick = ordered.gather(1, torch.stack([below, above], dim=1))
    return torch.lerp(pick[:, 0], pick[:, 1], position - below)


@dataclass(frozen=True)
class MeanSquaredError(Range):
    """The shrunk [min, max] that loses least: argmin over α of mean (x − x̂(α · low, α · high))².

    α runs over ``steps`` even steps from 1 down to ``smallest``.
    """

    steps: int = 40
    smallest: float = 0.3

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.smallest < 1:
            raise InputError(
                "impossible search", where="MeanSquaredError", got=repr(self), expected="steps >= 2, 0 < smallest < 1"
            )

    def bounds(self, values: Tensor, scheme: Int) -> tuple[Tensor, Tensor]:
        """``values`` [rows, n] → (low [rows], high [rows])."""
        values = values.float()
        low, high = torch.aminmax(values, dim=1)
        best = torch.full_like(low, float("inf"))
        best_low, best_high = low, high
        for alpha in torch.linspace(1, self.smallest, self.steps).tolist():
            scale, zero_point = (p[:, None] for p in _parameters(alpha * low, alpha * high, scheme))
            q = quantize(values, scale, zero_point, quant_min=scheme.quant_min, quant_max=scheme.quant_max)
            error = (dequantize(q, scale, zero_point) - values).square_().mean(dim=1)
            better = error < best
            best = torch.where(better, error, best)
            best_low, best_high = (
                torch.where(better, alpha * low, best_low),
                torch.where(better, alpha * high, best_high),
            )
        return best_low, best_high
