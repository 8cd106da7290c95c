"""The parametrization of weights that are stored in half precision."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

HALVES = (torch.float16, torch.bfloat16)


class Widened(nn.Module):
    """w ↦ w in ``dtype``, whatever type it is stored in: the layer computes as it did before."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)

    def extra_repr(self) -> str:
        return str(self.dtype)


def narrow(module: nn.Module, tensor: str, stored: nn.Parameter) -> parametrize.ParametrizationList:
    """Store ``stored`` in place of a module's parameter; who reads it gets the type that it had. Returns the chain."""
    dtype = getattr(module, tensor).dtype
    if not parametrize.is_parametrized(module, tensor):
        parametrize.register_parametrization(module, tensor, nn.Identity())
        chain = _chain(module, tensor)
        chain[0] = Widened(dtype)
    else:
        chain = _chain(module, tensor)
        chain.insert(0, Widened(dtype))  # masks see what the layer saw
    chain.original = stored
    return chain


def _chain(module: nn.Module, tensor: str) -> parametrize.ParametrizationList:
    return cast(nn.ModuleDict, module.parametrizations)[tensor]  # type: ignore[return-value]


def is_narrow(module: nn.Module, tensor: str) -> bool:
    """Whether a module's tensor is stored in half precision."""
    return parametrize.is_parametrized(module, tensor) and any(
        isinstance(entry, Widened) for entry in _chain(module, tensor)
    )
