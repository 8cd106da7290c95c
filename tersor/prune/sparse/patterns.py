"""Which weights go together: single ones, n of every m, blocks, whole rows or columns.

A pattern sees a weight as ``[out, in, *kernel]`` (a transposed convolution's is turned round before). Its *units* are
what is kept or goes as one; the score of a unit is the mean of its weights' scores.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.tensor import masks


class Pattern(ABC):
    """Says which weights of a tensor go together. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def sparsity(self) -> float | None:
        """The fraction of zeros that the pattern itself means; None where any can be asked of it."""

    @abstractmethod
    def objection(self, shape: Sequence[int]) -> str | None:
        """Why a weight of this shape cannot have the pattern, with the arithmetic; None where it can."""

    @abstractmethod
    def units(self, elements: Tensor) -> Tensor:
        """The mean score of each unit, at least float32; as many as there are units, in any shape."""

    @abstractmethod
    def keep(self, units: Tensor, zeros: int, shape: Sequence[int]) -> Tensor:
        """The mask of a weight of ``shape``: False where the ``zeros`` units with the smallest scores are.

        Of equal ones the earlier goes first. ``units``: scores as ``units`` gives them.
        """

    def mask(self, elements: Tensor, sparsity: float) -> Tensor:
        """The mask of one weight by its elements' scores, ⌊sparsity · units⌋ of its units False."""
        units = self.units(elements)
        return self.keep(units, masks.count(sparsity, units.numel()), elements.shape)


@final
@dataclass(frozen=True)
class Element(Pattern):
    """Single weights. ``per_row``: every row (of one output) loses the same number, rounded down.

    Source of ``per_row``: Sun et al. 2024, Wanda (arXiv 2306.11695), section 3.
    """

    per_row: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def sparsity(self) -> None:
        """Any can be asked."""
        return None

    def objection(self, shape: Sequence[int]) -> str | None:
        """None: every shape has elements."""
        return None

    def units(self, elements: Tensor) -> Tensor:
        """The elements themselves."""
        return _wide(elements)

    def keep(self, units: Tensor, zeros: int, shape: Sequence[int]) -> Tensor:
        """Exactly ``zeros`` are False; with ``per_row``, ⌊zeros / rows⌋ of every row."""
        if not self.per_row:
            return masks.keep_largest(units.reshape(tuple(shape)), zeros)
        rows = units.reshape(shape[0], -1)
        gone = torch.argsort(rows, dim=1, stable=True)[:, : zeros // shape[0]]
        return torch.ones_like(rows, dtype=torch.bool).scatter_(1, gone, False).reshape(tuple(shape))


@final
@dataclass(frozen=True)
class NM(Pattern):
    """``n`` of every ``m`` consecutive inputs stay (of a convolution: input channels at one kernel position).

    2:4 is what sparse tensor cores take. The sparsity is 1 − n/m everywhere. Raises InputError unless 0 < n ≤ m.
    Source: Mishra et al. 2021 (arXiv 2104.08378), section 3.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.n <= self.m:
            raise InputError("out of range", where="NM", got=f"{self.n}:{self.m}", expected="0 < n <= m")

    @property
    def sparsity(self) -> float:
        """1 − n/m."""
        return 1 - self.n / self.m

    def objection(self, shape: Sequence[int]) -> str | None:
        """Where m does not divide the inputs."""
        return _remainder("inputs", shape[1], self.m)

    def units(self, elements: Tensor) -> Tensor:
        """The elements themselves, which compete with their m − 1 neighbours."""
        return _wide(elements)

    def part(self, way: float) -> NM:
        """The pattern ``way`` (0 … 1) of the way from m:m to n:m, rounded to the denser one."""
        return NM(self.m - math.floor(way * (self.m - self.n) + 1e-9), self.m)

    def keep(self, units: Tensor, zeros: int, shape: Sequence[int]) -> Tensor:
        """The n largest of every m; ``zeros`` can be nothing but (1 − n/m) of all."""
        if zeros * self.m != units.numel() * (self.m - self.n):
            raise InputError(
                f"{self.n}:{self.m} has its own number of zeros", where="NM", got=f"{zeros:,} of {units.numel():,}",
                expected=f"{units.numel() * (self.m - self.n) // self.m:,}",
            )  # fmt: skip
        return masks.n_of_m(units.reshape(tuple(shape)), self.n, self.m, axis=1)


@final
@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of ``rows`` outputs × ``columns`` inputs (of a convolution: at one kernel position) go as one.

    4 × 1 is what sparse CPU kernels take. Raises InputError for sizes below 1.
    Source: Narang et al. 2017, block-sparse recurrent networks (arXiv 1711.02782), who rank a block by its largest
    weight; ours by the mean.
    """

    rows: int = 4
    columns: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rows < 1 or self.columns < 1:
            raise InputError("out of range", where="Block", got=f"{self.rows} × {self.columns}", expected="1 or more")

    @property
    def sparsity(self) -> None:
        """Any can be asked."""
        return None

    def objection(self, shape: Sequence[int]) -> str | None:
        """Where the block's sides do not divide outputs or inputs."""
        return _remainder("outputs", shape[0], self.rows) or _remainder("inputs", shape[1], self.columns)

    def units(self, elements: Tensor) -> Tensor:
        """[out / rows, in / columns, *kernel]."""
        return masks.blocks(_wide(elements), (self.rows, self.columns)) / (self.rows * self.columns)

    def keep(self, units: Tensor, zeros: int, shape: Sequence[int]) -> Tensor:
        """Exactly ``zeros`` blocks are False."""
        like = torch.empty(tuple(shape), device="meta")
        return masks.spread(masks.keep_largest(units, zeros), (self.rows, self.columns), like)


@final
@dataclass(frozen=True)
class Rows(Pattern):
    """Whole rows ("outputs": everything that makes one output) or columns ("inputs": everything that reads one input).

    Their weights are zero, the tensors keep their shapes; ``PruneChannels`` really removes channels.
    """

    of: Literal["outputs", "inputs"] = "outputs"

    def __post_init__(self) -> None:
        if self.of not in ("outputs", "inputs"):
            raise InputError("unknown", where="Rows.of", got=repr(self.of), expected="outputs or inputs")

    @property
    def sparsity(self) -> None:
        """Any can be asked."""
        return None

    def objection(self, shape: Sequence[int]) -> str | None:
        """None: every weight has rows and columns."""
        return None

    def units(self, elements: Tensor) -> Tensor:
        """[outputs] or [inputs]."""
        sums: Tensor = masks.rows(_wide(elements), self._axis)
        return sums / (elements.numel() // max(1, sums.numel()))

    def keep(self, units: Tensor, zeros: int, shape: Sequence[int]) -> Tensor:
        """Exactly ``zeros`` rows or columns are False."""
        like = torch.empty(tuple(shape), device="meta")
        return masks.spread_rows(masks.keep_largest(units, zeros), like, self._axis)

    @property
    def _axis(self) -> int:
        return 0 if self.of == "outputs" else 1


def _wide(scores: Tensor) -> Tensor:
    return scores if scores.dtype in (torch.float32, torch.float64) else scores.float()


def _remainder(what: str, size: int, part: int) -> str | None:
    if size % part == 0:
        return None
    return f"{size} {what} are no multiple of {part}: {size} = {size // part} × {part} + {size % part}"
