"""Which reals the integers must reach: range estimators for weights and activations."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import final

import torch
from torch import Tensor

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.observe.watch import Statistics
from tersor.quantize.schemes import Int
from tersor.tensor.affine import choose_parameters, dequantize, quantize

_MOST = 2**16  # of what a search goes through for each row of values


class Range(ABC):
    """Chooses, for each row of values, the interval that the integers cover; what lies outside is clipped."""

    @abstractmethod
    def bounds(self, values: Tensor, scheme: Int) -> tuple[Tensor, Tensor]:
        """``values`` [rows, n] → (low [rows], high [rows])."""

    def seen(self, statistics: Sequence[Statistics], scheme: Int) -> tuple[Tensor, Tensor]:
        """(low [1], high [1]) of what passed at places that share a grid: the bounds of their samples together."""
        return self.bounds(torch.cat([each.sample for each in statistics])[None], scheme)

    @final
    def parameters(self, values: Tensor, scheme: Int) -> tuple[Tensor, Tensor]:
        """``values`` [rows, n] → (scale [rows] float32, zero_point [rows] int32)."""
        return _parameters(*self.bounds(values, scheme), scheme)

    @final
    def calibrated(self, statistics: Sequence[Statistics], scheme: Int) -> tuple[Tensor, Tensor]:
        """(scale [1], zero_point [1]) for places that share a grid, from what passed there."""
        return _parameters(*self.seen(statistics, scheme), scheme)


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
class MovingAverage(Range):
    """From the batches' smallest to their largest value, averaged: m ← momentum · m + (1 − momentum) · batch's.

    The first batch starts the average. A rare outlier moves it by one part in ten instead of setting it. Weights, which
    are always the same, take their extremes. Jacob et al. 2018 (arXiv 1712.05877), section 3.1.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.momentum < 1:
            raise InputError(
                "impossible average", where="MovingAverage.momentum", got=self.momentum, expected="at least 0, below 1"
            )

    def bounds(self, values: Tensor, scheme: Int) -> tuple[Tensor, Tensor]:
        """``values`` [rows, n], one batch → (min [rows], max [rows])."""
        return MinMax().bounds(values, scheme)

    def seen(self, statistics: Sequence[Statistics], scheme: Int) -> tuple[Tensor, Tensor]:
        """(low [1], high [1]): the averages over calls; of several places the widest."""
        low = min(self._average(each.lows) for each in statistics)
        high = max(self._average(each.highs) for each in statistics)
        return torch.tensor([low]), torch.tensor([high])

    def _average(self, extremes: Sequence[float]) -> float:
        return reduce(lambda m, new: self.momentum * m + (1 - self.momentum) * new, extremes)


@dataclass(frozen=True)
class Percentile(Range):
    """The interval that holds ``percent`` of the values, the rest being cut off in equal parts at both ends.

    Where all values lie on one side of zero (after ReLU) only that end is cut. Linear interpolation between values.
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        check_fields(self)
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
        check_fields(self)
        if not 2 <= self.steps <= _MOST or not 0 < self.smallest < 1:
            raise InputError(
                "impossible search", where="MeanSquaredError", got=repr(self),
                expected=f"steps from 2 to {_MOST:,}, 0 < smallest < 1",
            )  # fmt: skip

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


@dataclass(frozen=True)
class Entropy(Range):
    """The clipped range whose integers tell most of how the values are distributed: argmin over t of KL(P ‖ Q).

    P: the histogram of |x| up to t, of ``bins`` bins up to the largest, what lies beyond t counted in its last filled
    bin. Q: the same without what lies beyond, the counts of all bins that round to one integer spread evenly over
    those of them that are filled. t runs over ``candidates`` shares of the largest |x|, in equal ratios, down to where
    each integer has one bin. Exact zeros, which every grid holds, are not counted. Migacz, "8-bit inference with
    TensorRT" (GTC 2017). We differ: bins that round alike are merged, not equal runs of bins; and Q is divided by the
    number of all values, so that what is clipped is missing from it. (Scaled to 1, a Q of a single filled bin would
    match any P: values on a coarse grid of their own lost all but the smallest.)
    """

    bins: int = 2048
    candidates: int = 96

    def __post_init__(self) -> None:
        check_fields(self)
        if not 16 <= self.bins <= _MOST or not 2 <= self.candidates <= _MOST:
            raise InputError(
                "impossible search", where="Entropy", got=repr(self),
                expected=f"bins from 16 and candidates from 2, to {_MOST:,}",
            )  # fmt: skip

    def bounds(self, values: Tensor, scheme: Int) -> tuple[Tensor, Tensor]:
        """``values`` [rows, n] → (low [rows], high [rows])."""
        low, high = zip(*(self._search(rows.float(), scheme) for rows in values.split(_ROWS)), strict=True)
        return torch.cat(low), torch.cat(high)

    def _search(self, values: Tensor, scheme: Int) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(values, dim=1)
        largest = torch.maximum(low.abs(), high.abs())
        counts = _histogram(values, largest, self.bins)
        centres = (torch.arange(self.bins, device=values.device) + 0.5) / self.bins * largest[:, None]
        best, kept = torch.full_like(largest, float("inf")), largest
        for filled in self._tried(scheme):
            t = largest * filled / self.bins
            scale, _ = _parameters(torch.maximum(low, -t), torch.minimum(high, t), scheme)
            integers = torch.round(centres[:, :filled] / scale[:, None]).long()
            divergence = _divergence(counts[:, :filled], counts[:, filled:].sum(dim=1), integers)
            better = divergence < best  # of equals, the widest: it was tried first
            best, kept = torch.where(better, divergence, best), torch.where(better, t, kept)
        return torch.maximum(low, -kept), torch.minimum(high, kept)

    def _tried(self, scheme: Int) -> Iterator[int]:
        """Numbers of bins from all of them down to as many as there are integers, in equal ratios."""
        fewest = min(scheme.quant_max, self.bins)
        shares = torch.logspace(0, math.log2(fewest / self.bins), self.candidates, base=2)
        yield from dict.fromkeys((shares * self.bins).round().int().tolist())


_ROWS = 256  # histograms at a time


def _histogram(values: Tensor, largest: Tensor, bins: int) -> Tensor:
    """How many of |values| [rows, n], zeros left out, lie in each of ``bins`` bins up to ``largest``: [rows, bins]."""
    width = (largest / bins).clamp_min(torch.finfo(torch.float32).tiny)
    position = (values.abs() / width[:, None]).long().clamp_max(bins - 1)
    counts = torch.zeros(len(values), bins, device=values.device)
    return counts.scatter_add_(1, position, (values != 0).float())


def _divergence(counts: Tensor, beyond: Tensor, integers: Tensor) -> Tensor:
    """KL(P ‖ Q) of each row: ``counts`` [rows, bins] up to t, ``beyond`` [rows], ``integers`` [rows, bins] each ≥ 0."""
    filled = (counts > 0).float()
    last = (filled * torch.arange(1, counts.shape[1] + 1, device=counts.device)).argmax(dim=1, keepdim=True)
    p = counts.scatter_add(1, last, beyond[:, None])
    sums, width = (
        torch.zeros(len(counts), int(integers.max()) + 1, device=counts.device).scatter_add_(1, integers, weight)
        for weight in (counts, filled)
    )
    q = (sums / width.clamp_min(1)).gather(1, integers) * filled
    return torch.where(p > 0, p / p.sum(dim=1, keepdim=True) * (p / q).log(), 0.0).sum(dim=1)
