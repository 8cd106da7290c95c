"""A group of channels that can only go together, and the edits that remove some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tersor.core.edit import Attribute, Cut, Edit, Slice
from tersor.core.place import TensorPlace
from tersor.graph.flow import Role


@dataclass(frozen=True, eq=False)
class CoupledAxis:
    """The positions of dimension ``dim`` of a tensor that belong to a group: ``positions[i]`` goes with unit
    ``units[i]``. ``size``: of the whole dimension, which may belong to several groups (after a concatenation)."""

    place: TensorPlace
    dim: int
    role: Role
    size: int
    positions: NDArray[np.int64]
    units: NDArray[np.int64]

    def __str__(self) -> str:
        return f"{self.place}[{self.dim}]"


@dataclass(frozen=True, eq=False)
class SizeAttribute:
    """A module's attribute that counts channels; ``units[i]`` is a position of the group, ``size`` the whole count."""

    module: str
    name: str
    size: int
    units: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Group:
    """Units of channels that the same tensors hold. A unit is what can only be removed at once.

    ``name``: path of the module that makes the channels (the first of them). ``frozen``: why none may go, or None.
    ``literals``: calls on the way whose sizes may stand as literals in the forward.
    """

    name: str
    units: int
    axes: tuple[CoupledAxis, ...]
    attributes: tuple[SizeAttribute, ...]
    frozen: str | None
    literals: tuple[str, ...]

    def with_role(self, role: Role) -> tuple[CoupledAxis, ...]:
        """The axes of that role, in the order in which the forward meets them."""
        return tuple(axis for axis in self.axes if axis.role == role)

    @property
    def producers(self) -> tuple[CoupledAxis, ...]:
        """The axes that make the channels."""
        return self.with_role("producer")

    @property
    def channels(self) -> int:
        """How many channels of the first producer the group is."""
        return len(self.producers[0].positions) if self.producers else 0

    def __str__(self) -> str:
        makers = [str(axis.place.module or axis.place) for axis in self.producers]
        count = f"{self.channels} channels"
        if self.units != self.channels:
            count += f" in {self.units} units"
        with_ = f", together with {', '.join(makers[1:])}" if len(makers) > 1 else ""
        if self.frozen is not None:
            return f"{self.name}: {count}{with_}; frozen: {self.frozen}"
        readers = ", ".join(dict.fromkeys(axis.place.module or str(axis.place) for axis in self.with_role("consumer")))
        return f"{self.name}: {count}{with_}; read by {readers or 'nothing'}"


@dataclass(frozen=True, eq=False)
class Groups:
    """All groups of a model that have a producer, in the order of the forward.

    ``unread``: modules with parameters that the captured forward never reads (heads that only training uses).
    """

    groups: tuple[Group, ...]
    unread: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def describe(self) -> list[str]:
        """A line for each group: its channels, what else makes them, who reads them, or why they are frozen."""
        return [str(group) for group in self.groups]


def removal(keep: Mapping[Group, NDArray[np.bool_]]) -> tuple[Edit, ...]:
    """The edits that remove all units of the groups but those kept (bool [units]): one Slice, then the attributes."""
    lost: dict[tuple[TensorPlace, int], NDArray[np.bool_]] = {}
    roles: dict[tuple[TensorPlace, int], Role] = {}
    sizes: dict[tuple[str, str], int] = {}
    for group, kept in keep.items():
        if kept.all():
            continue
        for axis in group.axes:
            key = axis.place, axis.dim
            gone = lost.setdefault(key, np.zeros(axis.size, dtype=bool))
            gone[axis.positions[~kept[axis.units]]] = True
            if roles.get(key) != "consumer":  # a tied tensor that is both is masked as one that reads
                roles[key] = axis.role
        for attribute in group.attributes:
            name = attribute.module, attribute.name
            sizes[name] = sizes.get(name, attribute.size) - int((~kept[attribute.units]).sum())
    if not lost:
        return ()
    shared: dict[bytes, torch.Tensor] = {}  # equal index lists are one tensor: saved once
    cuts = []
    for (place, dim), gone in lost.items():
        indices = shared.setdefault(gone.tobytes(), torch.from_numpy(np.flatnonzero(~gone)))
        cuts.append(Cut(place, dim, indices, roles[place, dim]))
    return (Slice(tuple(cuts)), *(Attribute(module, name, size) for (module, name), size in sizes.items()))
