"""Equal ranges for all channels of a weight, by factors that the next layer takes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from tersor.core.check_fields import check_fields
from tersor.core.edit import Write
from tersor.core.errors import InputError
from tersor.core.place import Everything, Selector, TensorPlace, select
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.graph.trace import Graph, trace
from tersor.quantize.commuting import Pair, Touched, commuting, largest, scaled
from tersor.quantize.unquantized import quantizers
from tersor.quantize.weights import WEIGHTED, stored

_DEAD = 1e-6  # of a side's largest weight: such a channel does nothing, and any factor would do
_EQUAL = 1e-3  # factors so near to one are none


@final
@dataclass(frozen=True)
class Equalize(Method):
    """Give the channels between two layers like ranges in both weights; the function stays as it is.

    With r₁ᵢ the largest weight that makes channel i and r₂ᵢ the largest that reads it,

        fᵢ = √(r₂ᵢ / r₁ᵢ),   W₁ᵢ ← fᵢ · W₁ᵢ,   b₁ᵢ ← fᵢ · b₁ᵢ,   W₂ᵢ ← W₂ᵢ / fᵢ

    after which both are √(r₁ᵢ r₂ᵢ); over all pairs of layers, again until nothing moves. A weight with one scale then
    loses less in its small channels. Which layers are pairs: ``commuting``; batch norms must be folded before. What is
    read by several layers is held against the largest weight of all. Biases do not count for r. Channels whose weights
    are next to nothing on either side stay as they are; masks stay.

    Args:
        where: the layers that may be rescaled; a pair is where all of its layers are meant.
        sweeps: at most so many passes over all pairs.

    The plan preserves the function, which is verified when it runs. Raises InputError for ``sweeps`` < 1 and for a
    model that is quantised already. Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.1.2, equation 11.
    """

    where: Selector = field(default_factory=Everything)
    sweeps: int = 40

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sweeps < 1:
            raise InputError("too few", where="Equalize.sweeps", got=self.sweeps, expected="1 or more")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """A Write for each weight and bias between whose layers a factor wandered, and a line for each pair."""
        example = task.demand_example()
        if found := quantizers(model):
            raise InputError(
                "the model is quantised already", where=next(iter(found)), got=f"{len(found)} quantisers",
                do="Put Equalize() before quantisation",
            )  # fmt: skip
        pairs, skips = self._pairs(model, trace(model, example))
        values = {each.place: stored(model, each.place).double() for pair in pairs for each in _touched(pair)}
        before = [_precision(pair, values) for pair in pairs]
        factors = self._sweep(pairs, values)
        moved, lines = set(), []
        for pair, factor, precision in zip(pairs, factors, before, strict=True):
            if float(factor.log().abs().max()) <= _EQUAL:
                skips.append(Skip(str(pair.producer.place), "the ranges of its channels are equal already"))
                continue
            moved |= {each.place for each in _touched(pair)}
            lines.append((str(pair.producer.place), _line(factor, precision, _precision(pair, values))))
        edits = [Write(place, values[place].to(stored(model, place))) for place in values if place in moved]
        return Plan("Equalize", tuple(edits), tuple(skips), tuple(lines), preserves=True)

    def _pairs(self, model: nn.Module, graph: Graph) -> tuple[list[Pair], list[Skip]]:
        """The pairs of layers that are meant, and why others are none."""
        chosen = select(model, self.where)
        found, skips = commuting(model, graph)
        weighted = {str(call.place) for call in graph.calls if call.operator in WEIGHTED}
        skips = [skip for skip in skips if skip.place in weighted]
        pairs = []
        for pair in found:
            left_out = [path for path in pair.modules if path not in chosen]
            if str(pair.producer.place) in weighted and not left_out:
                pairs.append(pair)
            elif str(pair.producer.place) in weighted:
                skips.append(Skip(str(pair.producer.place), f"where leaves out {', '.join(left_out)}"))
        return pairs, skips

    def _sweep(self, pairs: list[Pair], values: dict[TensorPlace, Tensor]) -> list[Tensor]:
        """Equalise ``values`` pair by pair until nothing moves; the factors that each pair took in all."""
        factors = [torch.ones(pair.size, dtype=torch.float64) for pair in pairs]
        for _ in range(self.sweeps):
            most = 0.0
            for number, pair in enumerate(pairs):
                factor = _factor(*_ranges(pair, values))
                most = max(most, float(factor.log().abs().max()))
                for each in _touched(pair):
                    by = 1 / factor if each in pair.readers else factor
                    values[each.place] = scaled(values[each.place], each.channels, by)
                factors[number] = factors[number] * factor
            if most <= _EQUAL / 10:
                break
        return factors


def _touched(pair: Pair) -> tuple[Touched, ...]:
    return (*pair.weights, *pair.biases, *pair.readers)


def _ranges(pair: Pair, values: Mapping[TensorPlace, Tensor]) -> tuple[Tensor, Tensor]:
    """The largest weight that makes each channel, and the largest that reads it: both [size]."""
    made, read = (
        torch.stack([largest(values[each.place], each.channels, pair.size) for each in side]).amax(0)
        for side in (pair.weights, pair.readers)
    )
    return made, read


def _factor(made: Tensor, read: Tensor) -> Tensor:
    """√(r₂ / r₁) for each channel; 1 for dead ones."""
    alive = (made > _DEAD * made.max()) & (read > _DEAD * read.max())
    return torch.where(alive, (read / made).sqrt(), 1.0)


def _precision(pair: Pair, values: Mapping[TensorPlace, Tensor]) -> float:
    """The mean of r / max r over the channels on both sides: 1 where all channels use the whole range."""
    return float(torch.stack([r / r.max().clamp_min(1e-30) for r in _ranges(pair, values)]).mean())


def _line(factor: Tensor, before: float, after: float) -> str:
    return (
        f"{len(factor)} channels, factors from {float(factor.min()):.3g} to {float(factor.max()):.3g}; "
        f"a channel fills {before:.0%} -> {after:.0%} of its tensor's range on average"
    )
