"""The parametrization that holds masked weights at zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Masked(nn.Module):
    """w ↦ w where ``keep``, else 0. The stored weight is untouched, so a mask can be replaced and weights regrow."""

    keep: Tensor

    def __init__(self, keep: Tensor):
        super().__init__()
        self.register_buffer("keep", keep.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
