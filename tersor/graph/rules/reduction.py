"""Reductions and operators over one axis."""

from __future__ import annotations

from typing import Any

from tersor.graph.axis import ONE, Axis
from tersor.graph.flow import Axes, Flow, Many, Refusal, argument
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call

_DIM_SECOND = ("linalg_vector_norm", "norm")  # after the order of the norm


@rule("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "norm", "prod")
def reduce(call: Call, flow: Flow) -> Axes:
    """A sum over channels loses what is removed, every other statistic is of those that stay."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    if call.operator in ("logsumexp", "prod"):
        for axis in x:
            flow.freeze(axis, f"is reduced over by {call.place}")
    dims = _dims(argument(call, 2 if call.operator in _DIM_SECOND else 1, "dim"), len(x))
    for dim in dims:
        (flow.sums if call.operator == "sum" else flow.statistics)(call, 0, dim)
    return _left(x, dims, call.shape)


def _left(x: Axes, dims: set[int], shape: tuple[int, ...]) -> Axes:
    if len(shape) == len(x):
        return tuple(ONE if dim in dims else axis for dim, axis in enumerate(x))
    if len(shape) != len(x) - len(dims):
        raise Refusal("reduces other axes than its arguments say")
    return tuple(axis for dim, axis in enumerate(x) if dim not in dims)


@rule("var_mean", "std_mean")
def moments(call: Call, flow: Flow) -> Many:
    """Two statistics of the channels that stay."""
    x = flow.axes(call.args[0])
    dims = _dims(argument(call, 1, "dim"), len(x))
    for dim in dims:
        flow.statistics(call, 0, dim)
    kept = bool(argument(call, 3, "keepdim", False))
    result: list[Axis] = [ONE if dim in dims else axis for dim, axis in enumerate(x) if kept or dim not in dims]
    return Many((tuple(result), tuple(result)))


@rule("max", "min")
def extremes(call: Call, flow: Flow) -> Axes | Many:
    """Of a whole tensor, of two, or along an axis with the positions, which would shift."""
    x = flow.axes(call.args[0])
    if call.shape is None:
        dim = argument(call, 1, "dim") % len(x)
        flow.freeze(x[dim], f"is searched by {call.place}")
        kept = bool(argument(call, 2, "keepdim", False))
        result = (*x[:dim], *((ONE,) if kept else ()), *x[dim + 1 :])
        return Many((result, result))
    if len(call.args) > 1:
        raise Refusal("compares two tensors")
    for dim in range(len(x)):
        flow.statistics(call, 0, dim)
    return ()


@rule("argmax", "argmin", "any", "all")
def search(call: Call, flow: Flow) -> Axes:
    """Positions would shift; the searched axes stay."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    dims = _dims(argument(call, 1, "dim"), len(x))
    for dim in dims:
        flow.freeze(x[dim], f"is searched by {call.place}")
    return _left(x, dims, call.shape)


@rule("softmax", "log_softmax", "cumsum", "cumprod", "flip", "roll", "_safe_softmax", "safe_softmax")
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
