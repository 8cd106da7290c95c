"""Pairs of layers as a setting of an objective."""

from __future__ import annotations

from collections.abc import Mapping

from tersor.core.errors import InputError
from tersor.distill.checks import expect_one_of
from tersor.train.layers import Reading, Spread
from tersor.train.taps import What


def reading_of(who: str, pairs: Mapping[str, str], what: What = "output", spread: Spread = "uniform") -> Reading:
    """``pairs`` (the student's layer → the teacher's) as what an objective reads. Raises InputError without any."""
    expect_one_of(f"{who}.spread", spread, ("uniform", "top", "bottom"))
    named = isinstance(pairs, Mapping) and all(isinstance(name, str) for pair in pairs.items() for name in pair)
    if not pairs or not named:
        raise InputError(
            "no pairs of layers", where=f"{who}.pairs", got=repr(pairs),
            expected='the student\'s layer: the teacher\'s, such as {"layer3": "layers.2.*"}',
        )  # fmt: skip
    return Reading(tuple(pairs.items()), what, spread)
