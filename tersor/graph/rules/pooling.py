"""Operators over the last, spatial axes: pooling, resizing, padding and patches. Channels pass."""

from __future__ import annotations

from tersor.graph.axis import Axis, Fixed, fix, product, resolve, size_of, split_product, total
from tersor.graph.flow import Axes, Flow, Many, argument, fixed
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call

_POOLS = [
    f"{kind}_pool{spatial}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for spatial in (1, 2, 3)
] + [f"max_pool{spatial}d_with_indices" for spatial in (1, 2, 3)]
_RESIZES = [
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_nearest_exact1d", "upsample_linear1d",
    "upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "upsample_bilinear2d_aa", "upsample_bicubic2d_aa", "grid_sampler_2d", "grid_sampler",
]  # fmt: skip


@rule(*_POOLS, *_RESIZES)
def pool(call: Call, flow: Flow) -> Axes | Many:
    """The operator's name says how many last axes it works on."""
    x = flow.axes(call.args[0])
    spatial = int(next((letter for letter in call.operator if letter.isdigit()), "2"))
    flow.freeze_space(call, x[len(x) - spatial :])
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
    constant = call.operator == "constant_pad_nd" or (
        call.operator == "pad" and argument(call, 2, "mode", "constant") == "constant"
    )
    for number in range(len(amounts) // 2):
        before, after = amounts[2 * number], amounts[2 * number + 1]
        if before or after:
            dim = len(x) - 1 - number
            x[dim] = _padded(call, flow, x[dim], before, after, constant)
    return tuple(x)


def _padded(call: Call, flow: Flow, axis: Axis, before: int, after: int, constant: bool) -> Axis:
    axis = resolve(axis)
    if isinstance(axis, Fixed):
        return Fixed(axis.size + before + after, axis.reason)
    if before < 0 or after < 0 or not constant:
        flow.freeze(axis, f"is cropped or mirrored by {call.place}")
        return Fixed(size_of(axis) + before + after, f"what {call.place} gives")
    added = f"added by {call.place}"
    return total([Fixed(before, added), axis, Fixed(after, added)])


@rule("im2col")
def im2col(call: Call, flow: Flow) -> Axes:
    """[batch, c, h, w] → [batch, c · kernel, patches]."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    flow.freeze_space(call, x[-2:])
    kernel = call.shape[-2] // size_of(x[-3])
    made = product([resolve(x[-3]), Fixed(kernel, "positions of a patch")])
    return (*x[:-3], made, Fixed(call.shape[-1], "patches"))


@rule("col2im")
def col2im(call: Call, flow: Flow) -> Axes:
    """[batch, c · kernel, patches] → [batch, c, h, w]."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    channels, kernel = split_product(x[-2], call.shape[-3])
    fix(kernel, f"a position of a patch for {call.place}")
    flow.freeze(x[-1], f"counts patches for {call.place}")
    return (*x[:-2], channels, *fixed(call.shape[-2:], "height and width"))


@rule("unfold")
def unfold(call: Call, flow: Flow) -> Axes:
    """Windows along one axis become a last axis."""
    assert call.shape is not None
    x = flow.axes(call.args[0])
    dim = argument(call, 1, "dimension") % len(x)
    flow.freeze(x[dim], f"is cut into windows by {call.place}")
    windows, length = fixed((call.shape[dim], call.shape[-1]), f"windows of {call.place}")
    return (*x[:dim], windows, *x[dim + 1 :], length)
