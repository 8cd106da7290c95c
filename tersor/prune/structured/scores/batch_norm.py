"""Score by the scales of batch norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tersor.core.errors import InputError
from tersor.core.place import tensor_at
from tersor.core.task import Task
from tersor.graph.group import Group
from tersor.prune.structured.scores.coupling import Combine, Normalise, by_unit, check_coupling, combined, norm_scales
from tersor.prune.structured.scores.score import Score


@final
@dataclass(frozen=True)
class BatchNormScale(Score):
    """|γ| of the batch norms (and instance norms) that a unit passes, averaged where there are several.

    Not normalised by default: γ is comparable between layers, since batch norm made each channel's variance one.
    ``combine``, ``normalise``: see ``combined``. Says most where γ was trained to be sparse.

    Raises InputError where a group passes no batch norm with a scale, naming it.
    Source: Liu et al. 2017, network slimming (arXiv 1708.06519), section 3.
    """

    combine: Combine = "mean"
    normalise: Normalise | None = None

    def __post_init__(self) -> None:
        check_coupling("BatchNormScale", self.combine, self.normalise)

    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        """One float64 tensor [units] for each group; the task is not read."""
        return [self._of(model, group) for group in groups]

    def _of(self, model: nn.Module, group: Group) -> Tensor:
        scales = norm_scales(model, group, _NormBase)
        if not scales:
            raise InputError(
                "no batch norm scales these channels", where=group.name, got=f"{group.channels} channels",
                expected="a batch norm with affine=True after each layer that is pruned",
                do="Leave the layer out with where=, or take another score (magnitude)",
            )  # fmt: skip
        sizes = [by_unit(tensor_at(model, axis.place).detach().abs(), axis, group.units) for axis in scales]
        return combined(sizes, self.combine, self.normalise)
