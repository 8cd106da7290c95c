"""Checks of an objective's settings."""

from __future__ import annotations

import math

from tersor.core.errors import InputError


def expect_positive(where: str, **values: float) -> None:
    """Raise InputError unless each of ``values`` is in 0 … ∞, both ends left out."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise InputError(f"the {name} must be positive", where=f"{where}.{name}", got=value)


def expect_weights(where: str, **weights: float) -> None:
    """Raise InputError for a weight that is negative or not finite, and where all of them are zero."""
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise InputError("must be a number from 0 on", where=f"{where}.{name}", got=value)
    if not any(weights.values()):
        raise InputError("all weights are zero", where=where, expected=f"{' or '.join(weights)} above 0")


def expect_one_of(where: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise InputError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise InputError("unknown", where=where, got=repr(value), expected=" or ".join(allowed))
