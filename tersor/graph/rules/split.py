"""Taking parts of an axis: split, chunk, slice, select, index by constants."""

from __future__ import annotations

from typing import Any

from tersor.graph.axis import Axis, DoesNotFit, Fixed, fix, resolve, size_of, split_product, split_sum, total
from tersor.graph.flow import Axes, Flow, Many, Refusal, argument, fixed
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call, Ref


@rule("getitem")
def getitem(call: Call, flow: Flow) -> Axes:
    """One of several results."""
    many = flow.parts(call.args[0])
    assert call.shape is not None
    if many.parts is None:
        return fixed(call.shape, many.reason)
    if call.args[1] >= len(many.parts):  # the statistics that a batch norm writes while it trains
        return fixed(call.shape, f"a by-product, {call.place}")
    axes = many.parts[call.args[1]]
    pairs = zip(map(resolve, axes), call.shape, strict=True)
    return tuple(Fixed(size, axis.reason) if isinstance(axis, Fixed) else axis for axis, size in pairs)


@rule("split", "split_with_sizes", "chunk", "tensor_split")
def split(call: Call, flow: Flow) -> Many:
    """Parts in order. Parts of one stated size keep equally many: position i of all parts goes together."""
    x = flow.axes(call.args[0])
    dim = argument(call, 2, "dim", 0) % len(x)
    return Many(tuple((*x[:dim], part, *x[dim + 1 :]) for part in _parts(call, flow, x[dim])))


def _parts(call: Call, flow: Flow, axis: Axis) -> list[Axis]:
    given, length = argument(call, 1, "sizes"), size_of(axis)
    said = _stated_sections(call, flow)
    if isinstance(given, (list, tuple)):
        if call.operator == "tensor_split":
            raise Refusal("splits at given positions")
        sizes = list(given)
        if isinstance(said, tuple) and list(said) == sizes:
            return _unequal(call, flow, axis, sizes, list(said))
    elif call.operator == "tensor_split":
        sizes = [length // given + (number < length % given) for number in range(given)]
    else:
        size = -(-length // given) if call.operator == "chunk" else given
        sizes = [min(size, length - start) for start in range(0, length, size)]
    return _equal(call, flow, axis, sizes, said)


def _stated_sections(call: Call, flow: Flow) -> Any:
    """What the forward gave to ``split``: a size or a list of sizes; None for ``chunk``, which takes no size."""
    found = flow.said(call, "split", "split_with_sizes", "chunk")
    if found is None or found[0] == "chunk":
        return None
    args, kwargs = found[1]
    names = ("split_size_or_sections", "split_size", "split_sizes")
    return args[1] if len(args) > 1 else next((kwargs[name] for name in names if name in kwargs), None)


def _equal(call: Call, flow: Flow, axis: Axis, sizes: list[int], said: Any) -> list[Axis]:
    if len(set(sizes)) > 1:
        flow.freeze(axis, f"is cut into parts of {sizes} by {call.place}")
        return list(fixed(sizes, f"what {call.place} gives"))
    rows, part = split_product(axis, len(sizes))
    fix(rows, f"a number of parts in {call.place}")
    if isinstance(said, int):
        flow.needs(part, said, call)
    return [part] * len(sizes)


def _unequal(call: Call, flow: Flow, axis: Axis, sizes: list[int], said: list[Any]) -> list[Axis]:
    parts, left = [], axis
    for size, stated_size in zip(sizes, said, strict=True):
        part, left = split_sum(left, size)
        flow.needs(part, stated_size, call)
        parts.append(part)
    return parts


@rule("unbind")
def unbind(call: Call, flow: Flow) -> Many:
    """Every position of ``dim`` on its own; the axis cannot shrink, since the forward counts on its length."""
    x = flow.axes(call.args[0])
    dim = argument(call, 1, "dim", 0) % len(x)
    flow.freeze(x[dim], f"is taken apart by {call.place}")
    return Many((_without(x, dim),) * size_of(x[dim]))


@rule("select")
def select(call: Call, flow: Flow) -> Axes:
    """One position of ``dim``, by number: the axis cannot shrink, since numbers would shift."""
    x = flow.axes(call.args[0])
    dim = argument(call, 1, "dim", 0) % len(x)
    flow.freeze(x[dim], f"is read by position at {call.place}")
    return _without(x, dim)


def _without(x: Axes, dim: int) -> Axes:
    return (*x[:dim], *x[dim + 1 :])


@rule("slice", "narrow")
def slice_(call: Call, flow: Flow) -> Axes:
    """A range of ``dim``, its ends as the forward states them; every n-th position is a factor."""
    x = flow.axes(call.args[0])
    dim = argument(call, 1, "dim", 0) % len(x)
    start, end, step = argument(call, 2, "start") or 0, argument(call, 3, "end"), argument(call, 4, "step", 1)
    if call.operator == "narrow":
        end = start + end
    taken = range(size_of(x[dim]))[slice(start, end, step)]
    return (*x[:dim], _range(call, flow, x[dim], taken), *x[dim + 1 :])


def _range(call: Call, flow: Flow, axis: Axis, taken: range) -> Axis:
    axis, length = resolve(axis), size_of(axis)
    if isinstance(axis, Fixed) or not len(taken):
        return Fixed(len(taken), axis.reason if isinstance(axis, Fixed) else "empty")
    if taken.step > 1:
        if length % taken.step or taken.start >= taken.step:
            raise DoesNotFit
        rows, inner = split_product(axis, length // taken.step)
        fix(inner, f"every {taken.step}th position at {call.place}")
        return rows
    start, end = _ends(call, flow, taken, length)
    if len(taken) == length:
        flow.needs(axis, end, call)
        return axis
    if length % len(taken) == 0 and taken.start % len(taken) == 0 and not _is_literal(start, end):
        rows, part = split_product(axis, length // len(taken))
        fix(rows, f"a number of parts in {call.place}")
    else:
        before, rest = split_sum(axis, taken.start)
        part, after = split_sum(rest, len(taken))
    before, rest = split_sum(axis, taken.start)
    _, after = split_sum(rest, len(taken))
    if taken.start:
        _needs_end(call, flow, before, total([resolve(part), resolve(after)]), start)
    if taken.stop < length:
        _needs_end(call, flow, total([resolve(before), resolve(part)]), resolve(after), end)
    return part


def _needs_end(call: Call, flow: Flow, before: Axis, after: Axis, position: Any) -> None:
    """``position`` is how many come before it, or, counted from the end, minus how many come after."""
    if position is None:
        return
    if position < 0:
        flow.needs(after, -position, call)
    else:
        flow.needs(before, position, call)


def _is_literal(start: Any, end: Any) -> bool:
    """Whether an end of a range is a number that the user wrote."""
    return any(type(end) is int and end not in (0, -1) for end in (start, end))


def _ends(call: Call, flow: Flow, taken: range, length: int) -> tuple[Any, Any]:
    """Start and end of the range as the forward gave them: ints, Sizes, or None where open or unknown."""
    found = flow.said(call, "narrow", "__getitem__")
    if found is None:
        return None, None
    name, (args, kwargs) = found
    if name == "narrow":
        start, size = (args[2], args[3]) if len(args) > 3 else (kwargs["start"], kwargs["length"])
        return start, start + size
    for item in args[1] if isinstance(args[1], tuple) else (args[1],):
        if isinstance(item, slice) and range(length)[item] == taken and item != slice(None):
            return item.start, item.stop
    return None, None


@rule("index", "index_select")
def index(call: Call, flow: Flow) -> Axes:
    """Positions by a tensor of numbers: the numbers would shift, so an axis that is indexed cannot shrink."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    if call.operator == "index_select":
        dim = call.args[1] % len(x)
        flow.freeze(x[dim], f"is read by position at {call.place}")
        return (*x[:dim], Fixed(call.shape[dim], f"what {call.place} gives"), *x[dim + 1 :])
    indices = [*call.args[1], *[None] * (len(x) - len(call.args[1]))]
    indexed = [dim for dim, given in enumerate(indices) if isinstance(given, Ref)]
    for dim in indexed:
        flow.freeze(x[dim], f"is read by position at {call.place}")
        for axis in flow.axes(indices[dim]):
            flow.freeze(axis, f"is a table of positions at {call.place}")
    if indexed != list(range(indexed[0], indexed[-1] + 1)):
        raise Refusal("indexes axes that are apart")
    before, after = x[: indexed[0]], x[indexed[-1] + 1 :]
    made = fixed(call.shape[len(before) : len(call.shape) - len(after)], f"what {call.place} gives")
    return (*before, *made, *after)


@rule("gather")
def gather(call: Call, flow: Flow) -> Axes:
    """Positions of ``dim`` by a tensor of numbers of the result's shape."""
    x, dim, chosen = flow.axes(call.args[0]), call.args[1], flow.axes(call.args[2])
    dim %= len(x)
    flow.freeze(x[dim], f"is read by position at {call.place}")
    flow.freeze(chosen[dim], f"is a table of positions at {call.place}")
    return tuple(
        mine if number == dim or size_of(mine) != size_of(other) else flow.tie(mine, other, call)
        for number, (mine, other) in enumerate(zip(chosen, x, strict=True))
    )


@rule("slice_scatter", "select_scatter")
def scatter(call: Call, flow: Flow) -> Axes:
    """Overwrites a range, or one position, of ``dim``; the other axes are tied."""
    x, source = flow.axes(call.args[0]), flow.axes(call.args[1])
    dim = argument(call, 2, "dim", 0) % len(x)
    if call.operator == "select_scatter":
        flow.freeze(x[dim], f"is written by position at {call.place}")
    else:
        start, end, step = argument(call, 3, "start"), argument(call, 4, "end"), argument(call, 5, "step", 1)
        part = _range(call, flow, x[dim], range(size_of(x[dim]))[slice(start, end, step)])
        flow.tie(source[dim], part, call)
        source = _without(source, dim)
    others = iter(source)
    return tuple(axis if number == dim else flow.tie(axis, next(others), call) for number, axis in enumerate(x))


@rule("glu")
def glu(call: Call, flow: Flow) -> Axes:
    """a · σ(b) of two halves: they are the same channels."""
    x = flow.axes(call.args[0])
    dim = argument(call, 1, "dim", -1) % len(x)
    rows, part = split_product(x[dim], 2)
    fix(rows, f"a number of parts in {call.place}")
    return (*x[:dim], part, *x[dim + 1 :])
