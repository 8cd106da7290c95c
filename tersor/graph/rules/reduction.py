"""Reductions and operators over one axis: what they run over cannot lose a position unseen."""

from __future__ import annotations

from typing import Any

from tersor.graph.flow import Axes, Fixed, Flow, Refusal, argument
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call


@rule("mean", "sum", "amax", "amin", "var", "std", "logsumexp")
def reduce(call: Call, flow: Flow) -> Axes:
    """The reduced axes freeze, the others pass."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    dims = _dims(argument(call, 1, "dim"), len(x))
    for dim in dims:
        flow.freeze(x[dim], f"is reduced over by {call.place}")
    if len(call.shape) == len(x):
        return tuple(Fixed(1, f"what {call.place} gives") if dim in dims else axis for dim, axis in enumerate(x))
    if len(call.shape) != len(x) - len(dims):
        raise Refusal("reduces other axes than its arguments say")
    return tuple(axis for dim, axis in enumerate(x) if dim not in dims)


@rule("softmax", "log_softmax", "cumsum", "cumprod", "flip", "roll")
def along(call: Call, flow: Flow) -> Axes:
    """The shape stays; positions of the axes that the operator runs along see one another."""
    x = flow.axes(call.args[0])
    for dim in _dims(argument(call, 2 if call.operator == "roll" else 1, "dim"), len(x)):
        flow.freeze(x[dim], f"is run along by {call.place}")
    return x


def _dims(value: Any, ndim: int) -> set[int]:
    """Dimensions as non-negative numbers; none given means all."""
    if value is None or value == [] or isinstance(value, bool):
        return set(range(ndim))
    return {dim % ndim for dim in (value if isinstance(value, (list, tuple)) else [value])}
