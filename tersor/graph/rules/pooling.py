"""Operators over the last, spatial axes: pooling, resizing and padding. Channels pass."""

from __future__ import annotations

import numpy as np

from tersor.graph.flow import Axes, Axis, Flow, Many, argument, fixed, size_of
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call

_POOLS = [
    f"{kind}_pool{spatial}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for spatial in (1, 2, 3)
] + [f"max_pool{spatial}d_with_indices" for spatial in (1, 2, 3)]
_RESIZES = [
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_nearest_exact1d", "upsample_linear1d",
    "upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
]  # fmt: skip


@rule(*_POOLS, *_RESIZES)
def pool(call: Call, flow: Flow) -> Axes | Many:
    """The operator's name says how many last axes it works on."""
    x = flow.axes(call.args[0])
    spatial = int(next(letter for letter in call.operator if letter.isdigit()))
    for axis in x[len(x) - spatial :]:
        flow.freeze(axis, f"is height or width for {call.place}")
    leading = x[: len(x) - spatial]
    if call.shape is None:  # values and indices
        many = (*leading, *fixed([0] * spatial, "height and width"))
        return Many((many, many))
    return (*leading, *fixed(call.shape[len(leading) :], "height and width"))


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def pad(call: Call, flow: Flow) -> Axes:
    """Amounts are given from the last axis on: [left, right, top, bottom, …]. New positions of a channel axis stay."""
    x = list(flow.axes(call.args[0]))
    amounts = argument(call, 1, "pad")
    for number in range(len(amounts) // 2):
        before, after = amounts[2 * number], amounts[2 * number + 1]
        if before or after:
            dim = len(x) - 1 - number
            x[dim] = _padded(call, flow, x[dim], before, after)
    return tuple(x)


def _padded(call: Call, flow: Flow, axis: Axis, before: int, after: int) -> Axis:
    if not isinstance(axis, np.ndarray):
        return fixed([size_of(axis) + before + after], axis.reason)[0]
    if before < 0 or after < 0 or not call.operator.startswith(("pad", "constant")):
        flow.freeze(axis, f"is cropped or mirrored by {call.place}")
        return fixed([len(axis) + before + after], f"what {call.place} gives")[0]
    flow.literal(axis, call)
    added = flow.fresh(before + after)
    flow.freeze(added, f"is added by {call.place}")
    return np.concatenate([added[:before], axis, added[before:]])
