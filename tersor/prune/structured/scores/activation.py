"""Score by weights times what they are multiplied with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import final

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tersor.core.device import device_of
from tersor.core.errors import InputError, user_code
from tersor.core.loading import batches_of
from tersor.core.place import module_at
from tersor.core.randomness import seeded
from tersor.core.task import Task
from tersor.graph.flow import Role
from tersor.graph.group import CoupledAxis, Group
from tersor.prune.structured.scores.coupling import Combine, Normalise, by_unit, check_coupling, combined
from tersor.prune.structured.scores.score import Score


@final
@dataclass(frozen=True)
class ActivationWeighted(Score):
    """Σ |w| · ‖x‖ over the weights that read a unit, ‖x‖ being the root mean square of the channel that each weight is
    multiplied with, over ``batches`` calibration batches and all positions.

    The readers are the convolutions and linear layers whose inputs can be seen, that is, that are called as modules;
    others (the projections inside ``nn.MultiheadAttention``) are left out as long as there is one. Where there is none
    (the insides of queries and keys are read by each other) the weights that make the unit stand in for them, weighted
    with what those read. ``combine``, ``normalise``: how several tensors become one number (see ``combined``). Without
    gradients, in eval mode.

    Raises InputError for batches < 1, unknown options, no calibration data, an input that is not finite, and a group
    none of whose readers and makers can be seen, naming it.
    Source: Sun et al. 2024, Wanda (arXiv 2306.11695), equation 1, summed over a unit.
    """

    batches: int = 8
    combine: Combine = "mean"
    normalise: Normalise | None = "mean"

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise InputError("at least one batch is needed", where="ActivationWeighted.batches", got=self.batches)
        check_coupling("ActivationWeighted", self.combine, self.normalise)

    def units(self, model: nn.Module, task: Task, groups: Sequence[Group]) -> list[Tensor]:
        """One float64 tensor [units] for each group."""
        axes = [axis for group in groups for role in _ROLES for axis in _layers(model, group, role)]
        paths = {axis.place.module for axis in axes}
        sizes = root_mean_squares(model, sorted(paths), task, self.batches, "ActivationWeighted")
        return [self._of(model, group, sizes) for group in groups]

    def _of(self, model: nn.Module, group: Group, sizes: dict[str, Tensor]) -> Tensor:
        found = ([axis for axis in _layers(model, group, role) if axis.place.module in sizes] for role in _ROLES)
        seen = next(filter(None, found), None)
        if seen is None:
            others = ", ".join(str(axis.place) for role in _ROLES for axis in group.with_role(role))
            raise InputError(
                "nobody's inputs can be seen who reads or makes these channels", where=group.name, got=others,
                expected="a convolution or linear layer that the forward calls as a module",
                do="Leave the layer out with where=, or take another score (magnitude)",
            )  # fmt: skip
        products = [
            by_unit(weighted(module_at(model, axis.place.module), sizes[axis.place.module]), axis, group.units)
            for axis in seen
        ]
        return combined(products, self.combine, self.normalise)


_ROLES: tuple[Role, ...] = ("consumer", "producer")  # in the order of preference


def _layers(model: nn.Module, group: Group, role: Role) -> list[CoupledAxis]:
    return [
        axis
        for axis in group.with_role(role)
        if axis.place.tensor == "weight" and isinstance(module_at(model, axis.place.module), (_ConvNd, nn.Linear))
    ]


def weighted(module: nn.Module, size: Tensor) -> Tensor:
    """|w| · ‖x‖ of a convolution or linear layer, in its weight's shape; ``size`` [input channels]."""
    assert isinstance(module, (_ConvNd, nn.Linear))
    weight = module.weight.detach().abs()
    size = size.to(weight)
    if isinstance(module, _ConvTransposeNd):  # weight [in, out / groups, …]
        return weight * size.view(-1, *[1] * (weight.ndim - 1))
    groups = module.groups if isinstance(module, _ConvNd) else 1  # weight [out, in / groups, …]
    rows = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return (rows * size.view(groups, 1, -1, 1)).reshape(weight.shape)


def root_mean_squares(model: nn.Module, paths: Sequence[str], task: Task, batches: int, who: str) -> dict[str, Tensor]:
    """path → root mean square of each input channel of that module, for those that are called: float64 [channels].

    The modules are convolutions and linear layers. Raises InputError, naming ``who``, where there is no data, or it
    makes an input that is not finite.
    """
    if task.calibration is None:
        raise InputError("the task has no calibration data", where=who, do="Pass task.complete()")
    copied = copy.deepcopy(model).eval()
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(path: str, module: nn.Module, x: Tensor) -> None:
        spatial = module.weight.ndim - 2 if isinstance(module, _ConvNd) else 0
        squares = x.detach().movedim(x.ndim - 1 - spatial, -1).flatten(0, -2).double().square()
        total = squares.sum(0)
        if not bool(torch.isfinite(total).all()):
            raise InputError("a calibration batch makes a value that is not finite", where=f"the input of {path}")
        sums[path] = sums.get(path, 0) + total.cpu()
        counts[path] = counts.get(path, 0) + len(squares)

    for path in paths:
        copied.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: see(path, module, args[0]))
    seen = 0
    with seeded(0, task.calibration), torch.no_grad():
        for batch in islice(batches_of(task.calibration, "task.calibration"), batches):
            with user_code("the model does not run on this batch", where=f"task.calibration, batch {seen}"):
                task.outputs(copied, send_to_device(batch, device_of(model)))
            seen += 1
    if seen == 0:
        raise InputError("the loader is empty", where="task.calibration", got="no batch")
    return {path: (total / counts[path]).sqrt() for path, total in sums.items()}
