"""Tensors that the forward makes, and calls that give none."""

from __future__ import annotations

from typing import Any

from tersor.graph.axis import ONE, Axis, Fixed, Leaf
from tersor.graph.flow import Axes, Flow, Many
from tersor.graph.rules.registry import rule
from tersor.graph.sizes import Dim, Size, source_of
from tersor.graph.trace import Call

# Torch functions that take sizes, and where: after a tensor (x.new_zeros(2, 3)) or first (torch.zeros(2, 3)).
_FIRST = {"zeros", "ones", "full", "empty", "rand", "randn"}
_SECOND = {"new_zeros", "new_ones", "new_full", "new_empty"}


@rule(
    "arange", "empty", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros", "new_empty", "new_full", "new_ones",
    "new_zeros", "rand", "randn", "tril_indices", "triu_indices",
)  # fmt: skip
def make(call: Call, flow: Flow) -> Axes:
    """A tensor of stated sizes: literal ones stay, those of another tensor's shape or an attribute follow it."""
    assert call.shape is not None
    sizes = _stated_sizes(call)
    return tuple(axis_of(call, flow, size, length) for size, length in zip(sizes, call.shape, strict=True))


def _stated_sizes(call: Call) -> list[Any]:
    assert call.shape is not None
    nothing: list[Any] = [None] * len(call.shape)
    if call.said is None:
        return nothing
    name = call.function.rpartition(".")[2]
    args, kwargs = call.said
    given = args if name in _FIRST else args[1:] if name in _SECOND else ()
    given = kwargs.get("size", given[0] if given and isinstance(given[0], tuple) else given)
    return list(given) if len(given) == len(call.shape) else nothing


def axis_of(call: Call, flow: Flow, size: Any, length: int) -> Axis:
    """The axis that a call makes with a stated size: another tensor's own axis, one that follows an attribute, or a
    fixed one."""
    if length == 1:
        return ONE
    if isinstance(size, Size) and size == length:
        source = source_of(size)
        if isinstance(source, Dim):
            axes = flow.value(source.function, source.index)
            if axes is not None:
                return axes[source.dim]
        leaf = Leaf(length)
        flow.needs(leaf, size, call)
        return leaf
    return Fixed(length, f"what {call.place} makes")


@rule("assert_tensor_metadata", "assert_async", "assert_scalar")
def check(call: Call, flow: Flow) -> Many:
    """A check gives nothing and keeps nothing."""
    return Many(())
