"""Structured pruning: whole channels go, with everything that makes and reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.apply import apply
from tersor.core.errors import InputError, VerificationError
from tersor.core.intercept import Intercept
from tersor.core.place import Everything, Selector, select
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.core.verify import verify_edits
from tersor.graph.group import Group, removal
from tersor.graph.groups import find_groups
from tersor.graph.trace import trace
from tersor.prune.scores import Magnitude, Score

_UNREAD = "the forward in eval mode does not use it: it stays as it is, and may not fit what training feeds it"
Kept = dict[Group, NDArray[np.bool_]]


@dataclass(frozen=True)
class PruneChannels(Method):
    """Remove the least important channels of every group of coupled layers.

    Args:
        sparsity: fraction of channels removed, in [0, 1).
        score: what ranks channels.
        where: modules whose channels may go; a group goes only if all layers that make it are meant.
        multiple_of: kept counts are rounded up to this, which some kernels like.
        minimum: kept channels of each group, at least.
        scope: "layer" removes the same fraction everywhere; "global" lets all groups compete.
        max_sparsity: with "global", at most this fraction of any one group.

    Raises InputError where sparsity is out of range, ``where`` matches nothing, or masks or quantisers stand on the
    model; GraphError where its graph cannot be captured.

    Source: Li et al. 2017 (arXiv 1608.08710); Molchanov et al. 2019 (arXiv 1906.10771). The coupling of layers is found
    from the operators' meaning, position by position (see docs/cards/prune-channels.md).
    """

    sparsity: float = 0.5
    score: Score = field(default_factory=Magnitude)
    where: Selector = field(default_factory=Everything)
    multiple_of: int = 1
    minimum: int = 1
    scope: Literal["layer", "global"] = "layer"
    max_sparsity: float = 0.9

    def __post_init__(self) -> None:
        for name in ("sparsity", "max_sparsity"):
            if not 0 <= (got := getattr(self, name)) < 1:
                raise InputError("out of range", where=f"PruneChannels.{name}", got=got, expected="[0, 1)")
        for name in ("multiple_of", "minimum"):
            if (got := getattr(self, name)) < 1:
                raise InputError("out of range", where=f"PruneChannels.{name}", got=got, expected="1 or more")
        if self.scope not in ("layer", "global"):
            raise InputError("unknown scope", where="PruneChannels.scope", got=self.scope, expected="layer or global")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        if task.example_inputs is None:
            raise InputError("the task has no example inputs", where="PruneChannels", do="Pass task.complete()")
        _check_plain(model)
        chosen = select(model, self.where)
        assert task.example_inputs is not None
        groups = find_groups(trace(model, task.example_inputs), model)
        skips: list[Skip] = []
        skips += [Skip(path, _UNREAD) for path in groups.unread if path in chosen]
        open_groups = [group for group in groups if _is_open(group, chosen, skips)]
        scores = self.score.units(model, task, open_groups) if open_groups else []
        keep = self._choose(open_groups, scores, skips)
        keep = _that_the_forward_follows(model, task, keep, skips)
        lines = tuple(_line(group, kept) for group, kept in keep.items())
        return Plan("prune channels", removal(keep), tuple(skips), lines)

    def _choose(self, groups: Sequence[Group], scores: Sequence[Tensor], skips: list[Skip]) -> Kept:
        arrays = [score.numpy() for score in scores]
        counts = self._counts(groups, arrays)
        keep: Kept = {}
        for group, score, count in zip(groups, arrays, counts, strict=True):
            rounded = self._round_up(group, count)
            if rounded >= group.units:
                skips.append(Skip(group.name, self._why_whole(group, count)))
                continue
            kept = np.zeros(group.units, dtype=bool)
            kept[np.argsort(-score, kind="stable")[:rounded]] = True
            keep[group] = kept
        return keep

    def _counts(self, groups: Sequence[Group], scores: Sequence[NDArray[np.float64]]) -> list[int]:
        """Units that each group keeps, before rounding."""
        # Fractions of decimal numbers: 0.7 of 10 units is 7, not 6.999….
        if self.scope == "layer" or not groups:
            return [group.units - math.floor(Fraction(str(self.sparsity)) * group.units) for group in groups]
        least = [group.units - math.floor(Fraction(str(self.max_sparsity)) * group.units) for group in groups]
        # The best of each group stay whatever the others have; the rest compete.
        rivals = [np.sort(score)[: group.units - low] for group, score, low in zip(groups, scores, least, strict=True)]
        owner = np.repeat(np.arange(len(groups)), [len(rival) for rival in rivals])
        gone = math.floor(Fraction(str(self.sparsity)) * sum(group.units for group in groups))
        first_to_go = np.argsort(np.concatenate(rivals), kind="stable")[:gone]
        lost = np.bincount(owner[first_to_go], minlength=len(groups))
        return [group.units - int(count) for group, count in zip(groups, lost, strict=True)]

    def _round_up(self, group: Group, count: int) -> int:
        """The kept units, at least ``minimum`` channels of the first producer and a multiple of ``multiple_of``."""
        each = max(1, group.channels // group.units)
        step = self.multiple_of // math.gcd(self.multiple_of, each)
        count = max(count, -(-self.minimum // each), 1)
        return -(-count // step) * step

    def _why_whole(self, group: Group, count: int) -> str:
        if group.units == 1:
            return f"its {group.channels} channels can only go all together"
        return (
            f"{group.channels} channels in {group.units} units: sparsity {self.sparsity} keeps {count} units, "
            f"multiple_of {self.multiple_of} and minimum {self.minimum} make that all"
        )


def _check_plain(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module) or isinstance(module, Intercept):
            raise InputError(
                "channels cannot be removed under masks or quantisers", where=path or "<model>",
                got=f"a parametrization or an activation quantiser in a {type(module).__name__}",
                expected="a plain model",
                do="Prune channels first, then mask or quantise; bake or remove other parametrizations (weight norm)",
            )  # fmt: skip


def _is_open(group: Group, chosen: Mapping[str, nn.Module], skips: list[Skip]) -> bool:
    """Whether the group may be pruned; where it is meant and may not, the reason goes to ``skips``."""
    makers = list(dict.fromkeys(axis.place.module for axis in group.producers))
    meant = [maker for maker in makers if maker in chosen]
    if not meant:
        return False
    if group.frozen is not None:
        skips.append(Skip(group.name, f"{group.channels} channels are frozen: {group.frozen}"))
        return False
    if len(meant) < len(makers):
        others = ", ".join(maker for maker in makers if maker not in chosen)
        skips.append(Skip(meant[0], f"goes only together with {others}, which where= leaves out"))
        return False
    return True


def _that_the_forward_follows(model: nn.Module, task: Task, keep: Kept, skips: list[Skip]) -> Kept:
    """The choice without the groups whose removal the user's forward does not follow, found by trials on copies.

    A group that flows through no literal size and merely changes the numbers stays: that is a wrong rule, and ``run``
    raises on it.
    """
    if not keep or _objection(model, task, keep) is None:
        return keep
    for group in list(keep):
        objection = _objection(model, task, {group: keep[group]})
        if objection is None or not (group.literals or objection.__cause__):
            continue
        del keep[group]
        where = f"its size is a literal in the forward ({', '.join(group.literals[:3])})"
        skips.append(
            Skip(group.name, f"{where if group.literals else 'the forward fails without it'}: {objection.got}")
        )
    return keep


def _objection(model: nn.Module, task: Task, keep: Kept) -> VerificationError | None:
    plan = Plan("trial", removal(keep))
    try:
        verify_edits(model, apply(model, plan), plan, task)
    except VerificationError as error:
        return error
    return None


def _line(group: Group, kept: NDArray[np.bool_]) -> tuple[str, str]:
    first = group.producers[0]
    left = int(kept[first.units].sum())
    others = [axis.place.module for axis in group.producers[1:]]
    text = f"{len(first.units)} -> {left} of out channels"
    return group.name, f"{text}, with {', '.join(others)}" if others else text
