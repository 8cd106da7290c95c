"""How channels that bear a positive factor go through operators, up to whoever reads them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tersor.graph.trace import Call, Ref
from tersor.quantize.points import clamps_from_zero, upper_bound

# Of a value, the number of the channel whose factor each element bears, -1 for none: int64, an axis for each of the
# value's, of size 1 where the number does not change along it. Of several results, a list.
Value = Tensor | list[Tensor]
Shapes = Mapping[str, tuple[int, ...]]

# f(s · x) = s · f(x) for every s > 0, element by element.
HOMOGENEOUS = {
    "abs", "alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "leaky_relu", "lift_fresh_copy",
    "neg", "prelu", "prelu_kernel", "relu", "to", "to_copy", "type_as",
}  # fmt: skip
# Move, repeat or leave out elements.
MOVES = {
    "channel_shuffle", "chunk", "expand", "flatten", "getitem", "movedim", "narrow", "numpy_T", "permute",
    "pixel_shuffle", "pixel_unshuffle", "repeat", "repeat_interleave", "reshape", "roll", "select", "slice", "split",
    "split_with_sizes", "squeeze", "swapaxes", "t", "transpose", "unbind", "unflatten", "unsafe_view", "unsqueeze",
    "view",
}  # fmt: skip
# Homogeneous over the last so many axes.
SPATIAL = {
    **{f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)},
    **{f"upsample_nearest{n}d": n for n in (1, 2, 3)},
    "upsample_linear1d": 1, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2,
}  # fmt: skip
REDUCTIONS = {"mean", "sum", "amax", "amin"}
JOINS = {"add", "sub", "maximum", "minimum"}
MATMULS = {"matmul", "bmm"}


class Refused(Exception):
    """A factor may not wander here; the message says why."""


def carried(call: Call, values: Mapping[str, Value], shapes: Shapes) -> Value:
    """What the result of ``call`` bears, where ``values`` says what its operands bear. Raises Refused."""
    name = call.operator
    if name in HOMOGENEOUS or (clamps_from_zero(call) and upper_bound(call) is None):
        return _sole(call, values)
    rule = next((rule for operators, rule in _RULES if name in operators), None)
    if rule is None:
        raise Refused(_does_not_commute(call))
    return rule(call, values, shapes)


def _does_not_commute(call: Call) -> str:
    text = f"{call.place} does not commute with a positive factor"
    if (bound := upper_bound(call)) is not None:
        return f"{text}: it clips at {bound:g}"
    return f"{text}: fold batch norm first" if call.operator == "batch_norm" else text


def _sole(call: Call, values: Mapping[str, Value]) -> Tensor:
    """What the first operand bears, being the only one that bears anything."""
    first = values.get(call.args[0]) if isinstance(call.args[0], Ref) else None
    if not isinstance(first, Tensor) or any(ref in values for ref in list(call.refs())[1:]):
        raise Refused(_does_not_commute(call))
    return first


def _move(call: Call, values: Mapping[str, Value], shapes: Shapes) -> Value:
    """Do to the numbers what is done to the values."""
    first = values[call.args[0]] if call.args[0] in values else None
    if isinstance(first, list):
        return first[call.args[1]]
    if first is None or any(isinstance(ref, Ref) for ref in list(call.refs())[1:]):
        raise Refused(_does_not_commute(call))
    full = (
        first.float().expand(shapes[call.args[0]]).contiguous()
    )  # float32 counts to 2^24, and every operator takes it
    moved = _function(call)(full, *call.args[1:], **call.kwargs)
    return [_compressed(part) for part in moved] if isinstance(moved, (tuple, list)) else _compressed(moved)


def _function(call: Call) -> Callable[..., Any]:
    if call.operator == "getitem":
        return operator.getitem
    namespace, name, overload = call.overload.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _compressed(full: Tensor) -> Tensor:
    """Size 1 on each axis along which the numbers do not change."""
    for axis in range(full.ndim):
        first = full.narrow(axis, 0, 1)
        if bool((full == first).all()):
            full = first
    return full.long()


def _spatial(call: Call, values: Mapping[str, Value], shapes: Shapes) -> Tensor:
    return _constant(call, _sole(call, values), range(-SPATIAL[call.operator], 0))


def _constant(call: Call, value: Tensor, axes: Sequence[int]) -> Tensor:
    """``value``, where it does not change along ``axes``. Raises Refused: the call would mix factors."""
    if any(value.shape[axis] != 1 for axis in axes):
        raise Refused(f"{call.place} mixes its channels")
    return value


def _reduce(call: Call, values: Mapping[str, Value], shapes: Shapes) -> Tensor:
    value = _sole(call, values)
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    axes = range(value.ndim) if given is None or given == [] else [given] if isinstance(given, int) else given
    value = _constant(call, value, list(axes))
    assert call.shape is not None, "a reduction gives one tensor"
    kept = len(call.shape) == value.ndim
    return value if kept else value.squeeze([axis % value.ndim for axis in axes])


def _pad(call: Call, values: Mapping[str, Value], shapes: Shapes) -> Tensor:
    mode = call.args[2] if len(call.args) > 2 else call.kwargs.get("mode", "constant")
    fill = call.args[3] if len(call.args) > 3 else call.kwargs.get("value")
    if call.operator == "constant_pad_nd":
        mode, fill = "constant", call.args[2] if len(call.args) > 2 else 0
    if mode == "constant" and fill:
        raise Refused(f"{call.place} pads with {fill}")
    widths = call.args[1]
    padded = [-1 - n // 2 for n, width in enumerate(widths) if width]
    return _constant(call, _sole(call, values), padded)


def _join(call: Call, values: Mapping[str, Value], shapes: Shapes) -> Tensor:
    """An addition commutes where both operands bear the same factors."""
    assert call.shape is not None, "additions give one tensor"
    both = [values.get(operand) if isinstance(operand, Ref) else None for operand in call.args[:2]]
    first, second = (_aligned(value, len(call.shape)) if isinstance(value, Tensor) else None for value in both)
    if first is None or second is None or not _equal(first, second):
        raise Refused(f"{call.place} joins it with what bears another factor")
    return first


def _product(call: Call, values: Mapping[str, Value], shapes: Shapes) -> Tensor:
    """A product with what bears no factor bears the factor; so does a quotient, upstairs."""
    bearing = [n for n, operand in enumerate(call.args[:2]) if isinstance(operand, Ref) and operand in values]
    value = values[call.args[bearing[0]]]
    if len(bearing) > 1 or not isinstance(value, Tensor) or (call.operator == "div" and bearing != [0]):
        raise Refused(_does_not_commute(call))
    assert call.shape is not None, "products give one tensor"
    return _aligned(value, len(call.shape))


def _aligned(value: Tensor, axes: int) -> Tensor:
    return value.view(*[1] * (axes - value.ndim), *value.shape)


def _equal(first: Tensor, second: Tensor) -> bool:
    return torch.equal(*torch.broadcast_tensors(first, second))


def _matmul(call: Call, values: Mapping[str, Value], shapes: Shapes) -> Tensor:
    """Rows of the left operand and columns of the right one keep their factor; what is summed over must bear none."""
    left, right = call.args[:2]
    if (left in values) == (right in values) or min(len(shapes[left]), len(shapes[right])) < 2:
        raise Refused(_does_not_commute(call))
    value = values[left if left in values else right]
    if not isinstance(value, Tensor):
        raise Refused(_does_not_commute(call))
    assert call.shape is not None, "products give one tensor"
    return _aligned(_constant(call, value, [-1 if left in values else -2]), len(call.shape))


def _attention(call: Call, values: Mapping[str, Value], shapes: Shapes) -> Tensor:
    """softmax(q kᵀ) v bears what v does."""
    name = call.args[2]
    value = values.get(name)
    if not isinstance(value, Tensor) or any(ref in values for ref in call.refs() if ref != name):
        raise Refused(_does_not_commute(call))
    value = _constant(call, value, [-2])
    heads, given = (call.shape or ())[-3], shapes[name][-3]
    if value.shape[-3] != 1 and heads != given:  # grouped queries
        value = value.repeat_interleave(heads // given, -3)
    return value


def _cat(call: Call, values: Mapping[str, Value], shapes: Shapes) -> Tensor:
    """Side by side; what bears no factor is -1."""
    assert call.shape is not None, "a concatenation gives one tensor"
    axis = (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)) % len(call.shape)
    parts = []
    for name in call.args[0]:
        value = values.get(name, torch.full([1] * len(call.shape), -1))
        if isinstance(value, list):
            raise Refused(_does_not_commute(call))
        parts.append(value)
    common = [max(part.shape[d] for part in parts) for d in range(len(call.shape))]
    for n, name in enumerate(call.args[0]):
        common[axis] = shapes[name][axis]
        parts[n] = parts[n].expand(common)
    return _compressed(torch.cat(parts, axis))


_RULES: tuple[tuple[set[str] | Mapping[str, int], Callable[[Call, Mapping[str, Value], Shapes], Value]], ...] = (
    (MOVES, _move),
    (SPATIAL, _spatial),
    (REDUCTIONS, _reduce),
    ({"pad", "constant_pad_nd"}, _pad),
    (JOINS, _join),
    ({"mul", "div"}, _product),
    (MATMULS, _matmul),
    ({"scaled_dot_product_attention"}, _attention),
    ({"cat"}, _cat),
)
