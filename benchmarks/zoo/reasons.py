"""Why channels stayed: skips counted by their kind, weighed by the compute that they keep."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tersor.core.plan import Skip

MOST = 6  # reasons and layers that are kept
Row = Mapping[str, Any]


def kind_of(reason: str) -> str:
    """A reason without the numbers and paths that make it one layer's: so that equal kinds can be counted.

    >>> kind_of("64 channels are frozen: the forward's view of features.3.block.0 has a literal 64")
    "# channels are frozen: the forward's view of … has a literal #"
    """
    reason = re.sub(r"\b[\w<>]+(?:\.[\w<>]+)+\b", "…", reason)
    return re.sub(r"\d+", "#", reason)


def reasons(skips: Sequence[Skip], after: Sequence[Row]) -> list[dict[str, Any]]:
    """The kinds of reasons, heaviest first: how often, and which share of the MACs left the skipped layers have."""
    left = {row["path"]: row["macs"] for row in after}
    total = sum(left.values()) or 1
    counts = Counter(kind_of(skip.reason) for skip in skips)
    shares: Counter[str] = Counter()
    example: dict[str, str] = {}
    for skip in skips:
        kind = kind_of(skip.reason)
        shares[kind] += left.get(skip.place, 0) / total
        example.setdefault(kind, f"{skip.place}: {skip.reason}"[:300])
    ranked = sorted(counts, key=lambda kind: (shares[kind], counts[kind]), reverse=True)[:MOST]
    return [{"reason": k, "count": counts[k], "macs_share": shares[k], "example": example[k]} for k in ranked]


def heaviest(before: Sequence[Row], after: Sequence[Row]) -> list[dict[str, Any]]:
    """The layers that keep most of the MACs left: path, share of all that is left, fraction of their own."""
    whole = {row["path"]: row["macs"] for row in before}
    total = sum(row["macs"] for row in after) or 1
    rows = sorted(after, key=lambda row: row["macs"], reverse=True)[:MOST]
    return [
        {"layer": row["path"], "share": row["macs"] / total, "kept": row["macs"] / whole[row["path"]]}
        for row in rows
        if whole.get(row["path"])
    ]
