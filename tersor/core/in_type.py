"""Inputs in the type of numbers that a model computes in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from tersor.core.task import Arguments


def in_type_of(model: nn.Module, inputs: Arguments) -> Arguments:
    """The inputs, floats in the type of the model's parameters (bfloat16, say); as they are where it has several.

    What stands behind a parametrisation is another thing than what the model computes with, and does not count.
    """
    types = {
        parameter.dtype for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and "parametrizations" not in name.split(".")
    }  # fmt: skip
    if len(types) != 1:
        return inputs
    (dtype,) = types

    def fitting(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    args, kwargs = tree_map(fitting, (tuple(inputs[0]), dict(inputs[1])))
    return args, kwargs
