"""Weights that are not finite are counted and refused, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.core.errors import InputError


def expect_finite(weight: Tensor, where: str, problem: str) -> None:
    """Raise InputError, ``problem`` at ``where``, unless every number of ``weight`` is there and finite; counted."""
    weight = weight.detach()
    if not weight.is_meta and bool(torch.isfinite(weight).all()):
        return
    got = "a tensor on the meta device"
    if not weight.is_meta:
        nan, infinite = int(torch.isnan(weight).sum()), int(torch.isinf(weight).sum())
        got = f"{nan:,} NaN and {infinite:,} infinite of {weight.numel():,}"
    raise InputError(
        problem, where=where, got=got, expected="finite weights",
        do="Take an earlier checkpoint: the network is broken",
    )  # fmt: skip
