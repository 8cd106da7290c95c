"""Unstructured, N:M, block and row sparsity: masks that hold weights at zero."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from tersor.core.check_fields import check_fields
from tersor.core.edit import Mask
from tersor.core.errors import InputError
from tersor.core.place import Everything, Selector, select
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.prune.sparse.elements.magnitude import WeightMagnitude
from tersor.prune.sparse.elements.score import WeightScore
from tersor.prune.sparse.patterns import NM, Element, Pattern
from tersor.prune.sparse.scopes import PerLayer, PerType, Scope
from tersor.prune.sparse.standing import share
from tersor.prune.sparse.weights import Weight, lifted, weights_of
from tersor.tensor import masks

_DEFAULT = 0.5


@dataclass(frozen=True)
class Prune(Method):
    """Hold the least important weights at zero: score × pattern × scope.

    Args:
        sparsity: fraction of a weight's numbers that are zero, in [0, 1), rounded down to whole units of the pattern;
            0.5 where neither it nor pattern or scope say. Zeros that stand already count. Or a mapping of patterns of
            names ("layer1.*", of the module or of the weight) to fractions: the first that matches; others stay.
        score: what ranks weights.
        pattern: which weights go together (``Element``, ``NM``, ``Block``, ``Rows``).
        scope: what competes with what (``PerLayer``, ``Global``, ``ErdosRenyi``, ``PerType``). In one shot
            ``ErdosRenyi()`` and ``Global()`` cost much less than the default (docs/cards/prune.md, with figures).
        where: modules whose weights may go: parameters of two or more axes, tied ones once.
        regrow: masks are replaced instead of merged: what is stored under the standing ones competes too.
        may_empty: a weight may lose all of its numbers; otherwise that is an error which names it.

    Raises InputError where a setting is out of range, ``where`` or a name matches nothing, weights or scores are not
    finite, or a weight would be empty.
    Source: Han et al. 2015 (arXiv 1506.02626); scores, patterns and scopes have their own.
    """

    sparsity: float | Mapping[str, float] | None = None
    score: WeightScore = field(default_factory=WeightMagnitude)
    pattern: Pattern = field(default_factory=Element)
    scope: Scope = field(default_factory=PerLayer)
    where: Selector = field(default_factory=Everything)
    regrow: bool = False
    may_empty: bool = False

    def __post_init__(self) -> None:
        _check_settings(self)

    def plan(self, model: nn.Module, task: Task) -> Plan:
        skips: list[Skip] = []
        asked = self._asked(model, skips)
        weights = list(asked)
        if not weights and not skips:
            skips.append(Skip("the model", "it has no weights"))
        units = self._units(model, task, weights)
        if isinstance(self.sparsity, Mapping):
            zeros = [masks.count(asked[w], scores.numel()) for w, scores in zip(weights, units, strict=True)]
        else:
            zeros = self.scope.zeros(weights, units, self._fraction())
        found: list[_Masked] = []
        for weight, scores, count in zip(weights, units, zeros, strict=True):
            keep = weight.turned(self.pattern.keep(scores, count, weight.shape)).contiguous()
            found.append(_Masked(weight, keep, self._target(weight, asked), self.regrow))
        self._expect_something_left(found)
        edits = tuple(masked.edit for masked in found if masked.changes)
        return Plan("prune", edits, tuple(skips), tuple(_lines(found, self._fraction())))

    def weights(self, model: nn.Module, skips: list[Skip] | None = None) -> list[Weight]:
        """The weights that would be masked, in the model's order; why others are not goes into ``skips``."""
        return list(self._asked(model, [] if skips is None else skips))

    def to(self, sparsity: float | Mapping[str, float] | None) -> Prune:
        """The same with this sparsity, or with its own where that is None. Raises InputError where both differ."""
        if sparsity is None or self.sparsity == sparsity:
            return self
        if self.sparsity is not None:
            raise InputError(
                "two sparsities are asked for", where="sparsity", got=f"{sparsity}, and {self.sparsity} in prune",
                expected="one of them",
            )  # fmt: skip
        return replace(self, sparsity=sparsity)

    def part(self, way: float) -> Prune:
        """The same, aiming only ``way`` (0 … 1) of the way from a dense model to its sparsity: a step of a schedule."""
        if isinstance(self.pattern, NM):
            return replace(self, pattern=self.pattern.part(way), sparsity=None)
        if isinstance(self.scope, PerType):
            return replace(self, scope=self.scope.part(way))
        if isinstance(self.sparsity, Mapping):
            return replace(self, sparsity={name: way * value for name, value in self.sparsity.items()})
        return replace(self, sparsity=way * self._fraction())

    def remaining(self, way: float) -> Prune:
        """The same, leaving (1 − sparsity)^way of the weights: equal steps of ``way`` take equal parts of what remains.

        N:M and fractions by type go by ``part``.
        """
        if isinstance(self.pattern, NM) or isinstance(self.scope, PerType):
            return self.part(way)
        if isinstance(self.sparsity, Mapping):
            return replace(self, sparsity={name: 1 - (1 - value) ** way for name, value in self.sparsity.items()})
        return replace(self, sparsity=1 - (1 - self._fraction()) ** way)

    def _fraction(self) -> float:
        """The one fraction that is asked; of a mapping or of fractions by type, none is."""
        if isinstance(self.sparsity, (int, float)):
            return self.sparsity
        return _DEFAULT if self.pattern.sparsity is None else self.pattern.sparsity

    def _target(self, weight: Weight, asked: Mapping[Weight, float]) -> float | None:
        """The fraction asked of one weight; None where only all of them together are asked for one."""
        if isinstance(self.sparsity, Mapping):
            return asked[weight]
        if isinstance(self.scope, PerType):
            return self.scope.of(weight)
        return self._fraction() if isinstance(self.scope, PerLayer) else None

    def _fits(self, weight: Weight, skips: list[Skip]) -> bool:
        reason = self.pattern.objection(weight.shape)
        if reason is not None:
            skips.append(Skip(str(weight.place), reason))
        return reason is None

    def _asked(self, model: nn.Module, skips: list[Skip]) -> dict[Weight, float]:
        """The weights that may be masked, with what names ask of each (0 where there are no names)."""
        found = weights_of(model, select(model, self.where), skips)
        weights = [weight for weight in found if self._fits(weight, skips)]
        if not isinstance(self.sparsity, Mapping):
            return dict.fromkeys(weights, 0.0)
        for pattern in self.sparsity:
            if not any(_matches(pattern, weight) for weight in weights):
                names = [str(weight.place) for weight in weights]
                near = difflib.get_close_matches(pattern, names, n=3) or names[:3]
                raise InputError(
                    "the name matches no weight that may be masked", where="Prune.sparsity", got=repr(pattern),
                    do=f"Nearest names: {', '.join(near)}" if near else "The model has no weight that may be masked",
                )  # fmt: skip
        asked = {}
        for weight in weights:
            first = next((value for pattern, value in self.sparsity.items() if _matches(pattern, weight)), None)
            if first is None:
                skips.append(Skip(str(weight.place), "no name in sparsity= matches it"))
            else:
                asked[weight] = first
        return asked

    def _units(self, model: nn.Module, task: Task, weights: Sequence[Weight]) -> list[Tensor]:
        """The scores of each weight's units; −∞ where a unit stands at zero already and may not come back."""
        ranked = lifted(model) if self.regrow else model
        elements = self.score.elements(ranked, task, [weight.place for weight in weights])
        found = []
        for weight, scores in zip(weights, elements, strict=True):
            _expect_comparable(weight, scores, self.score)
            units = self.pattern.units(weight.turned(scores))
            if weight.standing is not None and not self.regrow:
                standing = weight.turned(weight.standing)
                units = self.pattern.units(weight.turned(scores.masked_fill(~weight.standing, 0)))
                units = units.masked_fill(self.pattern.units(standing.float()) == 0, -torch.inf)
            found.append(units)
        return found

    def _expect_something_left(self, found: Sequence[_Masked]) -> None:
        empty = [str(masked.weight.place) for masked in found if masked.is_emptied]
        if empty and not self.may_empty:
            raise InputError(
                "the masks would leave nothing of a layer", where=", ".join(empty),
                got=f"{len(empty)} of {len(found)} weights all zero", expected="something left of each",
                do="Take scope=PerLayer() or ErdosRenyi(), leave it out with where=, or say may_empty=True",
            )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Masked:
    """A weight with its mask, as it will stand. ``asked``: the fraction of zeros, where this weight has its own."""

    weight: Weight
    chosen: Tensor
    asked: float | None
    regrow: bool

    @property
    def keep(self) -> Tensor:
        standing = self.weight.standing
        return self.chosen if standing is None or self.regrow else self.chosen & standing

    @property
    def zeros(self) -> int:
        return self.weight.size - int(self.keep.sum())

    @property
    def before(self) -> int:
        return 0 if self.weight.standing is None else self.weight.size - int(self.weight.standing.sum())

    @property
    def changes(self) -> bool:
        """Whether the mask is another one than what stands (where nothing stands, one without zeros is none)."""
        standing = self.weight.standing
        return self.zeros > 0 if standing is None else not torch.equal(self.keep, standing)

    @property
    def is_emptied(self) -> bool:
        return self.zeros == self.weight.size > self.before

    @property
    def edit(self) -> Mask:
        return Mask(self.weight.place, self.keep, merge=not self.regrow)


def _lines(found: Sequence[_Masked], fraction: float) -> Iterator[tuple[str, str]]:
    for masked in found:
        text = share(masked.zeros, masked.weight.size)
        text += "" if masked.asked is None else f"; asked for {masked.asked:.4%}"
        text += f"; {masked.before:,} before" if masked.before else ""
        yield str(masked.weight.place), text + ("; WARNING: nothing is left of it" if masked.is_emptied else "")
    if found:
        total = sum(masked.weight.size for masked in found)
        text = f"{share(sum(masked.zeros for masked in found), total)}, in {len(found)} weights"
        yield "<model>", text + (f"; asked for {fraction:.4%}" if all(m.asked is None for m in found) else "")


def _matches(pattern: str, weight: Weight) -> bool:
    return any(pattern == name or fnmatchcase(name, pattern) for name in (weight.place.module, str(weight.place)))


def _expect_comparable(weight: Weight, scores: Tensor, score: WeightScore) -> None:
    wrong = int(torch.isnan(scores).sum())
    if wrong:
        raise InputError(
            "scores that are no numbers cannot be compared", where=str(weight.place),
            got=f"{wrong:,} NaN of {weight.size:,} by {type(score).__name__}", expected="numbers",
            do="Look for overflow in the loss or its gradients, or take WeightMagnitude",
        )  # fmt: skip


def _check_settings(method: Prune) -> None:
    fractions: dict[str, object] = {}
    if isinstance(method.sparsity, Mapping):
        fractions |= {f"sparsity[{name!r}]": value for name, value in method.sparsity.items()}
    elif method.sparsity is not None:
        fractions["sparsity"] = method.sparsity
    for name, got in fractions.items():
        if isinstance(got, bool) or not isinstance(got, (int, float)) or not 0 <= got < 1:
            raise InputError("not a fraction", where=f"Prune.{name}", got=repr(got), expected="[0, 1)")
    check_fields(method)
    own = method.pattern.sparsity
    if own is not None and not (method.sparsity is None or method.sparsity == own):
        raise InputError(
            f"the pattern has a sparsity of its own: {own:g}", where="Prune.sparsity", got=method.sparsity,
            expected="None", do="Leave sparsity out, or take another pattern",
        )  # fmt: skip
    if own is not None and not isinstance(method.scope, PerLayer):
        raise InputError(
            "nothing competes under this pattern", where="Prune.scope", got=method.scope, expected="PerLayer()"
        )
    if method.sparsity is not None and isinstance(method.scope, PerType):
        raise InputError(
            "both say how much goes", where="Prune", got=f"sparsity {method.sparsity} and {method.scope}",
            expected="one of the two",
        )  # fmt: skip
    if isinstance(method.sparsity, Mapping) and not isinstance(method.scope, PerLayer):
        raise InputError(
            "fractions given by name leave nothing to compete for", where="Prune.scope", got=method.scope,
            expected="PerLayer()",
        )  # fmt: skip
