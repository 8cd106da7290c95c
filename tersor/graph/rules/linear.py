"""Linear layers: the last axis is read by the weight's columns and made by its rows."""

from __future__ import annotations

from torch import nn

from tersor.graph.flow import Axes, Flow, argument
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call


@rule("linear")
def linear(call: Call, flow: Flow) -> Axes:
    """weight [out, in]; input [..., in] → [..., out]."""
    x, ref = flow.axes(call.args[0]), call.args[1]
    made, read = flow.weight(ref)
    flow.tie(x[-1], read, call)
    flow.role(ref, 1, "consumer")
    flow.role(ref, 0, "producer")
    bias = argument(call, 2, "bias")
    if bias is not None:
        flow.tie(flow.axes(bias)[0], made, call)
    owners = flow.owners(call, ref, nn.Linear)
    flow.attribute(owners, "in_features", read)
    flow.attribute(owners, "out_features", made)
    return (*x[:-1], made)
