"""Normalisations. Batch norm follows its channels; one that reduces over the channels freezes them."""

from __future__ import annotations

from torch.nn.modules.batchnorm import _NormBase

from tersor.graph.flow import Axes, Flow, argument, tensors_in
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call


@rule("batch_norm", "instance_norm")
def batch_norm(call: Call, flow: Flow) -> Axes:
    """Scale, shift, mean and variance [channels] belong to axis 1."""
    x = flow.axes(call.args[0])
    channels = x[1]
    for ref in tensors_in(list(call.args[1:5])):
        channels = flow.tie(channels, flow.axes(ref)[0], call)
    first = next(iter(tensors_in(list(call.args[1:5]))), None)
    flow.attribute(flow.owners(call, first, _NormBase), "num_features", channels)
    return (x[0], channels, *x[2:])


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call, flow: Flow) -> Axes:
    """The last axes share their statistics."""
    x = flow.axes(call.args[0])
    normalised = len(argument(call, 1, "normalized_shape"))
    reason = f"is normalised over by {call.place}"
    for axis in x[len(x) - normalised :]:
        flow.freeze(axis, reason)
    _freeze_parameters(call, flow, reason)
    return x


@rule("group_norm")
def group_norm(call: Call, flow: Flow) -> Axes:
    """Axis 1 shares its statistics within each group, with the axes after it."""
    x = flow.axes(call.args[0])
    reason = f"is normalised over by {call.place}"
    for axis in x[1:]:
        flow.freeze(axis, reason)
    _freeze_parameters(call, flow, reason)
    return x


def _freeze_parameters(call: Call, flow: Flow, reason: str) -> None:
    for ref in list(call.refs())[1:]:
        for axis in flow.axes(ref):
            flow.freeze(axis, reason)
