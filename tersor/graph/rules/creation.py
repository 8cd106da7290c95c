"""Tensors that the forward makes, and calls that give none."""

from __future__ import annotations

from tersor.graph.flow import Axes, Flow, Many, fixed
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call


@rule(
    "arange", "empty", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros", "new_empty", "new_full", "new_ones",
    "new_zeros",
)  # fmt: skip
def make(call: Call, flow: Flow) -> Axes:
    """A tensor of a literal size."""
    assert call.shape is not None
    return fixed(call.shape, f"what {call.place} makes")


@rule("assert_tensor_metadata", "assert_async", "assert_scalar")
def check(call: Call, flow: Flow) -> Many:
    """A check gives nothing and keeps nothing."""
    return Many(())
