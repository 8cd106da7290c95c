"""Which tensors of a group are asked about its units, and how what they say becomes one number for each unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tersor.core.errors import InputError
from tersor.core.place import module_at
from tersor.graph.group import CoupledAxis, Group

Combine = Literal["sum", "mean", "max", "first"]
Normalise = Literal["mean", "max"]
Members = Literal["scaling", "makers", "readers", "all"]


def by_unit(values: Tensor, axis: CoupledAxis, units: int) -> Tensor:
    """Sum ``values`` (of the axis's tensor, any shape) over everything but the units: float64 [units]."""
    others = [dim for dim in range(values.ndim) if dim != axis.dim]
    return gathered(values.sum(dim=others, dtype=torch.float64) if others else values.double(), axis, units)


def gathered(values: Tensor, axis: CoupledAxis, units: int) -> Tensor:
    """Sum ``values`` [size of the axis] over the positions of each unit: float64 [units], on the CPU."""
    positions, numbers = torch.from_numpy(axis.positions), torch.from_numpy(axis.units)
    return torch.zeros(units, dtype=torch.float64).index_add_(0, numbers, values.double().cpu()[positions])


def combined(members: Sequence[Tensor], combine: str, normalise: str | None) -> Tensor:
    """One number for each unit [units] from those of several coupled tensors, ``members`` (each [units]).

    Each is first divided by its own mean or maximum over the units (``normalise``), or taken as it is (None); then
    they are added, averaged, the largest counts, or the first one's stand for all (``combine``).

    >>> a, b = torch.tensor([1.0, 3.0]), torch.tensor([30.0, 10.0])
    >>> combined([a, b], "sum", None).tolist(), combined([a, b], "mean", "mean").tolist()
    ([31.0, 13.0], [1.0, 1.0])
    """
    scaled = [x if normalise is None else x / _size(x, normalise) for x in members]
    match combine:
        case "sum":
            return torch.stack(scaled).sum(0)
        case "mean":
            return torch.stack(scaled).sum(0) / len(scaled)
        case "max":
            return torch.stack(scaled).amax(0)
        case "first":
            return scaled[0]
    raise InputError("unknown", where="combine", got=repr(combine), expected=", ".join(get_args(Combine)))


def _size(x: Tensor, normalise: str) -> Tensor:
    size = x.amax() if normalise == "max" else x.mean()
    return size.clamp_min(torch.finfo(x.dtype).tiny)


def members_of(model: nn.Module, group: Group, members: Members) -> tuple[CoupledAxis, ...]:
    """The axes of the weights that are asked about a group's units, in the order of the forward within each kind.

    * "makers": the weights that make the units;
    * "readers": the weights that read them; the makers where none does;
    * "scaling": what the units' size depends on: the scales of batch norms or, where there is none, the makers (before
      a batch norm their length has no effect), then the scales of other norms, then the readers;
    * "all": makers, scales of norms, other weights that belong to the units (depthwise filters), readers.
    """
    readers = group.with_role("consumer")
    match members:
        case "makers":
            return group.producers
        case "readers":
            return readers or group.producers
        case "scaling":
            makers = norm_scales(model, group, _NormBase) or group.producers
            return (*makers, *norm_scales(model, group, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)), *readers)
    return (*group.producers, *_other_weights(model, group), *readers)


def norm_scales(
    model: nn.Module, group: Group, kind: type[nn.Module] | tuple[type[nn.Module], ...]
) -> tuple[CoupledAxis, ...]:
    """The scales (γ) of the norms of ``kind`` that belong to the group."""
    return tuple(
        axis
        for axis in group.with_role("bystander")
        if axis.place.tensor == "weight" and isinstance(module_at(model, axis.place.module), kind)
    )


def _other_weights(model: nn.Module, group: Group) -> tuple[CoupledAxis, ...]:
    """What belongs to the units and is a trained weight: no bias, no running statistic."""
    return tuple(
        axis
        for axis in group.with_role("bystander")
        if not axis.place.tensor.endswith("bias")
        and axis.place.tensor in module_at(model, axis.place.module)._parameters
    )


def check_coupling(
    score: str, combine: str, normalise: str | None, members: str = "all", *, also: tuple[str, ...] = ()
) -> None:
    """Raise InputError where an option of the score named ``score`` is none that it knows."""
    allowed = {
        "combine": (combine, (*also, *get_args(Combine))),
        "normalise": (normalise, (None, *get_args(Normalise))),
        "members": (members, get_args(Members)),
    }
    for name, (got, known) in allowed.items():
        if got not in known:
            expected = ", ".join(str(value) for value in known)
            raise InputError("unknown", where=f"{score}.{name}", got=repr(got), expected=f"one of {expected}")
