"""What a benchmark claims, and how differences between its arms are said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.results import Finished, over_images, over_seeds
from tersor.tensor.statistics import Estimate


@dataclass(frozen=True)
class Claim:
    """What was claimed, what was found, and whether it holds (None: too few seeds, or not run)."""

    text: str
    found: str
    holds: bool | None


def word(holds: bool | None) -> str:
    return {True: "Holds", False: "**Missed**", None: "Too few seeds to say"}[holds]


def difference_cells(one: Sequence[Finished], other: Sequence[Finished]) -> list[str]:
    images, seeds = over_images(one, other), over_seeds(one, other)
    return [f"{images.value:+.2f}", _range(images), _range(seeds) if seeds else ""]


def said_of(images: Estimate, seeds: Estimate | None) -> str:
    return f"over images {_range(images)}" + (f", over seeds {_range(seeds)}" if seeds else "")


def _range(found: Estimate) -> str:
    return f"{found.low:+.2f} to {found.high:+.2f}"
