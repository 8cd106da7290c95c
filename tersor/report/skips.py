"""What was passed over, grouped by reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_NAMED = 5  # places that a line names before it only counts


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


def skip_lines(skips: Iterable[Mapping[str, str]], kind: str) -> list[str]:
    """A line for each reason; a state dict has dozens of biases and statistics, passed over for one.

    ``skips``: place and reason of each. ``kind``: what the places are, "tensors".
    """

    def counted(group: SkipGroup) -> str:
        return f"{len(group.places):,} {kind}, " if len(group.places) > _NAMED else ""

    groups = group_skips((skip["place"], skip["reason"]) for skip in skips)
    return [f"skipped {counted(group)}{group.named(_NAMED)}: {group.reason}" for group in groups]
