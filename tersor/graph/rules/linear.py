"""Linear layers: the last axis is read by the weight's columns and made by its rows."""

from __future__ import annotations

from torch import nn

from tersor.graph.axis import Axis
from tersor.graph.flow import Axes, Flow, argument
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call


@rule("linear")
def linear(call: Call, flow: Flow) -> Axes:
    """weight [out, in]; input [..., in] → [..., out]."""
    x, ref = flow.axes(call.args[0]), call.args[1]
    weight = flow.axes(ref)
    made: Axis = weight[0] if len(weight) == 2 else ()  # type: ignore[assignment]
    flow.tie(x[-1], weight[-1], call)
    reads_weight(call, flow, 1, -1, of=(0, -1))
    bias = argument(call, 2, "bias")
    if len(weight) == 1:
        return x[:-1]
    flow.role(ref, 0, "producer")
    if bias is not None:
        flow.tie(flow.axes(bias)[0], made, call)
    owners = flow.owners(call, ref, nn.Linear)
    flow.attribute(owners, "in_features", weight[1])
    flow.attribute(owners, "out_features", made)
    return (*x[:-1], made)


def reads_weight(call: Call, flow: Flow, argument: int, dim: int, *, of: tuple[int, int]) -> None:
    """Dimension ``dim`` of the weight ``argument`` reads channels, dimension ``of[1]`` of argument ``of[0]``. A
    parameter's columns can be zeroed; of a weight that the forward computes the input must be zeroed instead."""
    ref = call.args[argument]
    flow.role(ref, dim, "consumer")
    if not flow.is_parameter(ref):
        flow.sums(call, *of)
