"""Groups of channels that can only go together: connected components of atoms, resolved once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from tersor.core.place import TensorPlace
from tersor.graph.flow import Atoms, Flow, Role
from tersor.graph.group import CoupledAxis, Group, Groups, SizeAttribute
from tersor.graph.rules import follow
from tersor.graph.trace import Graph

_Axis = tuple[TensorPlace, int, Atoms, Role]


def find_groups(graph: Graph, model: nn.Module) -> Groups:
    """Which axes of which tensors of ``model`` move together, by walking its graph once. Reads no tensor's values.

    A unit is a connected component of atoms; the units that the same tensors hold, and that the same reason freezes,
    are a group.
    """
    flow = Flow(graph, model)
    for call in graph.calls:
        flow.put(call.name, follow(call, flow))
    for name in graph.outputs:
        for axis in flow.everything(name):
            flow.freeze(axis, "reaches the model's output")
    return _collect(flow)


def _collect(flow: Flow) -> Groups:
    labels = _components(flow)
    axes: list[_Axis] = [
        (place, dim, flow.tensors[place][dim], role) for (place, dim), roles in flow.roles.items() for role in roles
    ]
    for place, dims in flow.tensors.items():
        axes += [(place, dim, atoms, "bystander") for dim, atoms in enumerate(dims) if (place, dim) not in flow.roles]
    sorting = _sort(labels, axes, _first_reasons(flow, labels))
    drafts = [_Draft(reason) for reason in sorting.reasons]
    for place, dim, atoms, role in axes:
        for number, positions, units in sorting.parts(labels[atoms]):
            drafts[number].axes.append(CoupledAxis(place, dim, role, len(atoms), positions, units))
    seen: set[tuple[str, str]] = set()
    for module, name, atoms in flow.attributes:
        if (module, name) not in seen:  # a module that is called twice
            seen.add((module, name))
            for number, _, units in sorting.parts(labels[atoms]):
                drafts[number].attributes.append(SizeAttribute(module, name, len(atoms), units))
    for atoms, where in flow.literals:
        for number in np.unique(sorting.group_of[labels[atoms]]):
            if number >= 0:
                drafts[number].literals.setdefault(where)
    texts = [reason for _, reason in flow.frozen]
    return Groups(tuple(draft.finish(texts) for draft in drafts), flow.unread())


def _components(flow: Flow) -> NDArray[np.int64]:
    """atom → number of its connected component."""
    pairs = [np.stack([first, second]) for first, second in flow.ties]
    rows, columns = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), dtype=np.int64)
    edges = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(flow.count, flow.count))
    return connected_components(edges, directed=False)[1].astype(np.int64)


def _first_reasons(flow: Flow, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """component → index of the first entry of ``flow.frozen`` that freezes it, −1 where none does."""
    found = np.full(len(labels), len(flow.frozen), dtype=np.int64)
    for number, (atoms, _) in enumerate(flow.frozen):
        np.minimum.at(found, labels[atoms], number)
    return np.where(found == len(flow.frozen), -1, found)


@dataclass(frozen=True, eq=False)
class _Sorting:
    """component → its group (−1: no producer) and its unit there; group → index of its reason (−1: free)."""

    group_of: NDArray[np.int64]
    unit_of: NDArray[np.int64]
    reasons: tuple[int, ...]

    def parts(self, labels: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """An axis, as components, split by group: (group, positions, units)."""
        groups = self.group_of[labels]
        found = []
        for number in np.unique(groups[groups >= 0]):
            positions = np.flatnonzero(groups == number)
            found.append((int(number), positions, self.unit_of[labels[positions]]))
        return found


def _sort(labels: NDArray[np.int64], axes: list[_Axis], reasons: NDArray[np.int64]) -> _Sorting:
    """Components that have a producer, grouped by the set of axes that hold them and by what freezes them."""
    made = np.zeros(len(labels), dtype=bool)
    for _, _, atoms, role in axes:
        if role == "producer":
            made[labels[atoms]] = True
    holders: dict[int, list[int]] = {}
    for number, (_, _, atoms, _) in enumerate(axes):
        for label in np.unique(labels[atoms][made[labels[atoms]]]):
            holders.setdefault(int(label), []).append(number)
    group_of, unit_of = np.full(len(labels), -1, dtype=np.int64), np.full(len(labels), -1, dtype=np.int64)
    numbers: dict[tuple[tuple[int, ...], int], int] = {}
    counts: list[int] = []
    for label in _in_order(labels, axes):
        key = tuple(holders[label]), int(reasons[label])
        if key not in numbers:
            numbers[key] = len(counts)
            counts.append(0)
        group_of[label], unit_of[label] = numbers[key], counts[numbers[key]]
        counts[numbers[key]] += 1
    return _Sorting(group_of, unit_of, tuple(reason for _, reason in numbers))


def _in_order(labels: NDArray[np.int64], axes: list[_Axis]) -> list[int]:
    """The components with a producer, in the order in which the forward makes them."""
    made_labels = np.concatenate([labels[atoms] for _, _, atoms, role in axes if role == "producer"] or [labels[:0]])
    _, first = np.unique(made_labels, return_index=True)
    return [int(label) for label in made_labels[np.sort(first)]]


@dataclass(eq=False)
class _Draft:
    """A group while its axes are gathered."""

    reason: int
    axes: list[CoupledAxis] = field(default_factory=list)
    attributes: list[SizeAttribute] = field(default_factory=list)
    literals: dict[str, None] = field(default_factory=dict)

    def finish(self, reasons: list[str]) -> Group:
        main = next(axis for axis in self.axes if axis.role == "producer")
        return Group(
            name=main.place.module or str(main.place),
            units=int(main.units.max()) + 1,
            axes=tuple(self.axes),
            attributes=tuple(self.attributes),
            frozen=reasons[self.reason] if self.reason >= 0 else None,
            literals=tuple(self.literals),
        )
