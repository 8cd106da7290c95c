"""Taking parts of an axis: split, chunk, slice, select, index by constants."""

from __future__ import annotations

import numpy as np

from tersor.graph.flow import Atoms, Axes, Axis, Fixed, Flow, Many, Refusal, argument, fixed, size_of
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call, Ref


@rule("getitem")
def getitem(call: Call, flow: Flow) -> Axes:
    """One of several results."""
    many = flow.parts(call.args[0])
    assert call.shape is not None
    if many.parts is None:
        return fixed(call.shape, many.reason)
    axes = many.parts[call.args[1]]
    pairs = zip(axes, call.shape, strict=True)
    return tuple(Fixed(size, axis.reason) if isinstance(axis, Fixed) else axis for axis, size in pairs)


@rule("split", "split_with_sizes", "chunk", "tensor_split")
def split(call: Call, flow: Flow) -> Many:
    """Parts in order. Equal parts keep equally many: position i of all parts goes together, as ``chunk`` needs."""
    x = flow.axes(call.args[0])
    dim = argument(call, 2, "dim", 0) % len(x)
    sizes = _sizes(call, size_of(x[dim]))
    return Many(tuple((*x[:dim], part, *x[dim + 1 :]) for part in _parts(call, flow, x[dim], sizes)))


def _sizes(call: Call, length: int) -> list[int]:
    given = argument(call, 1, "sizes")
    if isinstance(given, (list, tuple)):
        if call.operator == "tensor_split":
            raise Refusal("splits at given positions")
        return list(given)
    if call.operator == "tensor_split":
        return [length // given + (number < length % given) for number in range(given)]
    size = -(-length // given) if call.operator == "chunk" else given
    return [min(size, length - start) for start in range(0, length, size)]


def _parts(call: Call, flow: Flow, axis: Axis, sizes: list[int]) -> list[Axis]:
    if isinstance(axis, Fixed):
        return [Fixed(size, axis.reason) for size in sizes]
    flow.literal(axis, call)
    parts: list[Axis] = list(np.split(axis, np.cumsum(sizes)[:-1]))
    if len(set(sizes)) > 1:
        flow.freeze(axis, f"is cut into parts of {sizes} by {call.place}")
    for part in parts[1:]:
        if size_of(part) == sizes[0]:
            flow.tie(parts[0], part, call)
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
    """A range of ``dim``. One of equal parts (``x[:, : c // 2]``) ties the parts; other ranges freeze."""
    x = flow.axes(call.args[0])
    dim = argument(call, 1, "dim", 0) % len(x)
    axis, length = x[dim], size_of(x[dim])
    start, end, step = argument(call, 2, "start") or 0, argument(call, 3, "end"), argument(call, 4, "step", 1)
    if call.operator == "narrow":
        end = start + end
    taken = range(length)[slice(start, end, step)]
    return (*x[:dim], _range(call, flow, axis, taken), *x[dim + 1 :])


def _range(call: Call, flow: Flow, axis: Axis, taken: range) -> Axis:
    if isinstance(axis, Fixed):
        return Fixed(len(taken), axis.reason)
    flow.literal(axis, call)
    if len(taken) == len(axis) and taken.step == 1:
        return axis
    if len(taken) == 0 or taken.step != 1 or len(axis) % len(taken) or taken.start % len(taken):
        flow.freeze(axis, f"is cut to positions {taken.start} to {taken.stop} by {call.place}")
    else:
        for part in np.split(axis, len(axis) // len(taken)):
            flow.tie(axis[: len(taken)], part, call)
    return axis[taken.start : taken.stop : taken.step]


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
    if len(indexed) != 1 or len(call.shape) != len(x):
        raise Refusal("indexes several axes at once")
    dim = indexed[0]
    return (*x[:dim], Fixed(call.shape[dim], f"what {call.place} gives"), *x[dim + 1 :])


@rule("glu")
def glu(call: Call, flow: Flow) -> Axes:
    """a · σ(b) of two halves: they are the same channels."""
    x = flow.axes(call.args[0])
    dim = argument(call, 1, "dim", -1) % len(x)
    axis = x[dim]
    if isinstance(axis, Fixed):
        return (*x[:dim], Fixed(axis.size // 2, axis.reason), *x[dim + 1 :])
    first: Atoms = axis[: len(axis) // 2]
    flow.tie(first, axis[len(axis) // 2 :], call)
    return (*x[:dim], first, *x[dim + 1 :])
