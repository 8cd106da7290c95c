"""Groups of channels that can only go together, found by walking a graph once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tersor.core.errors import GraphError
from tersor.core.place import TensorPlace
from tersor.graph.axis import Leaf, crossings, leaves, positions, size_of
from tersor.graph.equations import Solution, solve, whole_value
from tersor.graph.flow import Axes, Flow, Role
from tersor.graph.group import CoupledAxis, Group, Groups, Kind, SizeAttribute
from tersor.graph.rules import follow
from tersor.graph.trace import Graph, trace

OutputOf = Callable[[Any], Any] | None


def find_groups(graph: Graph, model: nn.Module, training: Graph | None = None, output_of: OutputOf = None) -> Groups:
    """Which axes of which tensors of ``model`` move together. Reads no tensor's values.

    A group is a leaf of the axes' algebra: channels that the same tensors hold and that go one by one. ``training``:
    the forward as it trains, where that uses modules which the forward in eval mode does not (auxiliary heads).
    ``output_of``: picks the output that may not shrink; None: none may.
    """
    flow = _walked(Flow(graph, model), output_of)
    flows = [flow] if training is None else [flow, _walked(Flow(training, model, beside=flow), None)]
    return _Collection(flow, model, solve(flows, model)).groups()


def groups_of(model: nn.Module, example_inputs: tuple[Any, ...], output_of: OutputOf = None) -> Groups:
    """Capture a model and find its groups; captured as it trains too where that uses more of its modules.

    ``output_of``: as in ``find_groups``.

    Raises GraphError where the model cannot be captured.
    """
    graph = trace(model, example_inputs)
    groups = find_groups(graph, model, output_of=output_of)
    if not groups.unread:
        return groups
    try:
        training = trace(model, example_inputs, training=True)
    except GraphError:  # what eval mode does not use stays as it is, and is named
        return groups
    return find_groups(graph, model, training, output_of)


def _walked(flow: Flow, output_of: OutputOf) -> Flow:
    for call in flow.graph.calls:
        flow.put(call, follow(call, flow))
    for name in flow.graph.outputs if output_of is None else flow.graph.outputs_of(output_of):
        for axis in flow.everything(name):
            flow.freeze(axis, "reaches the model's output")
    return flow


@dataclass
class _Draft:
    """A group while its axes are gathered."""

    axes: list[CoupledAxis] = field(default_factory=list)
    producer: CoupledAxis | None = None
    crossed: dict[Leaf, None] = field(default_factory=dict)


class _Collection:
    """Gathers what a flow learnt about each leaf."""

    def __init__(self, flow: Flow, model: nn.Module, solution: Solution):
        self.flow, self.model, self.solution = flow, model, solution
        self.attributes = _size_attributes(solution, model)
        self.drafts: dict[Leaf, _Draft] = {}
        self.made_at: dict[Leaf, int] = {}
        self.computed = {leaf for axis in flow.made for leaf in leaves(axis)}

    def groups(self) -> Groups:
        """All groups that something makes, in the order of the forward."""
        for (place, dim), roles in self.flow.roles.items():
            for role in roles:
                self._axis(place, dim, role)
        for place, axes in self.flow.tensors.items():
            for dim in range(len(axes)):
                if (place, dim) not in self.flow.roles:
                    self._axis(place, dim, self._role_of(axes, dim))
        groups = [self._group(leaf, draft) for leaf, draft in self.drafts.items() if self._counts(leaf, draft)]
        crossed = {leaf: frozenset(draft.crossed) for leaf, draft in self.drafts.items()}
        flow = self.flow
        return Groups(
            tuple(sorted(groups, key=self._order)), flow.unread(), dict(flow.unknown), crossed,
            tuple(self.solution.ties), tuple(flow.reads), dict(flow.grouped), flow.values(), flow.graph,
        )  # fmt: skip

    def _counts(self, leaf: Leaf, draft: _Draft) -> bool:
        """Whether the leaf is channels that something makes; not a frozen factor (query, key, value) of such."""
        return draft.producer is not None and not (
            leaf.frozen is not None and any(other.frozen is None for other in draft.crossed)
        )

    def _order(self, group: Group) -> int:
        return self.made_at[group.leaf]

    def _axis(self, place: TensorPlace, dim: int, role: Role) -> None:
        axis = self.flow.tensors[place][dim]
        for leaf, where, units in positions(axis):
            draft = self.drafts.setdefault(leaf, _Draft())
            draft.axes.append(CoupledAxis(place, dim, role, size_of(axis), where, units))
            if role == "producer" and draft.producer is None:
                draft.producer = draft.axes[-1]
                self.made_at[leaf] = len(self.made_at)
        for first, second in crossings(axis):
            self.drafts[first].crossed[second] = None
            self.drafts[second].crossed[first] = None

    def _role_of(self, axes: Axes, dim: int) -> Role:
        """What a dimension without a role of its own is: it makes channels where a weight computed from it does."""
        if len(axes) > 1 and any(leaf in self.computed for leaf in leaves(axes[dim])):
            return "producer"
        return "bystander"

    def _group(self, leaf: Leaf, draft: _Draft) -> Group:
        main = draft.producer
        assert main is not None
        kind: Kind = "group" if leaf.group and draft.crossed else "channel"
        if draft.crossed and kind == "channel":
            kind = "head" if leaf.head and not leaf.inner else "inside" if leaf.inner or leaf.head else "channel"
        if draft.crossed and any(other.group for other in draft.crossed) and kind != "group":
            kind = "inside"
        return Group(
            name=_name(main, kind if not any(other.group for other in draft.crossed) else "channel"),
            kind=kind,
            units=leaf.size,
            axes=tuple(draft.axes),
            attributes=self.attributes.get(leaf, ()),
            frozen=leaf.frozen,
            leaf=leaf,
        )


def _name(main: CoupledAxis, kind: Kind) -> str:
    name = main.place.module or str(main.place)
    first, last = int(main.positions.min()), int(main.positions.max()) + 1
    if len(main.positions) < main.size:
        name += f"[{first}:{last}]"
    return name + _SUFFIX[kind]


_SUFFIX: dict[Kind, str] = {"channel": "", "head": ":heads", "inside": ":inside", "group": ":groups"}


def _size_attributes(solution: Solution, model: nn.Module) -> dict[Leaf, tuple[SizeAttribute, ...]]:
    """Leaf → the attributes whose value its channels change."""
    found: dict[Leaf, dict[SizeAttribute, None]] = {}
    for held, size in solution.attributes.items():
        attribute = SizeAttribute(held.module, held.name, held.index, whole_value(model, held), size)
        for symbol in size.symbols():
            if isinstance(symbol, Leaf):
                found.setdefault(symbol, {})[attribute] = None
    return {leaf: tuple(attributes) for leaf, attributes in found.items()}
