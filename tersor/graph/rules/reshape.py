"""Changes of shape: sizes factor, and channels are followed through the factors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tersor.graph.flow import Atoms, Axes, Axis, Fixed, Flow, argument, fixed, size_of
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call


@rule("view", "reshape", "flatten", "unflatten", "unsafe_view", "view_as", "reshape_as")
def view(call: Call, flow: Flow) -> Axes:
    """Axes fall into blocks of equal product. A merged axis repeats its channels at each of their positions
    ([batch, c, h, w] → [batch, c·h·w]); a split one keeps them on one factor, tied along the others
    ([batch, g·c] → [batch, g, c]: channel k of every group goes together)."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    for axis in x:
        flow.literal(axis, call)
    if 0 in call.shape:
        return flow.give_up(call, f"is empty at {call.place}")  # type: ignore[return-value]
    for axis in x:
        if size_of(axis) == 1:
            flow.freeze(axis, f"is a single channel that {call.place} may drop")
    result: list[Axis] = []
    read = [axis for axis in x if size_of(axis) != 1]
    for sizes, count in _blocks([size_of(axis) for axis in read], list(call.shape)):
        merged = _merge(call, flow, read[:count])
        read = read[count:]
        result += _unmerge(call, flow, merged, sizes)
    return tuple(result)


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


def _merge(call: Call, flow: Flow, axes: list[Axis]) -> Axis | None:
    """Several axes as one, the last running fastest."""
    if len(axes) < 2:
        return axes[0] if axes else None
    sizes = [size_of(axis) for axis in axes]
    carriers = [dim for dim, axis in enumerate(axes) if isinstance(axis, np.ndarray)]
    if len(carriers) != 1:
        for axis in axes:
            flow.freeze(axis, f"is merged with other channels by {call.place}")
        return Fixed(math.prod(sizes), f"what {call.place} gives")
    return _spread(axes[carriers[0]], sizes, carriers[0])


def _spread(axis: Any, sizes: list[int], dim: int) -> Atoms:
    shape = [1] * len(sizes)
    shape[dim] = -1
    return np.broadcast_to(axis.reshape(shape), sizes).ravel()


def _unmerge(call: Call, flow: Flow, axis: Axis | None, sizes: list[int]) -> list[Axis]:
    """One axis as several. Channels stay on the factor along which alone they differ, else on the largest."""
    factors = [dim for dim, size in enumerate(sizes) if size != 1]
    if isinstance(axis, Fixed) or axis is None:
        return list(fixed(sizes, axis.reason if axis is not None else "a single position"))
    result: list[Axis] = list(fixed(sizes, f"a factor that {call.place} gives"))
    if len(factors) == 1:
        result[factors[0]] = axis
        return result
    grid = axis.reshape(sizes)
    carrier = next((dim for dim in factors if _alone(grid, dim)), None)
    if carrier is None:
        carrier = max(factors, key=lambda dim: (sizes[dim], dim))
        flow.tie(axis, _spread(_first(grid, carrier), sizes, carrier), call)
    result[carrier] = _first(grid, carrier)
    return result


def _first(grid: Atoms, dim: int) -> Atoms:
    """The atoms along ``dim`` at position zero of all other axes."""
    return grid[tuple(slice(None) if number == dim else 0 for number in range(grid.ndim))]


def _alone(grid: Atoms, dim: int) -> bool:
    return bool((np.moveaxis(grid, dim, -1) == _first(grid, dim)).all())


@rule("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "numpy_T")
def permute(call: Call, flow: Flow) -> Axes:
    """Axes in another order."""
    x = flow.axes(call.args[0])
    if call.operator == "permute":
        return tuple(x[dim % len(x)] for dim in argument(call, 1, "dims"))
    if call.operator in ("t", "numpy_T"):
        return x[::-1]
    if call.operator == "movedim":
        return flow.give_up(call, f"is moved by {call.place}")  # type: ignore[return-value]
    first, second = (argument(call, number, f"dim{number - 1}") % len(x) for number in (1, 2))
    order = list(x)
    order[first], order[second] = order[second], order[first]
    return tuple(order)


@rule("unsqueeze")
def unsqueeze(call: Call, flow: Flow) -> Axes:
    """A new axis of size one."""
    x = flow.axes(call.args[0])
    dim = argument(call, 1, "dim") % (len(x) + 1)
    return (*x[:dim], Fixed(1, "a single position"), *x[dim:])


@rule("squeeze")
def squeeze(call: Call, flow: Flow) -> Axes:
    """Axes of size one go."""
    x = flow.axes(call.args[0])
    given = argument(call, 1, "dim")
    dims = range(len(x)) if given is None else [dim % len(x) for dim in (given if isinstance(given, list) else [given])]
    gone = [dim for dim in dims if size_of(x[dim]) == 1]
    for dim in gone:
        flow.freeze(x[dim], f"is a single channel that {call.place} drops")
    return tuple(axis for dim, axis in enumerate(x) if dim not in gone)


@rule("expand", "expand_as", "repeat")
def stretch(call: Call, flow: Flow) -> Axes:
    """Copies along axes: stretched from size one, new in front, or (repeat) the list of atoms again and again."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    result: list[Axis] = list(fixed(call.shape[: len(call.shape) - len(x)], f"what {call.place} gives"))
    for axis, size in zip(x, call.shape[len(call.shape) - len(x) :], strict=True):
        flow.literal(axis, call)
        if size_of(axis) == size:
            result.append(axis)
        elif isinstance(axis, np.ndarray) and call.operator == "repeat" and len(axis) > 1:
            result.append(np.tile(axis, size // len(axis)))
        else:
            flow.freeze(axis, f"is stretched by {call.place}")
            result.append(Fixed(size, f"what {call.place} gives"))
    return tuple(result)


@rule("channel_shuffle")
def channel_shuffle(call: Call, flow: Flow) -> Axes:
    """[batch, g·c, …]: channel k of group i moves to k·g + i; the groups keep equally many."""
    x = flow.axes(call.args[0])
    channels, groups = x[1], argument(call, 1, "groups")
    if isinstance(channels, Fixed):
        return x
    first = channels[: len(channels) // groups]
    flow.tie(channels, np.tile(first, groups), call)
    return (x[0], np.repeat(first, groups), *x[2:])


@rule("pixel_shuffle")
def pixel_shuffle(call: Call, flow: Flow) -> Axes:
    """[…, c·r², h, w] → […, c, h·r, w·r]: the r² channels of a new one go together."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    for axis in x[-2:]:
        flow.freeze(axis, f"is height or width for {call.place}")
    channels = x[-3]
    made: Axis = Fixed(call.shape[-3], f"what {call.place} gives")
    if isinstance(channels, np.ndarray):
        each = len(channels) // call.shape[-3]
        made = channels[::each]
        flow.tie(channels, np.repeat(made, each), call)
    return (*x[:-3], made, *fixed(call.shape[-2:], "height and width"))
