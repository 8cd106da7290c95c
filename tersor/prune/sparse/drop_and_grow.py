"""Sparse training whose masks move: the smallest weights go, those come back whose gradients are largest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.masked import Masked
from tersor.core.place import Everything, Selector, TensorPlace, select, stored_at
from tersor.core.plan import Plan
from tersor.core.step import Pipeline
from tersor.core.task import Task
from tersor.prune.sparse.patterns import Element
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.scopes import ErdosRenyi
from tersor.prune.sparse.standing import plan_of, standing_masks
from tersor.tensor import masks
from tersor.train.companion import Companion, Moment
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer


@final
@dataclass(frozen=True)
class DropAndGrow(Companion):
    """At each update every masked weight loses its smallest numbers, and as many with the largest gradients come back.

    k = ⌊f(t) · numbers that are not zero⌋ of each weight, f(t) = ``fraction`` · ½ (1 + cos(π t / t₁)). The gradient is
    the masked network's, of all numbers. What comes back starts at zero with no momentum, and takes part in the very
    same step of the optimiser (in the paper it waits for the next). Sparsity stays as it is, layer by layer; masks of
    single numbers must stand before (``Prune``): exchanging them one by one would break n of m, blocks and rows.

    Args:
        fraction: f(0), the share that is exchanged at first.
        end: t₁ as a fraction of the training.
        updates: how many times numbers are exchanged until then, at equal distances.
        where: modules whose masks may move.

    Raises InputError for numbers out of range, where no mask stands, and for masks of a pattern (n of m, blocks, rows).
    Source: Evci et al. 2020, RigL (arXiv 1911.11134), section 3.
    """

    fraction: float = 0.3
    end: float = 0.75
    updates: int = 20
    where: Selector = field(default_factory=Everything)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("fraction", "end"):
            if not 0 < (got := getattr(self, name)) <= 1:
                raise InputError("not a fraction", where=f"DropAndGrow.{name}", got=got, expected="(0, 1]")
        if self.updates < 1:
            raise InputError("too few", where="DropAndGrow.updates", got=self.updates, expected="1 or more")

    def begin(self, model: nn.Module, task: Task) -> None:
        """Masks let the gradient through."""
        found = list(self._masks(model))
        if not found:
            raise InputError(
                "no mask stands on the model", where="DropAndGrow", expected="a sparse model", do="Run Prune first"
            )
        for place, mask in found:
            if (rule := pattern_of(mask.keep)) is not None:
                raise InputError(
                    "exchanging single numbers would break the mask's pattern", where=str(place), got=rule,
                    expected="masks of single numbers", do="Prune with Element(), or leave it out with where=",
                )  # fmt: skip
        for _, mask in standing_masks(model):  # the others' too: a tied weight has one gradient
            mask.dense_gradient = True

    def after_backward(self, moment: Moment) -> None:
        """Exchange, where it is time; then masked numbers have no gradient."""
        end = max(1, round(self.end * moment.steps))
        times = {max(1, round(end * number / self.updates)) for number in range(1, self.updates + 1)}
        if moment.done in times:
            part = self.fraction * (1 + math.cos(math.pi * moment.done / end)) / 2
            grown: dict[int, Tensor] = {}
            for place, mask in self._masks(moment.model):
                weight = stored_at(moment.model, place)
                if id(weight) not in grown:
                    grown[id(weight)] = exchanged(weight.detach(), weight.grad, mask.keep, part)
                    _start_at_zero(moment, weight, grown[id(weight)] & ~mask.keep)
                mask.keep.copy_(grown[id(weight)])
        for place, mask in standing_masks(moment.model):
            weight = stored_at(moment.model, place)
            if weight.grad is not None:
                weight.grad.masked_fill_(~mask.keep, 0)

    def after_step(self, moment: Moment) -> None:
        """Nothing."""

    def settled(self, done: int, steps: int) -> bool:
        """Always: the sparsity never changes."""
        return True

    def expected(self, model: nn.Module, task: Task) -> Plan | None:
        """None: counts stay as they are."""
        return None

    def finish(self, model: nn.Module) -> Plan:
        """The masks as they stand now."""
        for _, mask in standing_masks(model):
            mask.dense_gradient = False
        return plan_of("drop and grow", self._masks(model))

    def _masks(self, model: nn.Module) -> Iterator[tuple[TensorPlace, Masked]]:
        chosen = select(model, self.where)
        yield from ((place, mask) for place, mask in standing_masks(model) if place.module in chosen)


_BY_CHANCE = 32  # of so many groups, or numbers, not all obey a rule by chance


def pattern_of(keep: Tensor) -> str | None:
    """What a mask's numbers have to do with their neighbours along the first two axes; None: each stands for itself.

    >>> pattern_of(torch.tensor([True, False, False, True]).repeat(32, 1))
    '2 consecutive numbers along axis 0 go as one'
    >>> pattern_of(torch.tensor([[True, False, False, True], [False, True, False, True]] * 16 + [[True, False] * 2]))
    '1 of every 2 along axis 1'
    """
    kept = int(keep.sum())
    if min(kept, keep.numel() - kept) < _BY_CHANCE:
        return None
    for axis, size in enumerate(keep.shape[:2]):
        lines = keep.movedim(axis, -1)
        for length in (n for n in range(2, size + 1) if size % n == 0 and keep.numel() // n >= _BY_CHANCE):
            left = lines.reshape(-1, length).sum(1)
            some = int(left[0])
            if bool(((left == 0) | (left == length)).all()):
                return f"{length} consecutive numbers along axis {axis} go as one"
            if bool((left == some).all()):
                return f"{some} of every {length} along axis {axis}"
    return None


def exchanged(weight: Tensor, gradient: Tensor | None, keep: Tensor, part: float) -> Tensor:
    """The mask after ⌊part · kept⌋ of the smallest |weight| went and as many of the largest |gradient| came.

    What went may come back at once. Of equal numbers the earlier goes, and the later comes.
    """
    count = math.floor(part * int(keep.sum()) + 1e-9)
    if gradient is None or count == 0:
        return keep.clone()
    left = keep & masks.keep_largest(weight.abs().float().masked_fill(~keep, torch.inf), count)
    wanted = gradient.abs().float().masked_fill(left, -torch.inf)
    return left | masks.keep_largest(wanted, wanted.numel() - count)


def _start_at_zero(moment: Moment, weight: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        weight.masked_fill_(new, 0)
        for value in (moment.optimizer.state.get(weight) or {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(new, 0)


def train_sparse(
    sparsity: float,
    *,
    training: Finetune | None = None,
    prune: Prune | None = None,
    companion: DropAndGrow | None = None,
) -> Pipeline:
    """Prune once (densities by Erdős–Rényi-kernel unless ``prune`` says otherwise), then train while masks move.

    Raises InputError for a pattern other than ``Element()``.
    Source: Evci et al. 2020 (arXiv 1911.11134), who start from random weights: ``Prune(score=RandomWeights())``.
    """
    first = (prune or Prune(scope=ErdosRenyi())).to(sparsity)
    if first.pattern != Element():
        raise InputError(
            "masks that move are of single numbers", where="train_sparse", got=first.pattern, expected="Element()"
        )
    training = training or Finetune(epochs=10, optimizer=Optimizer(lr=0.025))
    return Pipeline((first, replace(training, companion=companion or DropAndGrow())))
