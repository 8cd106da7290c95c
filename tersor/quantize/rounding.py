"""Learnt rounding: of each weight, whether it goes to the grid point below or above, by gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.core.edit import Quantizer
from tersor.quantize.weight_only import spread

ZETA, GAMMA = 1.1, -0.1  # the rectified sigmoid is stretched to (γ, ζ), so that it reaches 0 and 1
Error = Callable[[int, list[Tensor]], Tensor]
BETAS = (20.0, 2.0)  # the regulariser's exponent, from first to last step
WARM = 0.2  # the share of steps before the regulariser begins
PULL = 100.0  # its weight beside the error, both relative to what rounding to nearest costs
RATE = 1e-2


@dataclass(eq=False)
class Rounding:
    """w̃ = below + h(V) · gap, where h(V) = clip(σ(V) (ζ − γ) + γ, 0, 1) begins at the weight itself.

    ``below``, ``gap``: like the weight; 0 is the gap where the weight is clipped to an end of its grid, and where it is
    zero (masked, or any that are: zero lies on every grid). ``V``: the parameter.
    """

    below: Tensor
    gap: Tensor
    V: Tensor

    @classmethod
    def of(cls, weight: Tensor, grid: Quantizer) -> Rounding:
        """The rounding of ``weight`` to ``grid``."""
        weight = weight.float()
        scale, zero_point = (part.to(weight.device) for part in spread(grid, weight.shape))
        steps = (weight / scale).floor() + zero_point
        low, high = (((steps + n).clamp(grid.quant_min, grid.quant_max) - zero_point) * scale for n in (0, 1))
        below, gap = torch.where(weight == 0, 0.0, low), torch.where(weight == 0, 0.0, high - low)
        share = torch.where(gap > 0, (weight - below) / gap, 0.5).clamp(0, 1)
        return cls(below, gap, torch.logit((share - GAMMA) / (ZETA - GAMMA)))

    def h(self) -> Tensor:
        """How far up each weight is: [0, 1]."""
        return (torch.sigmoid(self.V) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def soft(self, h: Tensor) -> Tensor:
        """The weight on its way."""
        return self.below + h * self.gap

    def hard(self) -> Tensor:
        """The weight on its grid."""
        return self.below + (self.V.detach() > 0).to(self.gap) * self.gap


def undecided(h: Tensor, beta: float) -> Tensor:
    """Σ 1 − |2h − 1|^β: 0 where all are 0 or 1. Nagel et al. 2020, equation 24."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def learn(roundings: Sequence[Rounding], error: Error, steps: int) -> None:
    """Minimise error + λ · undecided over V by Adam, the pull's exponent falling.

    ``error(step, weights)``: of the minibatch for that step, the squared error of the outputs, per row. λ is ``PULL``
    times what rounding to the nearest costs per weight, so that neither the outputs' size nor the bits matter.
    """
    cost = _cost_of_nearest(roundings, error)
    parameters = [rounding.V.requires_grad_() for rounding in roundings]
    optimizer = torch.optim.Adam(parameters, RATE)
    warm = int(WARM * steps)
    with torch.enable_grad():
        for step in range(steps):
            hs = [rounding.h() for rounding in roundings]
            loss = error(step, [rounding.soft(h) for rounding, h in zip(roundings, hs, strict=True)])
            if step >= warm:
                beta = BETAS[1] + (BETAS[0] - BETAS[1]) * (1 - (step - warm) / (steps - warm))
                loss = loss + PULL * cost * torch.stack([undecided(h, beta) for h in hs]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for rounding in roundings:
        rounding.V = rounding.V.detach()


@torch.no_grad()
def _cost_of_nearest(roundings: Sequence[Rounding], error: Error) -> float:
    nearest = [rounding.hard() for rounding in roundings]
    return float(sum(error(step, nearest) for step in range(4))) / 4 / sum(r.V.numel() for r in roundings)
