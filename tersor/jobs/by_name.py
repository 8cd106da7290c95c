"""One value for everything, or GLOB=VALUE for each name: how the command line sets what may differ by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tersor.core.errors import InputError

T = TypeVar("T")


def by_name(said: str | Sequence[str], read: Callable[[str], T], what: str, example: str) -> T | dict[str, T]:
    """ "0.9", or "GLOB=0.9" (several, in order) → the value, or shell pattern → value.

    ``read``: makes a value of its text, or raises ValueError. ``what`` and ``example`` are for the InputError.
    """
    parts = [said] if isinstance(said, str) else list(said)

    def value(text: str, told: str) -> T:
        try:
            return read(text)
        except ValueError:
            expected = f"{example}; or GLOB={example} for the tensors of these names"
            raise InputError("not a number", where=what, got=told, expected=expected) from None

    if len(parts) == 1 and "=" not in parts[0]:
        return value(parts[0], parts[0])
    found: dict[str, T] = {}
    for part in parts:
        glob, equals, text = part.rpartition("=")
        if not equals or glob in found:
            raise InputError("unclear", where=what, got=part, expected="one number, or GLOB=NUMBER for each name")
        found[glob] = value(text, part)
    return found


def share(text: str) -> float:
    """ "80%" → 0.8; "0.8" too. Raises ValueError."""
    number, percent, rest = text.strip().partition("%")
    if rest:
        raise ValueError(text)
    return float(number) / 100 if percent else float(number)
