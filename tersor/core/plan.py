"""A plan: what a method would do to a model, and what it passes over and why. Made without writing anything."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tersor.core.edit import Attribute, Edit, Mask, Precision, Quantizer, Slice, Swap, Write
from tersor.core.place import Place


@dataclass(frozen=True)
class Skip:
    """A place that a method passed over, with the arithmetic or the operator that says why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The edits that ``method`` decided on, in the order in which they are applied, its skips, and a line per layer.

    ``lines``: human-readable (place, what happens) pairs, the body of a dry run. ``preserves``: the edited model must
    compute what the model computes, which is verified when the plan is run. ``reference``: what it must compute
    instead, called like the model.
    """

    method: str
    edits: tuple[Edit, ...] = ()
    skips: tuple[Skip, ...] = ()
    lines: tuple[tuple[str, str], ...] = field(default=())
    preserves: bool = False
    reference: nn.Module | None = field(default=None, repr=False, compare=False)

    def summary(self) -> dict[str, Any]:
        """Counts of edits by kind, the lines and the skips, as plain JSON values."""
        return {
            "method": self.method,
            "edits": dict(Counter(type(edit).__name__ for edit in self.edits)),
            "lines": [list(line) for line in self.lines],
            "skips": [{"place": skip.place, "reason": skip.reason} for skip in self.skips],
        }

    def places(self) -> tuple[Place | str, ...]:
        """Everything the plan touches, in order."""
        found: list[Place | str] = []
        for edit in self.edits:
            match edit:
                case Mask() | Write() | Precision():
                    found.append(edit.place)
                case Quantizer():
                    found.extend(edit.places)
                case Slice():
                    found.extend(cut.place for cut in edit.cuts)
                case Swap() | Attribute():
                    found.append(edit.module)
        return tuple(dict.fromkeys(found))

    def __str__(self) -> str:
        counts = ", ".join(f"{n} × {kind}" for kind, n in self.summary()["edits"].items()) or "no edits"
        body = [f"  {place}: {what}" for place, what in self.lines]
        body += [f"  skipped {skip.place}: {skip.reason}" for skip in self.skips]
        return "\n".join([f"{self.method}: {counts}", *body])
