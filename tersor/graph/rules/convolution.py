"""Convolutions: input channels are read by the weight, output channels made by it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.nn.modules.conv import _ConvNd

from tersor.graph.flow import Atoms, Axes, Axis, Fixed, Flow, argument, fixed
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call


@rule("conv1d", "conv2d", "conv3d")
def convolution(call: Call, flow: Flow) -> Axes:
    """weight [out, in / groups, …]; input [batch, in, …] → [batch, out, …]."""
    x, ref = flow.axes(call.args[0]), call.args[1]
    weight = flow.weight(ref)
    groups = argument(call, 6, "groups", 1)
    channels = x[1 - len(weight)]
    if groups == 1:
        flow.tie(channels, weight[1], call)
        flow.role(ref, 1, "consumer")
        flow.role(ref, 0, "producer")
    elif len(weight[1]) == 1:
        _depthwise(call, flow, channels, weight[0], groups)
    else:
        flow.tie(channels, np.tile(weight[1], groups), call)
        flow.role(ref, 1, "consumer")
        _alike(call, flow, weight[0], groups)
        flow.role(ref, 0, "producer")
    _sizes(call, flow, ref, channels, weight[0])
    return _result(call, flow, x, weight[0], len(weight) - 2)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(call: Call, flow: Flow) -> Axes:
    """weight [in, out / groups, …]; input [batch, in, …] → [batch, out, …]."""
    x, ref = flow.axes(call.args[0]), call.args[1]
    weight = flow.weight(ref)
    groups = argument(call, 6, "groups", 1)
    channels = x[1 - len(weight)]
    flow.tie(channels, weight[0], call)
    made = np.tile(weight[1], groups)
    if groups > 1 and len(weight[0]) == groups:
        made = flow.fresh(len(made))
        flow.freeze(weight[1], f"is the channel multiplier of {call.place}")
        _depthwise(call, flow, channels, made, groups)
    else:
        if groups > 1:
            _alike(call, flow, weight[0], groups)
        flow.role(ref, 0, "consumer")
        flow.role(ref, 1, "producer")
    _sizes(call, flow, ref, channels, made)
    return _result(call, flow, x, made, len(weight) - 2)


def _depthwise(call: Call, flow: Flow, channels: Axis, made: Atoms, groups: int) -> None:
    """Channel g makes output channels g·m … g·m + m − 1; they go together and ``groups`` shrinks with them."""
    multiplier = len(made) // groups
    flow.tie(channels if isinstance(channels, Fixed) else np.repeat(channels, multiplier), made, call)
    owners = flow.owners(call, call.args[1], _ConvNd)
    flow.attribute(owners, "groups", channels)
    if not owners:  # a functional call: its number of groups is the user's own
        flow.literal(channels, call)


def _alike(call: Call, flow: Flow, made: Atoms, groups: int) -> None:
    """Every group keeps as many channels as the first: position j of all groups goes together."""
    flow.tie(made, np.tile(made[: len(made) // groups], groups), call)


def _sizes(call: Call, flow: Flow, ref: Any, channels: Axis, made: Atoms) -> None:
    bias = argument(call, 2, "bias")
    if bias is not None:
        flow.tie(flow.axes(bias)[0], made, call)
    owners = flow.owners(call, ref, _ConvNd)
    flow.attribute(owners, "in_channels", channels)
    flow.attribute(owners, "out_channels", made)


def _result(call: Call, flow: Flow, x: Axes, made: Atoms, spatial: int) -> Axes:
    assert call.shape is not None
    for axis in x[len(x) - spatial :]:
        flow.freeze(axis, f"is height or width for {call.place}")
    return (*x[: len(x) - spatial - 1], made, *fixed(call.shape[len(x) - spatial :], "height and width"))
