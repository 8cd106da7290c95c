"""The residual blocks of a model that can be taken out, and what then stands in their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tersor.core.edit import Swap
from tersor.core.place import module_at
from tersor.core.plan import Skip
from tersor.graph.residual import Branch, Residuals, above
from tersor.graph.trace import Call, Graph
from tersor.observe.reach import unreachable
from tersor.prune.blocks.gates import Argument, Passage, Skipped, Spot, Switch
from tersor.prune.blocks.placeholders import Seen, observe, placeholder

Calls = Mapping[str, tuple[Seen, ...]]


@dataclass(frozen=True, eq=False)
class Block:
    """Something that can be taken out: a residual branch, or a layer of several.

    ``name``: the module that tells it from others. ``swaps``: what takes it out, sizes taken from whatever flows
    through; ``exact``: the same with every placeholder's result of the size that its module's had. ``switch``: what has
    the same effect without taking anything out. ``passage``: where its input and its output pass. ``gone``: names of
    the calls that go with it. ``weights``: elements of its parameters and buffers.
    """

    name: str
    branches: tuple[Branch, ...]
    swaps: tuple[Swap, ...]
    exact: tuple[Swap, ...]
    switch: tuple[Switch, ...]
    passage: Passage
    gone: frozenset[str]
    weights: int

    def within(self, other: Block) -> bool:
        """Whether taking ``other`` out takes this one out too."""
        return self is not other and all(branch.add.name in other.gone for branch in self.branches)


class _Cannot(Exception):
    """Why a block cannot be taken out."""


class Candidates:
    """The ``blocks`` of ``model`` at ``level`` ("branch" or "layer"), in the order of the forward, and ``skips``."""

    def __init__(self, graph: Graph, model: nn.Module, example_inputs: tuple[Any, ...], level: str):
        self.graph, self.model = graph, model
        self.residuals = Residuals(graph, model)
        self.calls: Calls = observe(model, example_inputs)
        self.spots = _spots(self.residuals, model, graph, example_inputs)
        self.skips = [Skip(other.place, other.reason) for other in self.residuals.unremovable]
        self.blocks: list[Block] = []
        layers = _layers(self.residuals.branches)
        parts = [(branch,) for branch in self.residuals.branches] if level == "branch" else list(layers.values())
        for branches in parts:
            name = self._name(branches[0]) if level == "branch" else _outermost(branches)
            try:
                self.blocks.append(
                    self._branch(name, branches[0]) if level == "branch" else self._layer(name, branches)
                )
            except _Cannot as reason:
                self.skips.append(Skip(name or str(branches[0].add.place), str(reason)))

    def swaps(self, chosen: Sequence[Block]) -> tuple[Swap, ...]:
        """What takes all ``chosen`` blocks out: a module of which nothing is left is taken out as a whole."""
        found = {swap.module: swap for block in chosen for swap in block.swaps}
        branches = [branch for block in chosen for branch in block.branches]
        for container in {branch.container for branch in branches} - {""}:
            inner = [branch for branch in branches if branch.container == container or _inside(branch, container)]
            whole = self._whole(container)
            if whole is not None and self.residuals.gives_back(container, inner):
                found[container] = whole
        topmost = [path for path in found if not any(up in found for up in above(path) if up != path)]
        order = {path: number for number, (path, _) in enumerate(self.model.named_modules())}
        return tuple(found[path] for path in sorted(topmost, key=order.__getitem__))

    def _whole(self, path: str) -> Swap | None:
        """The module at ``path`` as its input given back, where it is plain which argument that is."""
        calls = self.calls.get(path, ())
        plain = path and len(calls) == 1 and len(calls[0].alike) == 1 and not self._shared(path)
        return placeholder(self.model, path, calls, zeros=False) if plain else None

    def _name(self, branch: Branch) -> str:
        """The container of a block's only branch; else the branch's module with the most weights."""
        if branch.container and sum(other.container == branch.container for other in self.residuals.branches) == 1:
            return branch.container
        sizes = {path: sum(p.numel() for p in module_at(self.model, path).parameters()) for path in branch.modules}
        return max(sizes, key=sizes.__getitem__, default=branch.container)

    # A branch ----------------------------------------------------------------------------------------------------

    def _branch(self, name: str, branch: Branch) -> Block:
        paths = [path for module in branch.modules for path in self._coverable(module)]
        weights = [path for path in paths if any(True for _ in module_at(self.model, path).parameters())]
        if not weights:
            raise _Cannot("its parameters are read by the forward itself: there is no module to take out")
        switch, passage = self._switch(branch), self._passage(branch)
        leaving = {path for path in paths if self._leaves(path, paths)}
        swaps = tuple(self._placeholder(path, zeros=path in leaving, loose=True) for path in paths)
        exact = tuple(self._placeholder(path, zeros=path in leaving) for path in paths)
        return Block(name, (branch,), swaps, exact, (switch,), passage, branch.calls, branch.weights)

    def _leaves(self, path: str, paths: Sequence[str]) -> bool:
        """Whether the forward itself, and not just another of the modules ``paths``, reads what ``path`` gives."""
        readers = [reader for name in self.residuals.results(path) for reader in self.residuals.readers(name)]
        calls = [self.residuals.by_name.get(reader) for reader in readers]
        return any(call is None or set(above(call.module)).isdisjoint(paths) for call in calls)

    def _placeholder(self, path: str, *, zeros: bool, loose: bool = False) -> Swap:
        """For a module that is coverable: its input if it may be, else zeros."""
        calls = self.calls[path]
        found = None if zeros else placeholder(self.model, path, calls, zeros=False, loose=loose)
        found = found or placeholder(self.model, path, calls, zeros=True, loose=loose)
        assert found is not None, "was found to be coverable"
        return found

    def _coverable(self, path: str) -> list[str]:
        """``path``, or what it holds where no placeholder can give what it gives. Raises _Cannot."""
        if self._shared(path):
            raise _Cannot(f"{path} is the same module as another one")
        if placeholder(self.model, path, self.calls[path], zeros=True) is not None:
            return [path]
        inner = [f"{path}.{name}" for name, _ in module_at(self.model, path).named_children()]
        inner = [child for child in inner if self.residuals.inside(child)]
        if inner:
            return [found for child in inner for found in self._coverable(child)]
        if any(True for _ in module_at(self.model, path).parameters()):
            gives = next((seen.unknown for seen in self.calls[path] if seen.unknown), "what no placeholder can give")
            raise _Cannot(f"{path} gives {gives}")
        return []

    def _shared(self, path: str) -> bool:
        """Whether another path leads to the module, or to one that it holds."""
        own = {id(module) for module in module_at(self.model, path).modules()}
        names = [name for name, module in self.model.named_modules(remove_duplicate=False) if id(module) in own]
        return any(path not in above(name) for name in names)

    def _switch(self, branch: Branch) -> Spot:
        """Where the branch's value, or what makes it zero if it is zero, can be intercepted. Raises _Cannot."""
        spots = (self._reachable(call) for call in branch.zeros)
        modules = (self._result_of_module(call.name) for call in branch.zeros)
        found = next((spot for spot in (*spots, *modules) if spot is not None), None)
        if found is None:
            raise _Cannot(f"its result {branch.zeros[0].place} {self.spots[branch.zeros[0].place]}")
        return found

    def _passage(self, branch: Branch) -> Passage:
        """Where the addition's result passes, and the branch's value or what it starts from. Raises _Cannot."""
        after = self._reachable(branch.add)
        if after is None:
            raise _Cannot(f"its addition {branch.add.place} {self.spots[branch.add.place]}")
        value = self._reachable(branch.zeros[0]) or self._result_of_module(branch.value)
        if value is not None:
            return Passage(after, branch=value)
        start = self.residuals.by_name.get(branch.start)
        before = (self._reachable(start) if start is not None else None) or self._argument(branch)
        if before is None:
            raise _Cannot(f"its result {branch.zeros[0].place} {self.spots[branch.zeros[0].place]}")
        return Passage(after, start=before)

    def _argument(self, branch: Branch) -> Argument | None:
        """A module of the branch that is given what the branch starts from, and nothing else of that shape."""
        for path in branch.modules:
            seen = self.calls.get(path, ())
            sources = [source for source in seen[0].sources if source[2].shape == branch.add.shape] if seen else []
            if len(seen) == 1 and len(sources) == 1 and self.residuals.starts_from(path, branch.start):
                return Argument(path, sources[0][:2])
        return None

    def _reachable(self, call: Call) -> Spot | None:
        return Spot(call.place) if self.spots[call.place] is None else None

    def _result_of_module(self, name: str) -> Spot | None:
        """The module, called once, whose one result is the value ``name``; the innermost one."""
        call = self.residuals.by_name[name]
        for path in [up for up in above(call.module) if up][::-1]:
            seen, results = self.calls.get(path, ()), self.residuals.results(path)
            if len(seen) == 1 and not seen[0].unknown and seen[0].main is not None and len(results) == 1:
                if self.residuals.root(results[0]) == name and seen[0].main[1].shape == self.graph.shapes[results[0]]:
                    return Spot(path, seen[0].main[0])
        return None

    # A layer -----------------------------------------------------------------------------------------------------

    def _layer(self, path: str, branches: tuple[Branch, ...]) -> Block:
        start = branches[0].start
        results = self.residuals.results(path)
        calls = frozenset(call.name for call in self.residuals.inside(path))
        if not path:
            raise _Cannot("it is the whole model")
        if start in calls:
            raise _Cannot(f"the first branch of {path} does not start from what {path} is given")
        if len(results) != 1 or self.graph.shapes[results[0]] != self.graph.shapes[start]:
            shapes = [list(self.graph.shapes[name]) for name in results]
            raise _Cannot(f"{path} is given {list(self.graph.shapes[start])} and others read {shapes} of it")
        if tied := self.residuals.tied(calls):
            raise _Cannot(tied)
        whole = self._whole(path)
        if whole is None:
            raise _Cannot(f"no placeholder can give what {path} gives: {_why(self.calls.get(path, ()))}")
        seen = self.calls[path][0]
        assert seen.main is not None, "a placeholder was made"
        name, position, _ = seen.alike[0]
        spot = Spot(path, seen.main[0])
        weights = sum(tensor.numel() for tensor in module_at(self.model, path).state_dict().values())
        passage = Passage(spot, source=(name, position))
        return Block(
            path, branches, (whole,), (whole,), (Skipped(path, (name, position), spot.path),), passage, calls, weights
        )


def _why(calls: tuple[Seen, ...]) -> str:
    if len(calls) != 1:
        return f"it is called {len(calls)} times"
    if calls[0].unknown:
        return f"a {calls[0].unknown}"
    return f"{len(calls[0].alike)} of its arguments have its result's shape and type"


def _inside(branch: Branch, container: str) -> bool:
    return container in above(branch.container)


def _outermost(branches: tuple[Branch, ...]) -> str:
    return min((branch.container for branch in branches), key=len)


def _layers(branches: Sequence[Branch]) -> dict[str, tuple[Branch, ...]]:
    """Branches by the outermost container of a branch that does not hold them within itself; never the whole model,
    where a branch has a container of its own."""
    own: dict[str, list[Branch]] = {}
    for branch in branches:
        own.setdefault(branch.container, []).append(branch)
    found: dict[str, list[Branch]] = {}
    for branch in branches:
        up = (path for path in above(branch.container) if path and path in own)
        beside = (path for path in up if not any(branch.add.name in other.calls for other in own[path]))
        found.setdefault(next(beside, branch.container), []).append(branch)
    return {path: tuple(inner) for path, inner in found.items()}


def _spots(
    residuals: Residuals, model: nn.Module, graph: Graph, example_inputs: tuple[Any, ...]
) -> dict[Any, str | None]:
    """place → why it cannot be intercepted, None where it can."""
    starts = [residuals.by_name[branch.start] for branch in residuals.branches if branch.start in residuals.by_name]
    calls = [*starts, *(call for branch in residuals.branches for call in (branch.add, *branch.zeros))]
    shapes = {call.place: call.shape for call in calls}
    bad = unreachable(model, graph, shapes, example_inputs) if shapes else {}
    return {place: bad.get(place) for place in shapes}
