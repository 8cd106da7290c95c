"""Operators that work element by element: aligned axes of their operands are the same channels."""

from __future__ import annotations

from torch import nn

from tersor.graph.axis import ONE, Axis, size_of
from tersor.graph.flow import Axes, Flow, Many, fixed
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call

UNARY = (
    "abs", "alias", "celu", "ceil", "clamp", "clamp_max", "clamp_min", "clone", "contiguous", "cos", "detach",
    "dropout", "elu", "erf", "exp", "feature_dropout", "floor", "full_like", "gelu", "hardsigmoid", "hardswish",
    "hardtanh", "leaky_relu", "lift_fresh_copy", "log", "log1p", "log_sigmoid", "logical_not", "mish", "neg",
    "ones_like", "reciprocal", "relu", "relu6", "round", "rsqrt", "selu", "sigmoid", "sign", "silu", "sin", "softplus",
    "softshrink", "hardshrink", "sqrt", "square", "tanh", "threshold", "to", "to_copy", "zeros_like", "bitwise_not",
    "isnan", "type_as", "nan_to_num", "rand_like", "randn_like", "empty_like", "fill", "expm1", "log2", "atan", "isinf",
    "zero",
)  # fmt: skip
BINARY = (
    "add", "addcdiv", "addcmul", "and", "bitwise_and", "bitwise_or", "div", "eq", "ge", "gt", "le", "lerp", "lt",
    "logical_and", "logical_or", "logical_xor", "masked_fill", "maximum", "minimum", "mul", "ne", "or", "pow",
    "prelu_kernel", "remainder", "fmod", "floor_divide", "rsub", "sub", "where", "atan2", "bitwise_xor",
)  # fmt: skip


@rule(*UNARY, *BINARY)
def elementwise(call: Call, flow: Flow) -> Axes:
    """Axes are aligned from the right; those of equal size are tied, those of size one are stretched."""
    assert call.shape is not None
    operands = [flow.axes(ref) for ref in call.refs()]
    return tuple(
        aligned(call, flow, [axes[back] for axes in operands if len(axes) >= -back], size)
        for back, size in zip(range(-len(call.shape), 0), call.shape, strict=True)
    )


def aligned(call: Call, flow: Flow, axes: list[Axis], size: int) -> Axis:
    """The axis that several operands share, single positions being stretched."""
    result: Axis | None = None
    for axis in axes:
        if size_of(axis) == size:
            result = axis if result is None else flow.tie(result, axis, call)
    if result is None:
        return ONE if size == 1 else fixed([size], f"what {call.place} gives")[0]
    return result


@rule("native_dropout")
def dropout(call: Call, flow: Flow) -> Many:
    """The tensor, and which of its entries stay."""
    x = flow.axes(call.args[0])
    return Many((x, x))


@rule("copy")
def copy(call: Call, flow: Flow) -> Axes:
    """Overwrites its first argument by its second, which may be stretched."""
    operands = [flow.axes(ref) for ref in call.args[:2]]
    for back in range(1, len(operands[1]) + 1):
        aligned(call, flow, [operands[0][-back], operands[1][-back]], size_of(operands[0][-back]))
    return operands[0]


@rule("prelu")
def prelu(call: Call, flow: Flow) -> Axes:
    """Slopes [channels] belong to axis 1; a single slope to nothing."""
    x, slopes = flow.axes(call.args[0]), flow.axes(call.args[1])[0]
    if size_of(slopes) == 1:
        return x
    flow.attribute(flow.owners(call, call.args[1], nn.PReLU), "num_parameters", slopes)
    return (x[0], flow.tie(x[1], slopes, call), *x[2:])
