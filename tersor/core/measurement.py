"""A number with its unit, interval and conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """``value`` in ``unit``; [``low``, ``high``] is its 95 % interval (None: exact, or not estimable); ``n`` samples.

    ``conditions`` says what a reader needs to repeat it: batch size, threads, split, backend.
    """

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    n: int | None = None
    device: str = "cpu"
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, estimate: tuple[float, float, float], unit: str, n: int | None = None, *, scale: float = 1.0,
        **conditions: Any,
    ) -> Measurement:  # fmt: skip
        """(value, low, high), each times ``scale``; an end that is not finite cannot be told."""
        value = scale * estimate[0]
        low, high = (scale * end if math.isfinite(end) else None for end in estimate[1:])
        return cls(value, unit, low, high, n, conditions=conditions)

    @property
    def vague(self) -> bool:
        """Whether the interval of a ratio is so wide (half as large again) that its middle should not be quoted."""
        return self.low is not None and self.high is not None and self.high > 1.5 * self.low > 0

    def to_json(self) -> dict[str, Any]:
        """The measurement as plain JSON values."""
        return {**asdict(self), "conditions": dict(self.conditions)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """The inverse of ``to_json``."""
        return cls(**data)
