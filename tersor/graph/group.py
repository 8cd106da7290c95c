"""A group of channels that can only go together, and the edits that remove some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tersor.core.edit import Attribute, Cut, Edit, Slice
from tersor.core.errors import GraphError
from tersor.core.place import TensorPlace
from tersor.graph.axis import Axis, Leaf
from tersor.graph.equations import Polynomial, Tie
from tersor.graph.flow import Read, Role
from tersor.graph.trace import Graph

Kind = Literal["channel", "head", "inside", "group"]


@dataclass(frozen=True, eq=False)
class CoupledAxis:
    """The positions of dimension ``dim`` of a tensor that belong to a group: ``positions[i]`` goes with unit
    ``units[i]``. ``size``: of the whole dimension, which may belong to several groups (after a concatenation, or heads
    × head size)."""

    place: TensorPlace
    dim: int
    role: Role
    size: int
    positions: NDArray[np.int64]
    units: NDArray[np.int64]

    def __str__(self) -> str:
        return f"{self.place}[{self.dim}]"


@dataclass(frozen=True, eq=False)
class SizeAttribute:
    """A module's attribute that holds a size; ``name`` may lead through a config. ``value``: what it is now (a tuple
    where ``index`` says which of its entries); ``size``: what it will be."""

    module: str
    name: str
    index: int | None
    value: Any
    size: Polynomial

    def __str__(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass(frozen=True, eq=False)
class Group:
    """Units of channels that the same tensors hold. A unit is what can only be removed at once.

    ``name``: path of the module that makes the channels (the first of them), with the range where it makes others too.
    ``kind``: "channel", "head" (whole heads, or key-value heads with their query heads), "inside" (dimensions inside
    heads or groups, of all alike), "group" (whole groups of a grouped operator). ``frozen``: why none may go, or None.
    ``share``: groups with the same number keep exactly the same share of their units, since the forward ties their
    sizes (embedding width = heads × head size); set by ``Groups.prunable``.
    """

    name: str
    kind: Kind
    units: int
    axes: tuple[CoupledAxis, ...]
    attributes: tuple[SizeAttribute, ...]
    frozen: str | None
    leaf: Leaf
    share: int | None = None

    def with_role(self, role: Role) -> tuple[CoupledAxis, ...]:
        """The axes of that role, in the order in which the forward meets them."""
        return tuple(axis for axis in self.axes if axis.role == role)

    @property
    def producers(self) -> tuple[CoupledAxis, ...]:
        """The axes that make the channels."""
        return self.with_role("producer")

    @property
    def channels(self) -> int:
        """How many channels of the first producer the group is."""
        return len(self.producers[0].positions) if self.producers else 0

    def __str__(self) -> str:
        makers = list(dict.fromkeys(axis.place.module or str(axis.place) for axis in self.producers))
        count = f"{self.channels} channels"
        if self.units != self.channels:
            count += f" in {self.units} {'heads' if self.kind == 'head' else 'units'}"
        with_ = f", together with {_list(makers[1:])}" if len(makers) > 1 else ""
        if self.frozen is not None:
            return f"{self.name}: {count}{with_}; frozen: {self.frozen}"
        readers = list(dict.fromkeys(axis.place.module or str(axis.place) for axis in self.with_role("consumer")))
        return f"{self.name}: {count}{with_}; read by {_list(readers) or 'nothing'}"


def _list(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass(frozen=True, eq=False)
class Groups:
    """All groups of a model that something makes, in the order of the forward.

    ``unread``: modules with parameters that the captured forward never reads (heads that only training uses).
    ``unknown``: operators without a rule → how many calls. ``crossed``: leaf → leaves that own the same positions as
    another factor (heads and what is inside them). ``ties``: what the forward says of sizes. ``reads``: calls that sum
    or take statistics over channels. ``grouped``: calls of group norm → their groups. ``values``: calls, inputs,
    parameters and buffers → their axes.
    """

    groups: tuple[Group, ...]
    unread: tuple[str, ...]
    unknown: Mapping[str, int]
    crossed: Mapping[Leaf, frozenset[Leaf]]
    ties: tuple[Tie, ...]
    reads: tuple[Read, ...]
    grouped: Mapping[str, Axis]
    values: Mapping[str, tuple[Axis, ...]]
    graph: Graph

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def describe(self) -> list[str]:
        """A line for each group: its channels, what else makes them, who reads them, or why they are frozen. Then what
        sizes hang together, and what is not followed."""
        lines = [str(group) for group in self.groups]
        lines += dict.fromkeys(line for line in map(self._tie, self.ties) if line)
        if self.unknown:
            calls = ", ".join(f"{name} ({count})" for name, count in sorted(self.unknown.items()))
            lines.append(f"operators without a rule, which freeze what they read: {calls}")
        if self.unread:
            lines.append(f"not used by the forward: {_list(list(self.unread))}")
        return lines

    def _tie(self, tie: Tie) -> str:
        """A tie in words: "embed = attn.qkv:heads × attn.qkv:inside", or "" where it is about no group."""
        names = {group.leaf: group.name for group in self.groups}
        if not all(leaf in names for leaf in tie.powers):
            return ""
        above = [names[leaf] for leaf, power in tie.powers.items() for _ in range(power)]
        below = [names[leaf] for leaf, power in tie.powers.items() for _ in range(-power)]
        left, right = sorted((above, below), key=len)
        return f"sizes hang together: {' × '.join(left) or '1'} ~ {' × '.join(sorted(right))}"

    def prunable(self, heads: Literal["whole", "inside"] = "whole") -> tuple[Group, ...]:
        """The groups that may be pruned in one call, each with its ``share``, and those that are frozen for a reason.

        Of groups that own the same positions one is left: whole heads, or what is inside heads; inside grouped
        convolutions rather than whole groups.
        """
        order = _PREFERENCE[heads]
        chosen: dict[Leaf, Group] = {}
        reasons: dict[Leaf, str] = {}
        for group in sorted(self.groups, key=lambda group: order[group.kind]):
            crosses = any(leaf in chosen for leaf in self.crossed.get(group.leaf, ()))
            if group.frozen is not None:
                reasons[group.leaf] = group.frozen
            elif group.units == 1:
                reasons[group.leaf] = f"its {group.channels} channels can only go all together"
            elif not crosses:
                chosen[group.leaf] = group
        shares = _shares(self.ties, chosen, reasons)
        return tuple(
            replace(group, share=shares.get(group.leaf), frozen=None)
            if group.leaf in chosen
            else replace(group, frozen=reasons[group.leaf])
            for group in self.groups
            if group.leaf in chosen or group.leaf in reasons
        )


_PREFERENCE: dict[str, dict[Kind, int]] = {
    "whole": {"head": 0, "channel": 1, "inside": 2, "group": 3},
    "inside": {"inside": 0, "channel": 1, "head": 2, "group": 3},
}


def _shares(ties: tuple[Tie, ...], chosen: dict[Leaf, Group], reasons: dict[Leaf, str]) -> dict[Leaf, int]:
    """Leaf → number of its class of equal shares. Leaves that a tie holds at their size leave ``chosen``."""
    while True:
        held = _held_by_a_tie(ties, chosen)
        if not held:
            break
        for leaf, reason in held.items():
            del chosen[leaf]
            reasons[leaf] = reason
    classes: dict[Leaf, Leaf] = {}

    def root(leaf: Leaf) -> Leaf:
        while classes.get(leaf, leaf) is not leaf:
            leaf = classes[leaf]
        return leaf

    for tie in ties:
        free = [leaf for leaf in tie.powers if leaf in chosen]
        for first, other in pairwise(free):
            classes.setdefault(root(first), root(first))
            classes[root(other)] = root(first)
    numbers: dict[Leaf, int] = {}
    return {leaf: numbers.setdefault(root(leaf), len(numbers)) for leaf in [*classes] if leaf in chosen}


def _held_by_a_tie(ties: tuple[Tie, ...], chosen: Mapping[Leaf, Group]) -> dict[Leaf, str]:
    found = {}
    for tie in ties:
        free = {leaf: power for leaf, power in tie.powers.items() if leaf in chosen}
        balanced = len(free) == 2 and sorted(free.values()) in ([-1, 1], [-2, 2])
        if free and not balanced:
            others = "sizes that cannot shrink" if len(free) == 1 else "several other sizes"
            found.update({leaf: f"its size is tied to {others} at {tie.where}" for leaf in free})
    return found


def removal(keep: Mapping[Group, NDArray[np.bool_]]) -> tuple[Edit, ...]:
    """The edits that remove all units of the groups but those kept (bool [units]): one Slice, then the attributes."""
    lost: dict[tuple[TensorPlace, int], NDArray[np.bool_]] = {}
    roles: dict[tuple[TensorPlace, int], Role] = {}
    sizes: dict[Leaf, int] = {}
    attributes: dict[tuple[str, str, int | None], SizeAttribute] = {}
    for group, kept in keep.items():
        if kept.all():
            continue
        sizes[group.leaf] = int(kept.sum())
        attributes.update({(item.module, item.name, item.index): item for item in group.attributes})
        for axis in group.axes:
            key = axis.place, axis.dim
            gone = lost.setdefault(key, np.zeros(axis.size, dtype=bool))
            gone[axis.positions[~kept[axis.units]]] = True
            if roles.get(key) != "consumer":  # a tied tensor that is both is masked as one that reads
                roles[key] = axis.role
    if not lost:
        return ()
    shared: dict[bytes, torch.Tensor] = {}  # equal index lists are one tensor: saved once
    cuts = []
    for (place, dim), gone in lost.items():
        indices = shared.setdefault(gone.tobytes(), torch.from_numpy(np.flatnonzero(~gone)))
        cuts.append(Cut(place, dim, indices, roles[place, dim]))
    return (Slice(tuple(cuts)), *_attributes(attributes.values(), sizes))


def _attributes(items: Any, sizes: Mapping[Leaf, int]) -> Iterator[Attribute]:
    values: dict[tuple[str, str], Any] = {}
    for item in items:
        size = _whole(item, item.size.value(sizes))
        if item.index is None:
            values[item.module, item.name] = size
        else:
            old = values.get((item.module, item.name), item.value)
            values[item.module, item.name] = type(old)((*old[: item.index], size, *old[item.index + 1 :]))
    for (module, name), value in values.items():
        yield Attribute(module, name, value)


def _whole(item: SizeAttribute, size: Fraction) -> int:
    if size.denominator != 1:
        raise GraphError("a size would not be a whole number", where=str(item), got=str(size))
    return int(size)
