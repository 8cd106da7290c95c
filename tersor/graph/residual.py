"""Residual branches: additions that give back what a block was given when the other operand is zero."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from tersor.core.place import tensor_at
from tersor.graph.trace import Call, Graph, Ref

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What gives its first argument back, value for value, in eval mode; the second kind where shape and type stay.
_SAME = frozenset({"alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "lift_fresh_copy"})
_SAME_IF_EQUAL = frozenset({"to", "to_copy", "type_as", "view", "reshape", "expand", "unsafe_view"})
# What gives zeros for zeros, whatever its other arguments.
_ZERO_FOR_ZERO = _SAME | _SAME_IF_EQUAL | {"permute", "transpose", "roll", "slice", "unsqueeze", "squeeze", "flatten"}
_RESHAPES = frozenset({"view", "reshape", "unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"})
_CLAMPS = frozenset({"relu", "hardtanh", "clamp", "clamp_min"})  # twice is as good as once
_PICKS = frozenset({"max_pool2d", "max_pool2d_with_indices", "max_pool1d", "max_pool3d", "adaptive_max_pool2d"})


@dataclass(frozen=True, eq=False)
class Branch:
    """A residual branch: ``add`` = ``start`` + ``value``, where ``value`` is computed from ``start`` (both are names).

    ``calls``: names of the calls that only this branch needs; without them ``add`` is ``start``. ``zeros``: calls whose
    result, were it zero, would make ``value`` zero; ``value`` first. ``modules``: paths of the topmost modules that
    make none but such calls, as they are called. ``container``: path of the smallest module that holds the addition
    and what leads to it from ``start``. ``weights``: elements of the parameters and buffers that the branch reads.
    """

    add: Call
    start: str
    value: str
    calls: frozenset[str]
    zeros: tuple[Call, ...]
    modules: tuple[str, ...]
    container: str
    weights: int


@dataclass(frozen=True)
class Unremovable:
    """A residual block that cannot go: ``place`` of the block (or of its addition), and why."""

    place: str
    reason: str


class Residuals:
    """The residual ``branches`` of a captured forward, in its order, and the residual blocks that are ``unremovable``.

    An addition ends a residual block where one operand is, through nothing but operators that pass values on (a cast to
    the same type, a dropout in eval mode), a value from which the other operand is computed with parameters. The branch
    can go where nobody else reads what it computes and no other call reads its parameters (tied weights).
    """

    def __init__(self, graph: Graph, model: nn.Module):
        self.graph = graph
        self.calls = _needed(graph)
        self.by_name = {call.name: call for call in self.calls}
        self._order = {call.name: number for number, call in enumerate(self.calls)}
        self._readers: dict[str, list[str]] = {name: ["the model's output"] for name in graph.outputs}
        self._identity = {ref: id(tensor_at(model, place)) for ref, place in graph.tensors.items()}
        self._tensor_readers: dict[int, set[str]] = {}
        for call in self.calls:
            for ref in dict.fromkeys(call.refs()):
                self._readers.setdefault(ref, []).append(call.name)
                if ref in self._identity:
                    self._tensor_readers.setdefault(self._identity[ref], set()).add(call.name)
        self._inside: dict[str, list[Call]] = {}
        for call in self.calls:
            for path in above(call.module):
                self._inside.setdefault(path, []).append(call)
        found = {call.name: self._at(call) for call in self.calls if call.operator == "add"}
        self.branches = tuple(branch for branch in found.values() if isinstance(branch, Branch))
        inside = {name for branch in self.branches for name in branch.calls}  # a sum in a branch goes with the branch
        self.unremovable = tuple(
            other for name, other in found.items() if isinstance(other, Unremovable) and name not in inside
        )

    def inside(self, module: str) -> tuple[Call, ...]:
        """The calls that ``module`` and what it holds make."""
        return tuple(self._inside.get(module, ()))

    def results(self, module: str) -> tuple[str, ...]:
        """The names that ``module`` makes and others read, or the model returns."""
        inner = {call.name for call in self.inside(module)}
        made = (call.name for call in self.inside(module))
        return tuple(name for name in made if any(reader not in inner for reader in self._readers[name]))

    def starts_from(self, module: str, start: str) -> bool:
        """Whether ``start`` is the one activation of its shape that ``module`` is given."""
        inner = self.inside(module)
        read = {self.root(ref) for call in inner for ref in call.refs()} - {call.name for call in inner}
        shape = self.graph.shapes[start]
        return {ref for ref in read - set(self._identity) if self.graph.shapes.get(ref) == shape} == {start}

    def readers(self, name: str) -> tuple[str, ...]:
        """The names of the calls that read ``name``; "the model's output" is one."""
        return tuple(self._readers.get(name, ()))

    def tied(self, calls: frozenset[str]) -> str:
        """Which tensor that ``calls`` read other calls read too, and which calls; "" where there is none."""
        ordered = sorted(calls, key=self._order.__getitem__)
        for ref in dict.fromkeys(ref for name in ordered for ref in self.by_name[name].refs() if ref in self._identity):
            others = self._tensor_readers[self._identity[ref]] - calls
            if others:
                return f"{self.graph.tensors[ref]} is read elsewhere too (tied): by {self._say(others)}"
        return ""

    def gives_back(self, module: str, branches: Iterable[Branch]) -> bool:
        """Whether ``module`` gives its input back, value for value, once these branches are zero.

        True where nothing is left in it but the branches' additions, operators that pass values on, reshapes there and
        back, and a ReLU or clamp of what came out of the same ReLU or clamp.
        """
        ends = {branch.add.name: branch for branch in branches}
        gone = {name for branch in ends.values() for name in branch.calls}
        left = [call for call in self.inside(module) if call.name not in gone]
        own = {call.name for call in left}
        start = next((branch.start for branch in ends.values()), "")
        while start in own and self.by_name[start].operator in _RESHAPES:
            start = _first(self.by_name[start])
        same = {start}
        for call in left:
            source = ends[call.name].start if call.name in ends else _first(call)
            known = call.name in ends or call.operator in _RESHAPES or self._passes(call)
            if source not in same or not (known or self._clamped_already(call, start)):
                return False
            same.add(call.name)
        shapes = {self.graph.shapes[name] for name in self.results(module)}
        return start not in own and shapes == {self.graph.shapes.get(start)}

    def root(self, ref: str) -> str:
        """The value that ``ref`` is, through operators that only pass it on."""
        while ref in self.by_name and self._passes(self.by_name[ref]):
            ref = _first(self.by_name[ref])
        return ref

    def _at(self, add: Call) -> Branch | Unremovable | None:
        """What the addition ends; None where it is no residual block's."""
        operands = [ref for ref in add.args[:2] if isinstance(ref, Ref)]
        if len(operands) != 2 or add.kwargs.get("alpha", 1) != 1:
            return None
        for shortcut, value in (operands, operands[::-1]):
            start = self.root(shortcut)
            if value in self.by_name and self.graph.shapes.get(start) == add.shape and self._leads(start, value):
                return self._branch(add, start, value)
        return self._projection(add, *operands)

    def _passes(self, call: Call) -> bool:
        source = _first(call)
        if call.operator in _SAME_IF_EQUAL:
            before = self.by_name.get(source)
            return call.shape == self.graph.shapes.get(source) and (before is None or before.dtype == call.dtype)
        return bool(source) and call.operator in _SAME

    def _clamped_already(self, call: Call, start: str) -> bool:
        """Whether ``call`` clamps what ``start`` was clamped to in the same way: relu(relu(x)) is relu(x)."""
        while start in self.by_name and (self._passes(self.by_name[start]) or self.by_name[start].operator in _PICKS):
            start = _first(self.by_name[start])
        before = self.by_name.get(start)
        if before is None or call.operator not in _CLAMPS:
            return False
        return (call.operator, call.args[1:], call.kwargs) == (before.operator, before.args[1:], before.kwargs)

    def _leads(self, start: str, value: str) -> bool:
        """Whether ``value`` is computed from ``start``: looked for among the calls after it only."""
        first = self._order.get(start, -1)
        seen, waiting = {value}, [value]
        while waiting:
            for ref in self.by_name[waiting.pop()].refs():
                if ref == start:
                    return True
                if self._order.get(ref, -1) > first and ref not in seen:
                    seen.add(ref)
                    waiting.append(ref)
        return False

    def _only_for(self, value: str, reader: str) -> frozenset[str]:
        """The calls that nobody would need if ``reader`` did not read ``value``; empty where others read it."""
        if value not in self.by_name or self._readers[value] != [reader]:
            return frozenset()
        found, met, waiting = {value}, Counter[str](), [value]
        while waiting:
            for ref in dict.fromkeys(self.by_name[waiting.pop()].refs()):
                if ref in self.by_name:
                    met[ref] += 1
                    if met[ref] == len(self._readers[ref]):
                        found.add(ref)
                        waiting.append(ref)
        return frozenset(found)

    def _branch(self, add: Call, start: str, value: str) -> Branch | Unremovable | None:
        calls = self._only_for(value, add.name)
        container = common_module([add.module, *self._way(start, calls or {value})])
        where = container or str(add.place)
        if not calls:
            others = self._say(name for name in self._readers[value] if name != add.name)
            return Unremovable(where, f"its branch is read elsewhere: by {others}")
        read = {
            self._identity[ref]: ref for name in calls for ref in self.by_name[name].refs() if ref in self._identity
        }
        if not read:
            return None  # nothing is learnt in it: a formula, no block
        if tied := self.tied(calls):
            return Unremovable(where, tied)
        weights = sum(math.prod(self.graph.shapes[ref]) for ref in read.values())
        value = self.root(value)
        return Branch(add, start, value, calls, self._zeros(value), self._topmost(calls), container, weights)

    def _way(self, start: str, calls: Collection[str]) -> list[str]:
        """The modules of those ``calls`` that are computed from ``start``; a mask that only they read is not."""
        known = {start}
        for name in sorted(calls, key=self._order.__getitem__):
            if any(self.root(ref) in known or ref in known for ref in self.by_name[name].refs()):
                known.add(name)
        return [self.by_name[name].module for name in known - {start}]

    def _zeros(self, value: str) -> tuple[Call, ...]:
        found = [self.by_name[value]]
        while found[-1].operator in _ZERO_FOR_ZERO and _first(found[-1]) in self.by_name:
            found.append(self.by_name[_first(found[-1])])
        return tuple(found)

    def _topmost(self, calls: frozenset[str]) -> tuple[str, ...]:
        """The topmost modules all of whose calls are among ``calls``, in the order in which they are called."""
        made = Counter(path for name in calls for path in above(self.by_name[name].module))
        found: dict[str, None] = {}
        for name in sorted(calls, key=self._order.__getitem__):
            paths = above(self.by_name[name].module)
            whole = next((path for path in paths if path and made[path] == len(self._inside[path])), None)
            if whole is not None:
                found.setdefault(whole)
        return tuple(found)

    def _projection(self, add: Call, left: str, right: str) -> Unremovable | None:
        """Both operands are computed with weights from one value: the block's shortcut is a projection."""
        sides = [self._only_for(operand, add.name) for operand in (left, right)]
        if not all(self._weighted(side) for side in sides) or not self._reads(sides[0]) & self._reads(sides[1]):
            return None
        container = common_module([add.module, *(self.by_name[name].module for side in sides for name in side)])
        shortcut = common_module([self.by_name[name].module for name in min(sides, key=len)])
        return Unremovable(
            container or str(add.place), f"its shortcut is computed too (a projection: {shortcut or 'in the forward'})"
        )

    def _weighted(self, calls: frozenset[str]) -> bool:
        refs = (ref for name in calls for ref in self.by_name[name].refs())
        return any(len(self.graph.shapes[ref]) > 1 for ref in refs if ref in self._identity)

    def _reads(self, calls: frozenset[str]) -> set[str]:
        """The activations that ``calls`` read and do not make."""
        read = {self.root(ref) for name in calls for ref in self.by_name[name].refs()} - calls - set(self._identity)
        return {ref for ref in read if ref not in self.by_name or self.by_name[ref].dtype in _FLOATS}

    def _say(self, readers: Iterable[str]) -> str:
        readers = sorted(readers, key=lambda name: self._order.get(name, len(self._order)))
        places = [str(self.by_name[name].place) if name in self.by_name else name for name in readers]
        return ", ".join(places[:3]) + (" …" if len(places) > 3 else "")


def _needed(graph: Graph) -> tuple[Call, ...]:
    """The calls that the model's outputs need; assertions and other dead code are left out."""
    needed = set(graph.outputs)
    for call in reversed(graph.calls):
        if call.name in needed:
            needed.update(call.refs())
    return tuple(call for call in graph.calls if call.name in needed)


def _first(call: Call) -> str:
    """The name of the call's first argument, "" where that is none."""
    return call.args[0] if call.args and isinstance(call.args[0], Ref) else ""


def above(path: str) -> Iterator[str]:
    """The module paths from the model itself ("") down to ``path``."""
    yield ""
    for end, character in enumerate(path):
        if character == ".":
            yield path[:end]
    if path:
        yield path


def common_module(paths: Iterable[str]) -> str:
    """The path of the smallest module that holds all ``paths``."""
    shared: list[str] = []
    for parts in zip(*(path.split(".") if path else [] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
