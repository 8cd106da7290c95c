"""Structured pruning: whole channels go, with everything that makes and reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.place import Everything, Selector, TensorPlace, select
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.graph.cost import Cost, resolutions
from tersor.graph.group import Group, Groups, removal
from tersor.graph.groups import groups_of
from tersor.graph.reference import reference
from tersor.prune.structured.amount import Bloc, Budget, Choice, Keep, Scope, bloc, choose
from tersor.prune.structured.eligible import check_plain, explicit, makers, open_groups
from tersor.prune.structured.scores import Magnitude, Random, Score
from tersor.prune.structured.trial import culprits

Heads = Literal["whole", "inside"]
_Identity = tuple[frozenset[tuple[TensorPlace, int]], int]
_UNREAD = "the forward in eval mode does not use it: it stays as it is, and may not fit what training feeds it"


@dataclass(frozen=True)
class PruneChannels(Method):
    """Remove the least important channels of every group of coupled layers.

    Args:
        sparsity: fraction of channels removed, in [0, 1); 0.5 unless ``keep`` is given. Or a mapping of patterns of
            layer names to fractions: the first that matches; groups that none matches stay.
        score: what ranks channels.
        where: modules whose channels may go; a group goes only if all layers that make it are meant.
        multiple_of: kept counts are rounded up to this, at any cost. None: counts are multiples of 8 where that is near
            and all together stay within 2 % of what was asked; elsewhere the plan's line says why not.
        minimum: kept channels of each group, at least. One unit always stays.
        scope: what competes with what. "layer": the same fraction everywhere; "stage": groups that work at the same
            resolution compete; "global": all do.
        max_sparsity: where groups compete or ``keep`` is solved, at most this fraction of any one group.
        keep: in place of ``sparsity``, what is to be left in MACs, parameters or bytes, solved to within 2 %.
        heads: attention loses "whole" heads, or equally many channels "inside" each.
        relative_to: "given": amounts are fractions of the model given; "original": of the task's model, so that what
            earlier rounds removed counts.

    Raises InputError where a setting is out of range, ``where`` or a pattern matches nothing, ``keep`` cannot be met,
    a pattern means frozen layers only, or masks or quantisers stand on the model; GraphError where its graph cannot be
    captured.

    Source: Li et al. 2017 (arXiv 1608.08710); Molchanov et al. 2019 (arXiv 1906.10771). The coupling of layers is found
    from the operators' meaning, position by position (see docs/cards/prune-channels.md).
    """

    sparsity: float | Mapping[str, float] | None = None
    score: Score = field(default_factory=Magnitude)
    where: Selector = field(default_factory=Everything)
    multiple_of: int | None = None
    minimum: int = 1
    scope: Scope = "layer"
    max_sparsity: float = 0.9
    keep: Keep | None = None
    heads: Heads = "whole"
    relative_to: Literal["given", "original"] = "given"

    def __post_init__(self) -> None:
        if self.sparsity is None and self.keep is None:
            object.__setattr__(self, "sparsity", 0.5)
        _check_settings(self)

    def plan(self, model: nn.Module, task: Task) -> Plan:
        if task.example_inputs is None:
            raise InputError("the task has no example inputs", where="PruneChannels", do="Pass task.complete()")
        check_plain(model)
        if any(parameter.is_meta for parameter in model.parameters()) and not isinstance(self.score, Random):
            raise InputError(
                "a model on the meta device has no weights to score", where="PruneChannels.score", got=self.score,
                expected="Random()", do="Plan with score=Random(): counts and costs do not depend on it",
            )  # fmt: skip
        chosen = select(model, self.where)
        whole = _Whole.of(model, task, self.heads)
        skips = [Skip(path, _UNREAD) for path in whole.found.unread if path in chosen]
        classes = open_groups(whole.groups, chosen, skips)
        given = self.relative_to == "given" or model is task.model
        original = whole if given else _Whole.of(task.model, task, self.heads)
        budget = self._budget(whole, original)
        blocs, asked = self._blocs(model, task, classes, whole, original)
        while True:
            choice = choose(blocs, asked, self.scope, self.multiple_of, budget)
            faulty = culprits(model, task, whole.found, choice.kept(), skips)
            if not faulty:
                break
            asked = [value for number, value in enumerate(asked) if number not in faulty]
            blocs = [member for number, member in enumerate(blocs) if number not in faulty]
        skips += [Skip(group.name, self._why_whole(group)) for group in choice.untouched()]
        kept = {group: units for part in choice.kept() for group, units in part.items()}
        lines = tuple(_lines(choice, budget))
        masked = reference(whole.found, model, kept)
        return Plan("prune channels", removal(kept), tuple(skips), lines, reference=masked)

    def _blocs(
        self, model: nn.Module, task: Task, classes: Sequence[tuple[Group, ...]], whole: _Whole, original: _Whole
    ) -> tuple[list[Bloc], list[float]]:
        """What is chosen from, and the sparsity that is asked of each (0 where ``keep`` is solved)."""
        if isinstance(self.sparsity, Mapping):
            wanted = explicit(self.sparsity, whole.groups, classes)
        else:
            wanted = [self.sparsity or 0.0] * len(classes)
        meant = [(members, value) for members, value in zip(classes, wanted, strict=True) if value is not None]
        flat = [group for members, _ in meant for group in members]
        scores = dict(zip(flat, self.score.units(model, task, flat), strict=True)) if flat else {}
        stages = (
            dict(zip(flat, resolutions(whole.found.graph, model, flat), strict=True)) if self.scope == "stage" else {}
        )
        before = original.units_of(whole, flat)
        limit = self.max_sparsity if self.scope != "layer" or self.keep is not None else None
        blocs = [
            bloc(
                members, [scores[group].numpy() for group in members], before=before[members[0]],
                stage=stages.get(members[0], 0), minimum=self.minimum, max_sparsity=limit,
            )
            for members, _ in meant
        ]  # fmt: skip
        return blocs, [value for _, value in meant]

    def _budget(self, whole: _Whole, original: _Whole) -> Budget | None:
        if self.keep is None:
            return None
        cost = whole.cost()
        return Budget(self.keep, cost, self.keep.of(cost if original is whole else original.cost())({}))

    def _why_whole(self, group: Group) -> str:
        if group.units == 1:
            return f"its {group.channels} channels can only go all together"
        amount = f"{self.keep}" if self.keep else f"sparsity {self.sparsity}"
        rounding = f"multiple_of {self.multiple_of}, " if self.multiple_of else ""
        return (
            f"{group.channels} channels in {group.units} units: {amount} with {rounding}minimum {self.minimum} and "
            f"scope {self.scope!r} keeps them all"
        )


@dataclass(frozen=True, eq=False)
class _Whole:
    """A model with its graph and its groups, frozen where they may not go."""

    model: nn.Module
    found: Groups
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, model: nn.Module, task: Task, heads: Heads) -> _Whole:
        found = groups_of(model, task.demand_example(), task.sole_output)
        return cls(model, found, found.prunable(heads))

    def cost(self) -> Cost:
        """The cost of the model as a function of what its groups keep."""
        return Cost(self.found, self.model, self.groups)

    def units_of(self, pruned: _Whole, meant: Sequence[Group]) -> dict[Group, int]:
        """How many units the groups that are ``meant`` of ``pruned``, this model after pruning, have here.

        Raises InputError where there is no such group.
        """
        if pruned is self:
            return {group: group.units for group in meant}
        numbered = dict(zip(pruned.groups, _identities(pruned.groups), strict=True))
        groups = {group: numbered[group] for group in meant}
        own = dict(zip(_identities(self.groups), (group.units for group in self.groups), strict=True))
        for group, identity in groups.items():
            if own.get(identity, 0) < group.units:
                raise InputError(
                    "the task's model has no such channels to relate to", where=group.name,
                    got=f"{group.units} units here, {own.get(identity, 'none')} there",
                    expected="a model that was pruned from the task's own", do='Use relative_to="given"',
                )  # fmt: skip
        return {group: own[identity] for group, identity in groups.items()}


def _identities(groups: Sequence[Group]) -> list[_Identity]:
    """What each group and the same group after pruning have in common: the axes, and how many such came before."""
    seen: Counter[frozenset[tuple[TensorPlace, int]]] = Counter()
    found = []
    for group in groups:
        axes = frozenset((axis.place, axis.dim) for axis in group.axes)
        found.append((axes, seen[axes]))
        seen[axes] += 1
    return found


def _check_settings(method: PruneChannels) -> None:
    fractions = {"max_sparsity": method.max_sparsity}
    if isinstance(method.sparsity, Mapping):
        fractions |= {f"sparsity[{pattern!r}]": value for pattern, value in method.sparsity.items()}
    elif method.sparsity is not None:
        fractions["sparsity"] = method.sparsity
    for name, got in fractions.items():
        if isinstance(got, bool) or not isinstance(got, (int, float)) or not 0 <= got < 1:
            raise InputError("not a fraction", where=f"PruneChannels.{name}", got=repr(got), expected="[0, 1)")
    for name, count in {"multiple_of": method.multiple_of, "minimum": method.minimum}.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise InputError("out of range", where=f"PruneChannels.{name}", got=repr(count), expected="1 or more")
    check_fields(method)
    choices = {"scope": ("layer", "stage", "global"), "heads": ("whole", "inside")}
    choices["relative_to"] = ("given", "original")
    for name, allowed in choices.items():
        if (value := getattr(method, name)) not in allowed:
            expected = " or ".join(allowed)
            raise InputError(f"unknown {name}", where=f"PruneChannels.{name}", got=value, expected=expected)
    if method.sparsity is not None and method.keep is not None:
        raise InputError(
            "both say how much goes", where="PruneChannels", got=f"sparsity {method.sparsity} and {method.keep}",
            expected="one of sparsity and keep",
        )  # fmt: skip
    if isinstance(method.sparsity, Mapping) and method.scope != "layer":
        raise InputError(
            "fractions given by name leave nothing to compete for", where="PruneChannels.scope", got=method.scope,
            expected="layer",
        )  # fmt: skip


def _lines(choice: Choice, budget: Budget | None) -> Iterator[tuple[str, str]]:
    for part, remark in zip(choice.kept(), choice.remarks, strict=True):
        for group, units in part.items():
            text = _line(group, units)
            yield group.name, f"{text}; {remark}" if remark else text
    if budget is not None:
        left = budget.text(budget.left(choice.blocs)(choice.levels))
        yield "<model>", f"keeps {left}; asked for {budget.target / budget.whole:.4g}"


def _line(group: Group, kept: NDArray[np.bool_]) -> str:
    first = group.producers[0]
    left = int(kept[first.units].sum())
    others = [maker for maker in makers(group) if maker != first.place.module]
    text = f"{len(first.units)} -> {left} of out channels"
    if group.kind in ("head", "group"):
        text += f" ({group.units} -> {int(kept.sum())} {group.kind}s)"
    return f"{text}, with {', '.join(others)}" if others else text
