"""Products of two computed tensors: not followed yet, so their channels stay."""

from __future__ import annotations

from tersor.graph.flow import Axes, Flow, Many
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call


@rule("matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention")
def product(call: Call, flow: Flow) -> Axes | Many:
    """Freezes what is multiplied."""
    return flow.give_up(call, f"is multiplied with another computed tensor by {call.place}")
