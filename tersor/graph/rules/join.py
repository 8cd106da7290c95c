"""Joining: a concatenation is a sum of axes, stacking ties them."""

from __future__ import annotations

from tersor.graph.axis import Axis, Fixed, resolve, size_of, total
from tersor.graph.flow import Axes, Flow, argument, tensors_in
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call


@rule("cat")
def cat(call: Call, flow: Flow) -> Axes:
    """Along ``dim`` one part after another; every other axis is the same in all parts."""
    parts = [axes for axes in map(flow.axes, tensors_in(call.args[0])) if not _is_legacy_empty(axes)]
    dim = argument(call, 1, "dim", 0) % len(parts[0])
    return tuple(
        total([resolve(axis) for axis in column]) if number == dim else _tied(call, flow, column)
        for number, column in enumerate(zip(*parts, strict=True))
    )


@rule("stack")
def stack(call: Call, flow: Flow) -> Axes:
    """A new axis; all others are the same in all parts."""
    parts = [flow.axes(ref) for ref in tensors_in(call.args[0])]
    dim = argument(call, 1, "dim", 0) % (len(parts[0]) + 1)
    axes = [_tied(call, flow, column) for column in zip(*parts, strict=True)]
    return (*axes[:dim], Fixed(len(parts), f"what {call.place} stacks"), *axes[dim:])


def _is_legacy_empty(axes: Axes) -> bool:
    return len(axes) == 1 and size_of(axes[0]) == 0


def _tied(call: Call, flow: Flow, column: tuple[Axis, ...]) -> Axis:
    result = column[0]
    for axis in column[1:]:
        result = flow.tie(result, axis, call)
    return result
