"""The parametrization that holds masked weights at zero."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Masked(nn.Module):
    """w ↦ w where ``keep``, else 0. The stored weight is untouched, so a mask can be replaced and weights regrow.

    ``dense_gradient``: the stored weight is given the gradient of the masked one everywhere, zeros included (straight
    through), for those who ask what a weight that is masked would do; who trains with it masks the gradient again.
    """

    keep: Tensor

    def __init__(self, keep: Tensor):
        super().__init__()
        self.register_buffer("keep", keep.clone())
        self.dense_gradient = False

    def forward(self, weight: Tensor) -> Tensor:
        masked = torch.where(self.keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
        return weight + (masked - weight).detach() if self.dense_gradient else masked


def standing_mask(module: nn.Module, tensor: str) -> Masked | None:
    """The mask that stands on a module's tensor; None where there is none."""
    if not parametrize.is_parametrized(module, tensor):
        return None
    entries = cast(nn.ModuleDict, module.parametrizations)[tensor]
    return next((entry for entry in entries if isinstance(entry, Masked)), None)  # type: ignore[attr-defined]
