"""Convolutions: input channels are read by the weight, output channels made by it."""

from __future__ import annotations

from typing import Any

from torch.nn.modules.conv import _ConvNd

from tersor.graph.axis import Axis, fix, leaves, product, resolve, size_of, split_product
from tersor.graph.flow import Axes, Flow, argument, fixed, stated
from tersor.graph.rules.linear import reads_weight
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call


@rule("conv1d", "conv2d", "conv3d")
def convolution(call: Call, flow: Flow) -> Axes:
    """weight [out, in / groups, …]; input [batch, in, …] → [batch, out, …]."""
    x, ref = flow.axes(call.args[0]), call.args[1]
    weight = flow.axes(ref)
    groups = argument(call, 6, "groups", 1)
    position = len(x) + 1 - len(weight)
    if groups == 1:
        flow.tie(x[position], weight[1], call)
    else:
        rows, inner = _by_group(call, flow, x[position], groups)
        made_rows, multiplier = _by_group(call, flow, weight[0], groups)
        flow.tie(rows, made_rows, call)
        flow.tie(inner, weight[1], call)
        _mark(call, flow, rows, inner, multiplier)
    if size_of(weight[1]) > 1:
        reads_weight(call, flow, 1, 1, of=(0, position))
    if groups == 1 or size_of(weight[1]) > 1:
        flow.role(ref, 0, "producer")
    _sizes(call, flow, ref, x[position], weight[0])
    return _result(call, flow, x, weight[0], len(weight) - 2)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(call: Call, flow: Flow) -> Axes:
    """weight [in, out / groups, …]; input [batch, in, …] → [batch, out, …]."""
    x, ref = flow.axes(call.args[0]), call.args[1]
    weight = flow.axes(ref)
    groups = argument(call, 6, "groups", 1)
    position = len(x) + 1 - len(weight)
    flow.tie(x[position], weight[0], call)
    made = weight[1]
    if groups > 1:
        rows, inner = _by_group(call, flow, x[position], groups)
        _mark(call, flow, rows, inner, weight[1])
        made = product([resolve(rows), resolve(weight[1])])
    if size_of(weight[0]) > groups or groups == 1:
        reads_weight(call, flow, 1, 0, of=(0, position))
        flow.role(ref, 1, "producer")
    _sizes(call, flow, ref, x[position], made)
    return _result(call, flow, x, made, len(weight) - 2)


def _by_group(call: Call, flow: Flow, axis: Axis, groups: int) -> tuple[Axis, Axis]:
    """Channels as groups × channels of a group; the number of groups is the layer's attribute, or the user's own."""
    rows, inner = split_product(axis, groups)
    number = stated(call, 6, "groups")
    flow.needs(rows, number if number is not None else groups, call)
    return rows, inner


def _mark(call: Call, flow: Flow, rows: Axis, inner: Axis, made: Axis) -> None:
    """Inside groups channels may go equally, or whole groups; a depthwise layer's channels go whole."""
    if size_of(inner) == 1:
        fix(made, f"the channel multiplier of {call.place}")
    else:
        for leaf in leaves(rows):
            leaf.group = True


def _sizes(call: Call, flow: Flow, ref: Any, channels: Axis, made: Axis) -> None:
    bias = argument(call, 2, "bias")
    if bias is not None:
        flow.tie(flow.axes(bias)[0], made, call)
    owners = flow.owners(call, ref, _ConvNd)
    flow.attribute(owners, "in_channels", channels)
    flow.attribute(owners, "out_channels", made)


def _result(call: Call, flow: Flow, x: Axes, made: Axis, spatial: int) -> Axes:
    assert call.shape is not None
    flow.freeze_space(call, x[len(x) - spatial :])
    return (*x[: len(x) - spatial - 1], made, *fixed(call.shape[len(x) - spatial :], "height and width"))
