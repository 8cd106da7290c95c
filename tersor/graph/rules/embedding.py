"""Embeddings: each row's features are channels that the table makes."""

from __future__ import annotations

from torch import nn

from tersor.graph.flow import Axes, Flow
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call


@rule("embedding")
def embedding(call: Call, flow: Flow) -> Axes:
    """weight [entries, features]; indices [...] → [..., features]."""
    ref = call.args[0]
    entries, features = flow.axes(ref)
    flow.freeze(entries, f"is looked up by index at {call.place}")
    flow.role(ref, 1, "producer")
    flow.attribute(flow.owners(call, ref, nn.Embedding), "embedding_dim", features)
    return (*flow.axes(call.args[1]), features)
