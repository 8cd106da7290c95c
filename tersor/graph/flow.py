"""What rules work on: the axes of every value of a graph, and what is learnt about their atoms on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tersor.core.place import TensorPlace, module_at, tensor_at
from tersor.graph.trace import Call, Graph, Ref

Atoms = NDArray[np.int64]
Role = Literal["producer", "consumer", "bystander"]


@dataclass(frozen=True)
class Fixed:
    """An axis whose size cannot change, and why ("the model's input", "height and width")."""

    size: int
    reason: str


Axis = Atoms | Fixed
Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Many:
    """The axes of an operator's several results; where ``parts`` is None all are fixed for ``reason``."""

    parts: tuple[Axes, ...] | None
    reason: str = ""


class Refusal(Exception):
    """Raised by a rule that cannot prove what a call does: everything that flows through it is frozen."""


class Flow:
    """The atoms of a graph while its calls are walked.

    Every position of a tensor's axis carries an atom, an integer. Rules say which atoms are the same channel (``tie``),
    which may not go (``freeze``) and which pass an operator whose sizes may stand as literals in the user's code
    (``literal``). An axis is an array of atoms [size], or ``Fixed``.
    """

    def __init__(self, graph: Graph, model: nn.Module):
        self.graph, self.model = graph, model
        self.count = 0
        self.ties: list[tuple[Atoms, Atoms]] = []
        self.frozen: list[tuple[Atoms, str]] = []
        self.literals: list[tuple[Atoms, str]] = []
        self.attributes: list[tuple[str, str, Atoms]] = []
        self.tensors: dict[TensorPlace, tuple[Atoms, ...]] = {}
        self.roles: dict[tuple[TensorPlace, int], list[Role]] = {}
        self._aliases = _aliases(model)
        self._canonical: dict[str, TensorPlace] = {}
        self._values: dict[str, Axes | Many] = {}
        for name, shape in graph.inputs.items():
            self._values[name] = tuple(Fixed(size, "the model's input") for size in shape)
        for name, tensor in graph.constants.items():
            self._values[name] = tuple(Fixed(size, "a constant of the forward") for size in tensor.shape)

    def fresh(self, size: int) -> Atoms:
        """An axis of new atoms."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

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

    def put(self, name: str, value: Axes | Many) -> None:
        """Remember what a call gives."""
        self._values[name] = value

    def tensor(self, ref: str) -> TensorPlace:
        """The place of a parameter or buffer; tied ones have one place. Its axes get atoms at the first call."""
        if ref not in self._canonical:
            place = min(self._names_of(ref))
            self._canonical[ref] = place
            if place not in self.tensors:
                self.tensors[place] = tuple(self.fresh(size) for size in self.graph.shapes[ref])
        return self._canonical[ref]

    def _names_of(self, ref: str) -> list[TensorPlace]:
        return self._aliases[id(tensor_at(self.model, self.graph.tensors[ref]))]

    def weight(self, ref: Any) -> tuple[Atoms, ...]:
        """The axes of a parameter that an operator multiplies with. Refuses one that the forward computes."""
        if ref not in self.graph.tensors:
            raise Refusal("reads it with a weight that the forward computes")
        return self.tensors[self.tensor(ref)]

    # What rules learn --------------------------------------------------------------------------------------------

    def role(self, ref: Any, dim: int, role: Role) -> None:
        """What a parameter's dimension is to its channels; a tied one may both make and read them."""
        roles = self.roles.setdefault((self.tensor(ref), dim), [])
        if role not in roles:
            roles.append(role)

    def tie(self, first: Axis, second: Axis, call: Call) -> Axis:
        """The two axes are the same channels, position by position. Returns the one to go on with."""
        if isinstance(first, Fixed):
            self.freeze(second, f"meets {first.reason} at {call.place}")
            return second if isinstance(second, np.ndarray) else first
        if isinstance(second, Fixed):
            self.freeze(first, f"meets {second.reason} at {call.place}")
            return first
        if first is not second:
            self.ties.append((first, second))
        return first

    def freeze(self, axis: Axis, reason: str) -> None:
        """These atoms may not go. ``reason`` completes the sentence "is frozen: it …"."""
        if isinstance(axis, np.ndarray):
            self.frozen.append((axis, reason))

    def unread(self) -> tuple[str, ...]:
        """Modules that hold parameters of which no call was seen to read one."""
        read = {id(tensor_at(self.model, place)) for place in self.tensors}
        return tuple(
            path
            for path, module in self.model.named_modules()
            if module._parameters and all(id(p) not in read for p in module._parameters.values() if p is not None)
        )

    def literal(self, axis: Axis, call: Call) -> None:
        """The call's sizes may be literals in the user's code: removal here must be tried before it is promised."""
        if isinstance(axis, np.ndarray):
            self.literals.append((axis, f"{call.operator} at {call.module or '<model>'}"))

    def atoms_of(self, axis: Axis, reason: str) -> Atoms:
        """The axis as atoms; a fixed one gets frozen atoms, to stand beside others in a concatenation."""
        if isinstance(axis, np.ndarray):
            return axis
        atoms = self.fresh(axis.size)
        self.freeze(atoms, reason)
        return atoms

    def attribute(self, modules: Iterable[str], name: str, axis: Axis) -> None:
        """The attribute ``name`` of these modules is the size of this axis."""
        if isinstance(axis, np.ndarray):
            self.attributes.extend((module, name, axis) for module in modules)

    def owners(self, call: Call, ref: Any, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> tuple[str, ...]:
        """Paths of the modules of ``kind`` that make the call or hold its parameter ``ref`` under any name."""
        paths = [call.module]
        if ref in self.graph.tensors:
            paths += [place.module for place in self._names_of(ref)]
        return tuple(path for path in dict.fromkeys(paths) if isinstance(module_at(self.model, path), kind))

    def give_up(self, call: Call, reason: str) -> Axes | Many:
        """Freeze everything that the call reads; what it gives is fixed."""
        for ref in call.refs():
            for axis in self.everything(ref):
                self.freeze(axis, reason)
        if call.shape is None:
            return Many(None, f"what {call.place} gives")
        return fixed(call.shape, f"what {call.place} gives")


def _aliases(model: nn.Module) -> dict[int, list[TensorPlace]]:
    """Identity of a parameter or buffer → every place that holds it."""
    found: dict[int, list[TensorPlace]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                found.setdefault(id(tensor), []).append(TensorPlace(path, name))
    return found


def fixed(shape: Iterable[int], reason: str) -> Axes:
    """Axes of ``shape`` that cannot shrink."""
    return tuple(Fixed(size, reason) for size in shape)


def size_of(axis: Axis) -> int:
    """How many positions an axis has."""
    return len(axis) if isinstance(axis, np.ndarray) else axis.size


def argument(call: Call, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by position or by name."""
    if index < len(call.args):
        return call.args[index]
    return call.kwargs.get(name, default)


def tensors_in(value: Any) -> list[Ref]:
    """The names in an argument, nested ones too, in order."""
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, (tuple, list)):
        return [ref for item in value for ref in tensors_in(item)]
    return []
