"""Normalisations: scale and shift go with their channels; statistics are taken over the channels that stay."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from tersor.graph.axis import leaves, size_of, split_product
from tersor.graph.flow import Axes, Flow, Many, argument, stated, tensors_in
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call


@rule("batch_norm", "instance_norm")
def batch_norm(call: Call, flow: Flow) -> Axes:
    """Scale, shift, mean and variance [channels] belong to axis 1."""
    x = flow.axes(call.args[0])
    channels = x[1]
    parameters = tensors_in(list(call.args[1:5]))
    for ref in parameters:
        channels = flow.tie(channels, flow.axes(ref)[0], call)
    flow.attribute(flow.owners(call, next(iter(parameters), None), _NormBase), "num_features", channels)
    for dim in (0, *range(2, len(x))):  # a weight that is standardised has channels here
        flow.statistics(call, 0, dim, dim)
    return (x[0], channels, *x[2:])


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call, flow: Flow) -> Axes:
    """The last axes share their statistics."""
    x = flow.axes(call.args[0])
    sizes = argument(call, 1, "normalized_shape")
    first = len(x) - len(sizes)
    said = stated(call, 1, "normalized_shape", sizes)
    for number, dim in enumerate(range(first, len(x))):
        flow.statistics(call, 0, dim, dim)
        if size_of(x[dim]) > 1:
            flow.needs(x[dim], said[number] if isinstance(said, (tuple, list)) else said, call)
    for ref in _parameters(call):
        for axis, mine in zip(flow.axes(ref), x[first:], strict=True):
            flow.tie(mine, axis, call)
    return x


@rule("group_norm")
def group_norm(call: Call, flow: Flow) -> Axes:
    """Axis 1 shares its statistics within each group, with the axes after it; groups stay alike."""
    x = flow.axes(call.args[0])
    count = argument(call, 1, "num_groups")
    groups, inner = split_product(x[1], count)
    if size_of(inner) > 1:
        for leaf in leaves(groups):
            leaf.group = True
    flow.grouped[call.name] = groups
    flow.needs(groups, stated(call, 1, "num_groups", count), call)
    flow.attribute(flow.owners(call, next(iter(_parameters(call)), None), nn.GroupNorm), "num_channels", x[1])
    flow.statistics(call, 0, 1, 1)
    for ref in _parameters(call):
        flow.tie(x[1], flow.axes(ref)[0], call)
    return x


def _parameters(call: Call) -> list[Any]:
    return list(call.refs())[1:]


@rule("weight_norm", "weight_norm_interface")
def weight_norm(call: Call, flow: Flow) -> Axes | Many:
    """v · g / ‖v‖, the norm over all axes but ``dim``."""
    v, g = flow.axes(call.args[0]), flow.axes(call.args[1])
    dim = argument(call, 2, "dim", 0) % len(v)
    for number in range(len(v)):
        if number != dim:
            flow.statistics(call, 0, number, number)
    flow.tie(v[dim], g[dim], call)
    return v if call.shape is not None else Many((v, g))
