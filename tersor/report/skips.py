"""What was passed over, grouped by reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class SkipGroup:
    """Places that were passed over for one and the same reason."""

    reason: str
    places: tuple[str, ...]

    def named(self, most: int) -> str:
        """At most so many of the places by name: "a, b and 55 more"."""
        more = len(self.places) - most
        return ", ".join(self.places[:most]) + (f" and {more:,} more" if more > 0 else "")


def group_skips(skips: Iterable[tuple[str, str]]) -> tuple[SkipGroup, ...]:
    """Groups of (place, reason) pairs, the largest first; places in the order given, each once."""
    found: dict[str, dict[str, None]] = {}
    for place, reason in skips:
        found.setdefault(reason, {})[place or "<model>"] = None
    groups = [SkipGroup(reason, tuple(places)) for reason, places in found.items()]
    return tuple(sorted(groups, key=lambda group: -len(group.places)))
