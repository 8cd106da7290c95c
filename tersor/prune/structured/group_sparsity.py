"""Train towards channels that can go: weight decay that grows as a unit of coupled channels shrinks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from tersor.core.check_fields import check_fields
from tersor.core.device import device_of
from tersor.core.errors import InputError
from tersor.core.place import Everything, Selector, TensorPlace, module_at, select, tensor_at
from tersor.core.plan import Skip
from tersor.core.randomness import fixed_randomness
from tersor.core.task import Task
from tersor.graph.group import Group
from tersor.graph.groups import groups_of
from tersor.prune.structured.eligible import open_groups
from tersor.train.objective import Forward, Objective


@final
@dataclass(frozen=True)
class GroupSparsity(Objective):
    """``strength`` · ½ Σ_k γ_k ‖w_k‖² over the units k of all groups, γ_k = 2^(α (I_max − I_k) / (I_max − I_min)).

    w_k is everything coupled to unit k (what makes it, what reads it, scales of norms, depthwise filters; no biases),
    I_k = ‖w_k‖² its importance as it stands at each step. The most important unit of a group decays at the rate
    ``strength`` (γ = 1; the gradient is strength · γ · w, as weight decay's), the least at 2^α times that. Add it to an
    objective: ``TaskLoss() + GroupSparsity(5e-4)``; in a recipe a list: ``[task_loss, {group_sparsity: {…}}]``.

    The groups are those of the model being trained that ``where`` means and nothing freezes (of attention ``heads`` as
    a whole, or equally inside them). They are found once, from the task's example inputs, and again where the model or
    its shapes are others. Nothing else is remembered: a training that was interrupted goes on to the same weights.

    Raises InputError for a negative strength or alpha, for a task without example inputs, and where no group is free.
    Source: Fang et al. 2023, DepGraph (arXiv 2301.12900), section 3.4, equations 4 and 5.
    """

    strength: float = 5e-4
    alpha: float = 4.0
    where: Selector = Everything()
    heads: Literal["whole", "inside"] = "whole"

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("strength", "alpha"):
            if not 0 <= (got := getattr(self, name)) < math.inf:
                raise InputError("must be a number from 0 on", where=f"GroupSparsity.{name}", got=got)

    def of(self, forward: Forward) -> Tensor:
        """The penalty of the weights as they stand: []. No pass through the model."""
        model = forward.student
        return self.strength * penalty(model, _units_of(model, forward.task, self), self.alpha)


@dataclass(frozen=True, eq=False)
class Member:
    """A tensor's dimension in a group, on the model's device: ``positions[i]`` goes with unit ``units[i]``."""

    place: TensorPlace
    dim: int
    positions: Tensor
    units: Tensor


@dataclass(frozen=True, eq=False)
class _Found:
    """The members of each group, with the number of its units; and what they were found for."""

    asked: tuple[object, ...]
    stood: tuple[object, ...]
    groups: tuple[tuple[int, tuple[Member, ...]], ...]


_FOUND: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()


def penalty(model: nn.Module, groups: tuple[tuple[int, tuple[Member, ...]], ...], alpha: float) -> Tensor:
    """½ Σ_groups Σ_k γ_k ‖w_k‖²: [] with a gradient; γ is taken as constant."""
    squares: dict[TensorPlace, Tensor] = {}
    sums: dict[tuple[TensorPlace, int], Tensor] = {}
    total = torch.zeros((), device=device_of(model))
    for units, members in groups:
        norms = torch.zeros(units, device=total.device)
        for member in members:
            if member.place not in squares:
                squares[member.place] = tensor_at(model, member.place).float().square()
            square, key = squares[member.place], (member.place, member.dim)
            if key not in sums:
                others = [dim for dim in range(square.ndim) if dim != member.dim]
                sums[key] = square.sum(others) if others else square
            norms = norms.index_add(0, member.units, sums[key][member.positions])
        total = total + (shrinkage(norms.detach(), alpha) * norms).sum()
    return total / 2


def shrinkage(importance: Tensor, alpha: float) -> Tensor:
    """γ = 2^(α (I_max − I) / (I_max − I_min)) of the units' importances [units]; ones where all are equal.

    >>> shrinkage(torch.tensor([1.0, 3.0, 5.0]), alpha=4.0).tolist()
    [16.0, 4.0, 1.0]
    """
    low, high = importance.aminmax()
    span = (high - low).clamp_min(torch.finfo(importance.dtype).tiny)
    return torch.exp2(alpha * (high - importance) / span)


def _units_of(model: nn.Module, task: Task, asked: GroupSparsity) -> tuple[tuple[int, tuple[Member, ...]], ...]:
    """The groups to shrink, from memory where the model's tensors still stand as they did."""
    device = device_of(model)
    stood = (device, *(parameter.shape for parameter in model.parameters()))
    settings = (asked.where, asked.heads)
    found = _FOUND.get(model)
    if found is None or found.stood != stood or found.asked != settings:
        found = _Found(settings, stood, tuple(_find(model, task, asked, device)))
        _FOUND[model] = found
    return found.groups


def _find(
    model: nn.Module, task: Task, asked: GroupSparsity, device: torch.device
) -> Iterator[tuple[int, tuple[Member, ...]]]:
    if task.example_inputs is None:
        raise InputError("the task has no example inputs", where="GroupSparsity", do="Pass task.complete()")
    chosen = select(model, asked.where)
    # In the middle of a training step: mixed precision would stand in the graph, and random numbers belong to training.
    with fixed_randomness(0), torch.autocast(device.type, enabled=False):
        inputs = send_to_device(task.example_inputs, device)
        groups = groups_of(model, inputs, task.sole_output).prunable(asked.heads)
    skips: list[Skip] = []
    free = [group for partners in open_groups(groups, chosen, skips) for group in partners]
    if not free:
        raise InputError(
            "there is no group of channels that could be pruned", where="GroupSparsity",
            got="; ".join(f"{skip.place}: {skip.reason}" for skip in skips[:3]) or "no layer that makes channels",
            expected="a group that is not frozen",
        )  # fmt: skip
    for group in free:
        yield group.units, tuple(_members(model, group, device))


def _members(model: nn.Module, group: Group, device: torch.device) -> Iterator[Member]:
    for axis in group.axes:
        trained = axis.place.tensor in module_at(model, axis.place.module)._parameters
        if trained and not axis.place.tensor.endswith("bias"):
            positions, units = torch.from_numpy(axis.positions), torch.from_numpy(axis.units)
            yield Member(axis.place, axis.dim, positions.to(device), units.to(device))
