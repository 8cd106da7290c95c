"""Changes of shape: axes multiply and factor."""

from __future__ import annotations

import math
from typing import Any

from tersor.graph.axis import (
    ONE,
    Axis,
    DoesNotFit,
    Fixed,
    fix,
    product,
    resolve,
    size_of,
    split_product,
)  # fmt: skip
from tersor.graph.flow import Axes, Flow, Refusal, argument, fixed
from tersor.graph.rules.creation import axis_of
from tersor.graph.rules.registry import rule
from tersor.graph.sizes import Dim, Known, Size
from tersor.graph.trace import Call


@rule("view", "reshape", "flatten", "unflatten", "unsafe_view", "view_as", "reshape_as")
def view(call: Call, flow: Flow) -> Axes:
    """Axes fall into blocks of equal product: [batch, c, h, w] → [batch, c·h·w], [batch, h·d] → [batch, h, d].

    Each stated size is noted: it must be what the axis will be.
    """
    assert call.shape is not None
    if 0 in call.shape:
        return flow.give_up(call, f"is empty at {call.place}")  # type: ignore[return-value]
    read = [axis for axis in map(resolve, flow.axes(call.args[0])) if size_of(axis) != 1]
    result: list[Axis] = []
    for sizes, count in _blocks([size_of(axis) for axis in read], list(call.shape)):
        result += _factored(call, flow, read[:count], sizes)
        read = read[count:]
    for axis, size in zip(result, stated_sizes(call, flow), strict=True):
        flow.needs(axis, size, call)
    return tuple(result)


def stated_sizes(call: Call, flow: Flow) -> list[Any]:
    """The sizes of the result as the forward gave them; −1 where it gave none."""
    assert call.shape is not None
    automatic: list[Any] = [-1] * len(call.shape)
    if call.said is None:
        return automatic
    args, kwargs = call.said
    name = call.function.rpartition(".")[2]
    given: Any = ()
    if name in ("view", "reshape", "expand", "broadcast_to"):
        given = args[1:] or kwargs.get("shape", kwargs.get("size", ()))
        given = given[0] if len(given) == 1 and isinstance(given[0], tuple) else given
    elif name in ("view_as", "reshape_as", "expand_as") and len(args) > 1 and isinstance(args[1], Known):
        other = args[1]
        given = [Size(n, Dim(other.function, other.index, d), flow.graph.book) for d, n in enumerate(call.shape)]
    elif name == "unflatten":
        dim, sizes = (*args[1:], *kwargs.values())[:2]
        dim = int(dim) % (len(call.shape) - len(sizes) + 1)
        given = [*automatic[:dim], *sizes, *automatic[dim + len(sizes) :]]
    fits = len(given) == len(call.shape) and all(
        isinstance(size, int) and size in (-1, length) for size, length in zip(given, call.shape, strict=True)
    )
    return list(given) if fits else automatic


def _blocks(before: list[int], after: list[int]) -> list[tuple[list[int], int]]:
    """The new sizes in runs, each with the number of old axes (none of size one) whose product it is."""
    blocks: list[tuple[list[int], int]] = []
    position = 0
    while after:
        sizes, count, old = [after.pop(0)], 0, 1
        while math.prod(sizes) != old:
            if math.prod(sizes) > old:
                old *= before[position + count]
                count += 1
            else:
                sizes.append(after.pop(0))
        position += count
        blocks.append((sizes, count))
    return blocks


def _factored(call: Call, flow: Flow, axes: list[Axis], sizes: list[int]) -> list[Axis]:
    """A block's axes, multiplied, as factors of the new sizes."""
    left = product(axes)
    result: list[Axis] = []
    try:
        for size in sizes:
            first, left = split_product(left, size)
            result.append(first)
    except DoesNotFit:
        for axis in axes:
            flow.freeze(axis, f"is cut at {call.place} where other layers hold it whole")
        return list(fixed(sizes, f"what {call.place} gives"))
    return result


@rule("permute", "transpose", "t", "swapaxes", "swapdims", "numpy_T", "mT", "numpy_t")
def permute(call: Call, flow: Flow) -> Axes:
    """Axes in another order."""
    x = flow.axes(call.args[0])
    if call.operator == "permute":
        return tuple(x[dim % len(x)] for dim in argument(call, 1, "dims"))
    if call.operator in ("t", "numpy_T", "numpy_t"):
        return x[::-1]
    first, second = (-2, -1) if call.operator == "mT" else (argument(call, n, f"dim{n - 1}") for n in (1, 2))
    order = list(x)
    order[first], order[second] = order[second], order[first]
    return tuple(order)


@rule("unsqueeze")
def unsqueeze(call: Call, flow: Flow) -> Axes:
    """A new axis of size one."""
    x = flow.axes(call.args[0])
    dim = argument(call, 1, "dim") % (len(x) + 1)
    return (*x[:dim], ONE, *x[dim:])


@rule("squeeze")
def squeeze(call: Call, flow: Flow) -> Axes:
    """Axes of size one go."""
    x = flow.axes(call.args[0])
    given = argument(call, 1, "dim")
    dims = range(len(x)) if given is None else [dim % len(x) for dim in (given if isinstance(given, list) else [given])]
    gone = [dim for dim in dims if size_of(x[dim]) == 1]
    return tuple(axis for dim, axis in enumerate(x) if dim not in gone)


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call, flow: Flow) -> Axes:
    """Copies along axes of size one, or new ones in front: their length may be another tensor's, or an attribute."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    new = len(call.shape) - len(x)
    sizes = stated_sizes(call, flow)
    result: list[Axis] = []
    for dim, (size, length) in enumerate(zip(sizes, call.shape, strict=True)):
        if dim >= new and size_of(x[dim - new]) == length:
            result.append(x[dim - new])
            flow.needs(result[-1], size, call)
        else:
            result.append(axis_of(call, flow, size, length))
    return tuple(result)


@rule("repeat", "tile")
def repeat(call: Call, flow: Flow) -> Axes:
    """The whole axis again and again."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    said = call.said[0][1:] if call.said is not None and call.function.endswith(("repeat", "tile")) else ()
    said = said[0] if len(said) == 1 and isinstance(said[0], tuple) else said
    x = (*[ONE] * (len(call.shape) - len(x)), *x)
    result = []
    for dim, (axis, length) in enumerate(zip(x, call.shape, strict=True)):
        times = length // size_of(axis)
        size = said[dim] if len(said) == len(x) else None
        result.append(product([axis_of(call, flow, size, times), resolve(axis)]))
    return tuple(result)


@rule("repeat_interleave")
def repeat_interleave(call: Call, flow: Flow) -> Axes:
    """Every position several times in a row."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    dim, times = argument(call, 2, "dim"), argument(call, 1, "repeats")
    if dim is None or not isinstance(times, int):
        raise Refusal("repeats positions unequally")
    dim %= len(x)
    said = None if call.said is None else (*call.said[0], *call.said[1].values())[1]
    return (*x[:dim], product([resolve(x[dim]), axis_of(call, flow, said, times)]), *x[dim + 1 :])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call, flow: Flow) -> Axes:
    """[batch, g·c, …]: channel k of group i moves to k·g + i; the groups keep equally many."""
    x = flow.axes(call.args[0])
    rows, inner = split_product(x[1], argument(call, 1, "groups"))
    fix(rows, f"a number of groups in {call.place}")
    return (x[0], product([resolve(inner), resolve(rows)]), *x[2:])


@rule("pixel_shuffle")
def pixel_shuffle(call: Call, flow: Flow) -> Axes:
    """[…, c·r², h, w] → […, c, h·r, w·r]: the r² channels of a new one go together."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    flow.freeze_space(call, x[-2:])
    made, inner = split_product(x[-3], call.shape[-3])
    flow.freeze(inner, f"becomes a position at {call.place}")
    return (*x[:-3], made, *fixed(call.shape[-2:], "height and width"))


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call, flow: Flow) -> Axes:
    """[…, c, h·r, w·r] → […, c·r², h, w]."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    flow.freeze_space(call, x[-2:])
    inner = Fixed(call.shape[-3] // size_of(x[-3]), f"positions of {call.place}")
    return (*x[:-3], product([resolve(x[-3]), inner]), *fixed(call.shape[-2:], "height and width"))
