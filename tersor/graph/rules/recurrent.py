"""Recurrent layers: the hidden state is made and read in the same layer, by four (LSTM), three (GRU) or one gate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tersor.graph.axis import Axis, fix, resolve, split_product, total
from tersor.graph.flow import Flow, Many, Refusal, argument, tensors_in
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*_GATES)
def recurrent(call: Call, flow: Flow) -> Many:
    """weight_ih [gates · h, in], weight_hh [gates · h, h], biases [gates · h]; layers and directions share h, as the
    layer's one ``hidden_size`` says."""
    x, weights = flow.axes(call.args[0]), tensors_in(call.args[2])
    states = tensors_in(call.args[1])
    biased, layers, both = (bool(call.args[3]), call.args[4], bool(argument(call, 7, "bidirectional")))
    each = (2 + 2 * biased) if len(weights) == layers * (1 + both) * (2 + 2 * biased) else 0
    if not each:
        raise Refusal("projects its hidden state")
    hidden = flow.axes(weights[1])[1]
    read: Axis = x[-1]
    for layer in range(layers):
        for direction in range(1 + both):
            own = weights[(layer * (1 + both) + direction) * each :][:each]
            _layer(call, flow, own, read, hidden)
        read = total([resolve(hidden)] * (1 + both))
    for state in states:
        flow.tie(flow.axes(state)[-1], hidden, call)
    owners = flow.owners(call, weights[0], nn.RNNBase)
    flow.attribute(owners, "hidden_size", hidden)
    flow.attribute(owners, "input_size", x[-1])
    state_axes = (*flow.axes(states[0])[:-1], hidden)
    return Many(((*x[:-1], read), *[state_axes] * len(states)))


def _layer(call: Call, flow: Flow, own: Sequence[str], read: Axis, hidden: Axis) -> None:
    flow.tie(flow.axes(own[0])[1], read, call)
    flow.role(own[0], 1, "consumer")
    flow.tie(flow.axes(own[1])[1], hidden, call)
    flow.role(own[1], 1, "consumer")
    for number, ref in enumerate(own):
        gates, made = split_product(flow.axes(ref)[0], _GATES[call.operator])
        fix(gates, f"a gate of {call.place}")
        flow.tie(made, hidden, call)
        if number < 2:
            flow.role(ref, 0, "producer")
