"""Redundancy: how much of each weight tensor a compression method might do without."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.core.finite import expect_finite
from tersor.measure.size import effective_weights

PERCENTILES = (50, 70, 80, 90, 95, 99)
NEAR_ZERO = 0.1  # of the tensor's mean |w|
DEAD = 1e-3  # of the tensor's median channel norm
ENERGY = 0.95


def redundancy(model: nn.Module) -> tuple[dict[str, Any], ...]:
    """A row for each weight tensor of two or more dimensions, by the values that the forward uses.

    Keys: path (of the module), tensor, near_zero (fraction of |w| ≤ 0.1 · mean |w|), zeros (fraction exactly zero),
    percentiles ("p50" … "p99" of |w|), std, dead_channels (output channels, dimension 0, whose norm is at most 1e-3 of
    the median channel's), channels, rank_95 (how many singular directions hold 95 % of Σσ²), full_rank. Raises
    InputError, with the count, for a weight that is not finite.
    """
    return tuple(
        {"path": place.module, "tensor": place.tensor, **_row(tensor, str(place))}
        for place, tensor in effective_weights(model)
        if tensor.ndim >= 2 and tensor.numel() > 0 and tensor.is_floating_point()
    )


def _row(tensor: Tensor, where: str) -> dict[str, Any]:
    expect_finite(tensor, where, "the redundancy of weights that are not finite is unknown")
    weight = tensor.cpu().double().flatten(1)
    size = weight.abs()
    norms = weight.norm(dim=1)
    percentiles = np.percentile(size.numpy(), PERCENTILES)
    return {
        "near_zero": float((size <= NEAR_ZERO * size.mean()).double().mean()),
        "zeros": float((size == 0).double().mean()),
        "percentiles": {f"p{p}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
        "std": float(weight.std(correction=0)),
        "dead_channels": int((norms <= DEAD * norms.median()).sum()),
        "channels": len(weight),
        "rank_95": energy_rank(weight),
        "full_rank": min(weight.shape),
    }


def energy_rank(matrix: Tensor, energy: float = ENERGY) -> int:
    """The smallest rank whose truncated SVD of ``matrix`` [m, n] keeps the fraction ``energy`` of Σσ² (0 if all zero).

    σ² are the eigenvalues of the smaller Gram matrix, in float64: exact enough for sums of energy, and much cheaper.
    """
    a = matrix.double()
    gram = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    total = float(squares.sum())
    if total == 0:
        return 0
    held = squares.cumsum(0) / total
    return min(int((held < energy - 1e-12).sum()) + 1, len(squares))
