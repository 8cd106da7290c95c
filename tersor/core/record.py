"""One finished step of a run, as it is kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tersor.core.measurement import Measurement


@dataclass(frozen=True)
class Record:
    """A step that ended: what it was, what it did (plan summaries), what was measured after it, and how long it took.

    ``measurements``: name → Measurement (names in docs/summary-schema.md). ``settings``: the step's fields.
    """

    number: int
    name: str
    title: str
    settings: Mapping[str, Any]
    measurements: Mapping[str, Measurement]
    seed: int
    seconds: float
    plans: tuple[Mapping[str, Any], ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[Mapping[str, Any], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {
            **{k: v for k, v in self.__dict__.items() if k != "measurements"},
            "measurements": {name: m.to_json() for name, m in self.measurements.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """The inverse of ``to_json``."""
        measurements = {name: Measurement.from_json(m) for name, m in data["measurements"].items()}
        listed = {name: tuple(data.get(name, ())) for name in ("plans", "history", "layers")}
        return cls(**{**data, **listed, "measurements": measurements})
