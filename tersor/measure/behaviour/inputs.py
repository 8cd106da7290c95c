"""The input that corruptions and attacks change, what it spans, and the inputs that are worth showing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.core.task import Arguments

Slot = int | str


class Change(ABC):
    """What is done to a batch's inputs before both models are given them; ``str`` of it is its name."""

    @abstractmethod
    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], targets: Tensor | None, number: int) -> Arguments:
        """The changed arguments of batch ``number``, the same whenever they are asked for."""


def slot_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Slot | None:
    """Where the first input of real numbers with a batch stands: its position or name; None where there is none."""
    places: list[tuple[Slot, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            return place
    return None


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input that can be changed; without one the first tensor (token numbers, for instance)."""
    slot = slot_of(args, kwargs)
    if slot is not None:
        return args[slot] if isinstance(slot, int) else kwargs[slot]
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 0), None)


def with_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], slot: Slot, value: Tensor) -> Arguments:
    """The arguments with ``value`` in place of one of them."""
    if isinstance(slot, int):
        return (*args[:slot], value, *args[slot + 1 :]), kwargs
    return args, {**kwargs, slot: value}


@final
@dataclass(frozen=True, eq=False)
class Reach:
    """What an input spans: its smallest and largest values, by channel or feature (dimension 1), each [channels].

    ``shape``: of one sample.
    """

    low: Tensor
    high: Tensor
    shape: tuple[int, ...]
    floating: bool

    @classmethod
    def of(cls, x: Tensor) -> Reach:
        """What a batch [n, channels, …] spans; of one with a single dimension, the whole."""
        flat = x.detach().cpu().to(torch.float32)
        flat = flat.transpose(0, 1).flatten(1) if flat.ndim > 1 else flat[None]
        return cls(flat.amin(dim=1), flat.amax(dim=1), tuple(x.shape[1:]), x.is_floating_point())

    def joined(self, other: Reach | None) -> Reach:
        """What both span; of inputs of several lengths (tokens), this one's."""
        if other is None or other.low.shape != self.low.shape:
            return self
        return Reach(
            torch.minimum(self.low, other.low), torch.maximum(self.high, other.high), self.shape, self.floating
        )

    @property
    def pictures(self) -> bool:
        """Whether the input is pictures."""
        return self.floating and len(self.shape) == 3 and min(self.shape[1:]) >= 4


@final
class Worst:
    """The ``size`` samples of the largest severities, with their inputs: offered batch by batch."""

    def __init__(self, size: int):
        self.size = size
        self.found: list[tuple[float, int, NDArray[Any]]] = []

    def offer(self, severity: NDArray[np.float64], first: int, inputs: Tensor) -> None:
        """Severities [n] of the samples ``first``, ``first`` + 1 …, and their inputs [n, …]; −∞ is never kept."""
        if self.size == 0:
            return
        best = np.argsort(-severity, kind="stable")[: self.size]
        self.found += [
            (float(severity[at]), first + int(at), inputs[int(at)].detach().cpu().numpy().copy())
            for at in best
            if np.isfinite(severity[at])
        ]
        self.found.sort(key=lambda one: (-one[0], one[1]))
        del self.found[self.size :]
