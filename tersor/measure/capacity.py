"""What a student has of its teacher's size: parameters, multiply-accumulates and bytes, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tersor.core.measurement import Measurement
from tersor.measure.compute import macs
from tersor.measure.size import effective_weights, nonzeros, parameters


@dataclass(frozen=True)
class Capacity:
    """``student`` and ``teacher``: name → Measurement, of parameters, nonzeros, macs (per sample) and size_bytes."""

    student: Mapping[str, Measurement]
    teacher: Mapping[str, Measurement]

    def ratio(self, name: str) -> float:
        """The student's part of the teacher's."""
        return self.student[name].value / self.teacher[name].value

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: {name: {student, teacher, ratio}}."""
        return {
            name: {
                "student": self.student[name].to_json(),
                "teacher": self.teacher[name].to_json(),
                "ratio": self.ratio(name),
            }
            for name in self.student
        }

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "student", "teacher", "student / teacher")]
        for name in self.student:
            values = [f"{side[name].value:,.0f}" for side in (self.student, self.teacher)]
            rows.append((name, *values, f"{self.ratio(name):.3f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for first, *others in rows:
            right = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *right]))
        return "\n".join(lines)


def capacity(
    student: nn.Module,
    teacher: nn.Module,
    example_inputs: tuple[Tensor, ...],
    teacher_inputs: tuple[Tensor, ...] | None = None,
) -> Capacity:
    """The student's size beside the teacher's; printed, it is a table.

    ``example_inputs``: of both, batch first; ``teacher_inputs``: of a teacher that takes others. Tied weights count
    once; size_bytes are those of the parameters as they lie in memory, zeros included. Raises what ``macs`` does.

    >>> import torch
    >>> found = capacity(nn.Linear(8, 2), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), (torch.zeros(1, 8),))
    >>> print(found)
                student  teacher  student / teacher
    parameters       18       90              0.200
    nonzeros         18       90              0.200
    macs             16       80              0.200
    size_bytes       72      360              0.200
    """
    given = teacher_inputs or example_inputs
    return Capacity(_sizes(student, example_inputs), _sizes(teacher, given))


def _sizes(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Measurement]:
    bytes_ = sum(tensor.numel() * tensor.element_size() for _, tensor in effective_weights(model))
    return {
        "parameters": parameters(model),
        "nonzeros": nonzeros(model),
        "macs": macs(model, inputs),
        "size_bytes": Measurement(bytes_, "bytes"),
    }
