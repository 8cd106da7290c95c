"""What rules work on: the axes of every value of a graph, and what is learnt about them on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from tersor.core.place import TensorPlace, module_at, tensor_at, tied_places
from tersor.graph.axis import Axis, Fixed, Leaf, freeze, leaves, resolve, size_of, unify
from tersor.graph.sizes import Held, Known, Said, Source, source_of
from tersor.graph.trace import Call, Graph, Ref

Role = Literal["producer", "consumer", "bystander"]
Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Many:
    """The axes of an operator's several results; where ``parts`` is None all are fixed for ``reason``."""

    parts: tuple[Axes, ...] | None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Read:
    """A call that sums over an axis of its argument, or takes statistics of it.

    Once positions are gone they must count as zero (``how="zero"``), or not count at all (``how="kept"``: the mean of a
    layer norm). Dimension ``dim`` of positional argument ``argument`` (einsum's operands count from 1) is meant.
    ``result``: the dimension of the result that the axis is, None where it vanishes.
    """

    call: str
    argument: int
    dim: int
    axis: Axis
    how: Literal["zero", "kept"]
    result: int | None = None


@dataclass(frozen=True, eq=False)
class Equation:
    """The forward needs ``axis`` to be as long as ``source`` says. ``where``: the call, for messages."""

    axis: Axis
    source: Source
    where: str


class Refusal(Exception):
    """Raised by a rule that cannot prove what a call does: everything that flows through it is frozen."""


class Flow:
    """The axes of a graph while its calls are walked.

    Rules say which axes are the same (``tie``), which may not shrink (``freeze``), which dimension of a parameter makes
    or reads channels (``role``), who sums over an axis (``reads``) and which sizes the forward states (``equations``).
    """

    def __init__(self, graph: Graph, model: nn.Module, beside: Flow | None = None):
        """``beside``: a flow of another graph of the same model, with whose parameters this one goes on."""
        self.graph, self.model = graph, model
        self.tensors: dict[TensorPlace, Axes] = {} if beside is None else beside.tensors
        self.roles: dict[tuple[TensorPlace, int], list[Role]] = {} if beside is None else beside.roles
        self.made: list[Axis] = [] if beside is None else beside.made
        self.reads: list[Read] = []
        self.equations: list[Equation] = []
        self.unknown: dict[str, int] = {}
        self.grouped: dict[str, Axis] = {}  # group norm → its groups
        self._aliases = tied_places(model)
        self._canonical: dict[str, TensorPlace] = {}
        self._values: dict[str, Axes | Many] = {}
        self._weights: set[str] = set()
        self._calls_of = _calls_of(graph)
        for name, shape in graph.inputs.items():
            self._values[name] = tuple(Fixed(size, "the model's input") for size in shape)
        for name, tensor in graph.constants.items():
            self._values[name] = tuple(Fixed(size, "a constant of the forward") for size in tensor.shape)

    # Values ------------------------------------------------------------------------------------------------------

    def axes(self, ref: Any) -> Axes:
        """The axes of a value that has one tensor: a call, an input, a constant, a parameter or a buffer."""
        if ref in self.graph.tensors:
            return self.tensors[self.tensor(ref)]
        value = self._values.get(ref)
        if not isinstance(value, tuple):
            raise Refusal(f"reads {ref}, which is no single tensor")
        return value

    def parts(self, ref: Any) -> Many:
        """The several results of the call ``ref``."""
        value = self._values.get(ref, ())
        return value if isinstance(value, Many) else Many((value,))

    def everything(self, ref: Any) -> list[Axis]:
        """All axes of a value, of several results too."""
        if ref in self.graph.tensors:
            return list(self.axes(ref))
        return [axis for axes in self.parts(ref).parts or () for axis in axes]

    def put(self, call: Call, value: Axes | Many) -> None:
        """Remember what a call gives."""
        self._values[call.name] = value
        refs = list(call.refs())
        if refs and all(self.is_weight(ref) or ref in self.graph.constants for ref in refs):
            self._weights.add(call.name)

    def values(self) -> dict[str, Axes]:
        """Everything that is one tensor: name → axes."""
        found = {name: axes for name, axes in self._values.items() if isinstance(axes, tuple)}
        return found | {name: self.axes(name) for name in self._canonical}

    def value(self, function: str | None, index: int | str) -> Axes | None:
        """The axes of what a torch function gave, as ``Dim`` names it; None where the graph no longer has it."""
        name = self.graph.values.get((function, index))
        if name is None:
            return None
        try:
            return self.axes(name)
        except Refusal:
            return None

    def tensor(self, ref: str) -> TensorPlace:
        """The place of a parameter or buffer; tied ones have one place. Its axes are leaves at the first call."""
        if ref not in self._canonical:
            place = min(self._names_of(ref))
            self._canonical[ref] = place
            if place not in self.tensors:
                self.tensors[place] = tuple(Leaf(size) for size in self.graph.shapes[ref])
        return self._canonical[ref]

    def _names_of(self, ref: str) -> tuple[TensorPlace, ...]:
        return self._aliases[id(tensor_at(self.model, self.graph.tensors[ref]))]

    def is_parameter(self, ref: Any) -> bool:
        """Whether a value is a parameter or buffer itself, not computed from one."""
        return ref in self.graph.tensors

    def said(self, call: Call, *names: str) -> tuple[str, Said] | None:
        """The torch function of one of these names that the forward called here, and what it was given.

        Functionalisation may take views anew later on, under another function's name: then it is the function of that
        name which read the same tensor.
        """
        name = call.function.rpartition(".")[2]
        if name in names and call.said is not None:
            return name, call.said
        return next((found for found in self._calls_of.get(call.args[0], ()) if found[0] in names), None)

    def is_weight(self, ref: Any) -> bool:
        """Whether a value is a parameter or buffer, or computed from such alone."""
        return self.is_parameter(ref) or ref in self._weights

    # What rules learn --------------------------------------------------------------------------------------------

    def role(self, ref: Any, dim: int, role: Role) -> None:
        """What a weight's dimension is to its channels; a tied one may both make and read them.

        Of a weight that the forward computes, what is made is noted: the parameters behind it are found at the end.
        """
        axis = self.axes(ref)[dim]
        if not self.is_parameter(ref):
            if role == "producer":
                self.made.append(axis)
            return
        roles = self.roles.setdefault((self.tensor(ref), dim % len(self.axes(ref))), [])
        if role not in roles:
            roles.append(role)

    def tie(self, first: Axis, second: Axis, call: Call) -> Axis:
        """The two axes are the same, position by position. Returns the one to go on with."""
        first, second = resolve(first), resolve(second)
        for one, other in ((first, second), (second, first)):
            if isinstance(other, Fixed) and not isinstance(one, Fixed):
                freeze(one, f"meets {other.reason} at {call.place}")
                return one
        if size_of(first) != size_of(second):
            raise Refusal(f"meets sizes {size_of(first)} and {size_of(second)}")
        unify(first, second, f"is cut in a way that does not fit at {call.place}")
        return first

    def freeze(self, axis: Axis, reason: str) -> None:
        """These channels may not go. ``reason`` completes the sentence "is frozen: it …"."""
        freeze(axis, reason)

    def freeze_space(self, call: Call, axes: Axes) -> None:
        """Height, width and the like do not shrink."""
        for axis in axes:
            self.freeze(axis, f"is height or width for {call.place}")

    def sums(self, call: Call, argument: int, dim: int, result: int | None = None) -> None:
        """The call sums over this dimension of an argument: removed positions are zero."""
        self._reads(call, argument, dim, "zero", result)

    def statistics(self, call: Call, argument: int, dim: int, result: int | None = None) -> None:
        """The call takes statistics over this dimension: removed positions do not count."""
        self._reads(call, argument, dim, "kept", result)

    def _reads(self, call: Call, argument: int, dim: int, how: Any, result: int | None) -> None:
        axes = self.axes(call.args[1][argument - 1] if call.operator == "einsum" else call.args[argument])
        if any(True for _ in leaves(axes[dim])):
            self.reads.append(Read(call.name, argument, dim % len(axes), axes[dim], how, result))

    def needs(self, axis: Axis, size: Any, call: Call) -> None:
        """The forward states the size of an axis: ``size`` is an int, a Size, or −1 for whatever it is."""
        if isinstance(size, int) and not isinstance(size, bool) and size != -1 and size == size_of(axis):
            self.equations.append(Equation(axis, source_of(size), str(call.place)))

    def attribute(self, modules: Iterable[str], name: str, axis: Axis) -> None:
        """The attribute ``name`` of these modules is the size of this axis."""
        for path in modules:
            value = vars(module_at(self.model, path)).get(name)
            if type(value) is int and value == size_of(axis):
                self.equations.append(Equation(axis, Held(path, name), path))

    def owners(self, call: Call, ref: Any, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> tuple[str, ...]:
        """Paths of the modules of ``kind`` that make the call or hold its parameter ``ref`` under any name."""
        paths = [call.module]
        if ref in self.graph.tensors:
            paths += [place.module for place in self._names_of(ref)]
        return tuple(path for path in dict.fromkeys(paths) if isinstance(module_at(self.model, path), kind))

    def unread(self) -> tuple[str, ...]:
        """Modules that hold parameters of which no call was seen to read one."""
        read = {id(tensor_at(self.model, place)) for place in self.tensors}
        held = {
            path: [id(parameter) for parameter in module._parameters.values() if parameter is not None]
            for path, module in self.model.named_modules()
        }
        return tuple(path for path, names in held.items() if names and read.isdisjoint(names))

    def give_up(self, call: Call, reason: str) -> Axes | Many:
        """Freeze everything that the call reads; what it gives is fixed."""
        for ref in call.refs():
            for axis in self.everything(ref):
                self.freeze(axis, reason)
        if call.shape is None:
            return Many(None, f"what {call.place} gives")
        return fixed(call.shape, f"what {call.place} gives")


def _calls_of(graph: Graph) -> dict[str, list[tuple[str, Said]]]:
    """Value → the torch functions that were called on it first, with what they were given."""
    found: dict[str, list[tuple[str, Said]]] = {}
    for key, said in graph.book.calls.items():
        first = said[0][0] if said[0] else None
        if isinstance(first, Known) and (first.function, first.index) in graph.values:
            name = graph.values[first.function, first.index]
            found.setdefault(name, []).append((key.rpartition(".")[2], said))
    return found


def fixed(shape: Iterable[int], reason: str) -> Axes:
    """Axes of ``shape`` that cannot shrink."""
    return tuple(Fixed(size, reason) for size in shape)


def argument(call: Call, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by position or by name."""
    if index < len(call.args):
        return call.args[index]
    return call.kwargs.get(name, default)


def stated(call: Call, index: int, name: str, default: Any = None) -> Any:
    """An argument as the forward gave it to the torch function, a Size where it has a source; ``index`` counts the
    function's own arguments. The graph's plain value says nothing about its source."""
    if call.said is None:
        return default
    args, kwargs = call.said
    return args[index] if index < len(args) else kwargs.get(name, default)


def tensors_in(value: Any) -> list[Ref]:
    """The names in an argument, nested ones too, in order."""
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, (tuple, list)):
        return [ref for item in value for ref in tensors_in(item)]
    return []
