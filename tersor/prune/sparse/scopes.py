"""What competes with what: how many units each weight loses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.prune.sparse.weights import Weight
from tersor.tensor import masks


class Scope(ABC):
    """Says how many units each weight loses. Subclasses are frozen dataclasses."""

    @abstractmethod
    def zeros(self, weights: Sequence[Weight], units: Sequence[Tensor], sparsity: float) -> list[int]:
        """How many units of each weight go. ``units``: the scores of each weight's units (see ``Pattern``)."""


@final
@dataclass(frozen=True)
class PerLayer(Scope):
    """Every weight loses the same fraction: ⌊sparsity · units + 1e-9⌋ of its units."""

    def zeros(self, weights: Sequence[Weight], units: Sequence[Tensor], sparsity: float) -> list[int]:
        """One count for each weight; scores are not read."""
        return [masks.count(sparsity, scores.numel()) for scores in units]


@final
@dataclass(frozen=True)
class Global(Scope):
    """All units compete: the smallest scores of the whole model go, ⌊sparsity · weights + 1e-9⌋ weights in total.

    Where units differ in size (rows), the smallest go as long as they do not exceed that total.
    Source: Blalock et al. 2020 (arXiv 2003.03033), section 2, on global against layerwise scores.
    """

    def zeros(self, weights: Sequence[Weight], units: Sequence[Tensor], sparsity: float) -> list[int]:
        """One count for each weight; of equal scores those of the earlier weight go first."""
        if not units:
            return []
        units = [scores.to(units[0].device) for scores in units]
        sizes = {weight.size // scores.numel() for weight, scores in zip(weights, units, strict=True)}
        if len(sizes) == 1:
            zeros = masks.count(sparsity, sum(scores.numel() for scores in units))
            return [scores.numel() - int(mask.sum()) for mask, scores in zip(_chosen(units, zeros), units, strict=True)]
        return _by_size(weights, units, masks.count(sparsity, sum(weight.size for weight in weights)))


def _chosen(units: Sequence[Tensor], zeros: int) -> list[Tensor]:
    found: list[Tensor] = masks.allocate(units, zeros)
    return found


def _by_size(weights: Sequence[Weight], units: Sequence[Tensor], budget: int) -> list[int]:
    """Units in the order of their scores, as many as together have at most ``budget`` weights."""
    owners = [torch.full((scores.numel(),), n, device=scores.device) for n, scores in enumerate(units)]
    owner, scores = torch.cat(owners), torch.cat([scores.flatten().double() for scores in units])
    sizes = torch.tensor([w.size // s.numel() for w, s in zip(weights, units, strict=True)], device=owner.device)
    owner = owner[torch.argsort(scores, stable=True)]
    gone = int((sizes[owner].cumsum(0) <= budget).sum())
    return torch.bincount(owner[:gone], minlength=len(units)).tolist()


@final
@dataclass(frozen=True)
class ErdosRenyi(Scope):
    """Density of a weight in proportion to (out + in + kernel sides) / (out · in · kernel): small layers stay denser.

    ``kernel=False`` leaves the kernel's sides out. Layers that would have to be denser than dense stay whole, and the
    others make up for them. The total is ⌊sparsity · weights + 1e-9⌋ (up to one unit where units differ in size).
    Source: Evci et al. 2020, RigL (arXiv 1911.11134), section 3 and appendix; Mocanu et al. 2018 (arXiv 1707.04780).
    """

    kernel: bool = True

    def __post_init__(self) -> None:
        check_fields(self)

    def zeros(self, weights: Sequence[Weight], units: Sequence[Tensor], sparsity: float) -> list[int]:
        """One count for each weight, from shapes alone."""
        goal = masks.count(sparsity, sum(weight.size for weight in weights))
        wanted = [weight.size - kept for weight, kept in zip(weights, self._kept(weights, goal), strict=True)]
        sizes = [weight.size // scores.numel() for weight, scores in zip(weights, units, strict=True)]
        exact = [want / size for want, size in zip(wanted, sizes, strict=True)]
        zeros = [math.floor(share + 1e-9) for share in exact]
        left = goal - sum(count * size for count, size in zip(zeros, sizes, strict=True))
        # What rounding down left over goes to those that lost most by it.
        for n in sorted(range(len(zeros)), key=lambda n: (zeros[n] - exact[n], n)):
            if zeros[n] < exact[n] - 1e-9 and sizes[n] <= left:
                zeros[n] += 1
                left -= sizes[n]
        return zeros

    def _kept(self, weights: Sequence[Weight], goal: int) -> list[float]:
        """How many weights stay in each, as a real number; all together, the total less ``goal``."""
        dense: set[int] = set()
        while True:
            rest = [n for n in range(len(weights)) if n not in dense]
            left = sum(weight.size for weight in weights) - goal - sum(weights[n].size for n in dense)
            # density = scale · side sum / size, so that scale · side sum weights stay
            scale = left / max(1, sum(self._sides(weights[n]) for n in rest))
            over = {n for n in rest if scale * self._sides(weights[n]) > weights[n].size}
            if not over:
                break
            dense |= over
        return [float(weight.size) if n in dense else scale * self._sides(weight) for n, weight in enumerate(weights)]

    def _sides(self, weight: Weight) -> int:
        return sum(weight.shape if self.kernel else weight.shape[:2])


@final
@dataclass(frozen=True)
class PerType(Scope):
    """A fraction for each kind of layer; ``Prune.sparsity`` is not given with it.

    The defaults are careful ones: convolutions share their few weights over all positions and bear less, linear layers
    bear more, and of anything else (embeddings, recurrent layers, attention's packed projections) little is known.
    Raises InputError for fractions outside [0, 1).
    """

    convolution: float = 0.6
    linear: float = 0.8
    other: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("convolution", "linear", "other"):
            if not 0 <= (got := getattr(self, name)) < 1:
                raise InputError("not a fraction", where=f"PerType.{name}", got=got, expected="[0, 1)")

    def zeros(self, weights: Sequence[Weight], units: Sequence[Tensor], sparsity: float) -> list[int]:
        """One count for each weight, by its kind; neither scores nor ``sparsity`` are read."""
        return [masks.count(self.of(weight), scores.numel()) for weight, scores in zip(weights, units, strict=True)]

    def of(self, weight: Weight) -> float:
        """The fraction that is asked of a weight."""
        return {"convolution": self.convolution, "linear": self.linear, "other": self.other}[weight.kind]

    def part(self, way: float) -> PerType:
        """The same fractions, ``way`` (0 … 1) of each."""
        return PerType(way * self.convolution, way * self.linear, way * self.other)
