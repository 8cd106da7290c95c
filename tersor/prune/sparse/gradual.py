"""Gradual pruning: inside one training, a little more goes every few steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import nn

from tersor.core.apply import write
from tersor.core.check_fields import check_fields
from tersor.core.edit import Mask
from tersor.core.errors import InputError
from tersor.core.place import stored_at, tensor_at
from tersor.core.plan import Plan, Skip
from tersor.core.task import Task
from tersor.prune.sparse.elements.magnitude import WeightMagnitude
from tersor.prune.sparse.elements.movement import Movement
from tersor.prune.sparse.elements.score import GATHERED, GatheredScore
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.scopes import Global
from tersor.prune.sparse.standing import plan_of, standing_masks
from tersor.train.companion import Companion, Moment
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer


@final
@dataclass(frozen=True)
class GradualSparsity(Companion):
    """Prune to s(t) = s_f (1 − (1 − (t − t₀) / (t₁ − t₀))³) in ``updates`` equal steps of time from t₀ to t₁.

    Fast at first, when much can go, slow towards the end. s_f, score, pattern and scope are those of ``prune``; zeros
    that stand already count, so that a sparser model waits until s(t) has reached it. N:M goes from m:m to n:m. A
    ``GatheredScore`` is gathered from the first step on.

    Args:
        prune: what the training ends with.
        start, end: t₀ and t₁ as fractions of the training; after t₁ the masks stand, and the network recovers.
        updates: how many times it is pruned; the last one makes exactly the plan of ``prune``.

    Raises InputError for numbers out of range, where no weight may be masked, and what ``Prune`` raises.
    Source: Zhu and Gupta 2017 (arXiv 1710.01878), equation 1, with initial sparsity 0.
    """

    prune: Prune = field(default_factory=Prune)
    start: float = 0.0
    end: float = 0.5
    updates: int = 50

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.start <= self.end <= 1 or self.end == 0:
            raise InputError(
                "out of order", where="GradualSparsity", got=f"start {self.start}, end {self.end}",
                expected="0 ≤ start ≤ end ≤ 1, and end above 0",
            )  # fmt: skip
        if self.updates < 1:
            raise InputError("too few", where="GradualSparsity.updates", got=self.updates, expected="1 or more")

    def begin(self, model: nn.Module, task: Task) -> None:
        """A mask on every weight that ``prune`` means; beside it what is gathered."""
        skips: list[Skip] = []
        places = [weight.place for weight in self.prune.weights(model, skips)]
        if not places:
            raise InputError(
                "no weight may be masked, so that nothing would be pruned", where="GradualSparsity",
                got="; ".join(f"{skip.place}: {skip.reason}" for skip in skips[:3]) or "a model without weights",
                expected="at least one",
            )  # fmt: skip
        for place in places:
            write(model, Mask(place, torch.ones_like(tensor_at(model, place), dtype=torch.bool)))
        score = self.prune.score
        if not isinstance(score, GatheredScore):
            return
        for place, mask in standing_masks(model):
            if place in places:
                gathered = torch.zeros_like(mask.keep, dtype=torch.float32)
                mask.register_buffer(GATHERED, gathered, persistent=False)
            mask.dense_gradient = score.reads_gradients

    def after_backward(self, moment: Moment) -> None:
        """Gather; then masked weights have no gradient."""
        score = self.prune.score
        if not isinstance(score, GatheredScore):
            return
        for place, mask in standing_masks(moment.model):
            weight, gathered = stored_at(moment.model, place), mask._buffers.get(GATHERED)
            if gathered is not None:
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                score.gather(gathered, weight.detach(), gradient)
            if weight.grad is not None:
                weight.grad.masked_fill_(~mask.keep, 0)

    def after_step(self, moment: Moment) -> None:
        """Prune, where it is time. (Weights that are not finite are left to the training, which notices them.)"""
        due = [number for number in range(1, self.updates + 1) if self._time(number, moment.steps) == moment.done]
        if not due or not all(bool(torch.isfinite(weight).all()) for weight in moment.model.parameters()):
            return
        way = 1 - (1 - due[-1] / self.updates) ** 3
        prune = self.prune if due[-1] == self.updates else self.prune.part(way)
        for edit in prune.plan(moment.model, moment.task).edits:
            write(moment.model, edit)

    def settled(self, done: int, steps: int) -> bool:
        """Once the last update is made."""
        return done >= self._time(self.updates, steps)

    def expected(self, model: nn.Module, task: Task) -> Plan | None:
        """The plan of ``prune`` on the model as it is; by magnitude where the score is yet to be gathered."""
        gathered = isinstance(self.prune.score, GatheredScore)
        return (replace(self.prune, score=WeightMagnitude()) if gathered else self.prune).plan(model, task)

    def finish(self, model: nn.Module) -> Plan:
        """The masks as they stand now; nothing is gathered any more."""
        skips: list[Skip] = []
        places = {weight.place for weight in self.prune.weights(model, skips)}
        for _, mask in standing_masks(model):
            mask._buffers.pop(GATHERED, None)
            mask.dense_gradient = False
        found = [(place, mask) for place, mask in standing_masks(model) if place in places]
        return plan_of("prune gradually", found, skips)

    def _time(self, number: int, steps: int) -> int:
        """After how many steps update ``number`` is due: 1 or more."""
        way = self.start + (self.end - self.start) * number / self.updates
        return max(1, round(way * steps))


def prune_gradually(
    sparsity: float | Mapping[str, float] | None = None,
    *,
    training: Finetune | None = None,
    prune: Prune | None = None,
    start: float = 0.0,
    end: float = 0.5,
    updates: int = 50,
) -> Finetune:
    """One training in which the network is pruned gradually to ``sparsity``, and then recovers.

    Args:
        sparsity: fraction of zeros in the end, or fractions by name (see ``Prune``).
        training: how it trains; its epochs cover both pruning and recovery. Default: ten epochs at half the usual
            learning rate.
        prune: everything else that ``Prune`` takes (score, pattern, scope, where), and its sparsity where none
            is given.
        start, end, updates: see ``GradualSparsity``.

    Raises InputError where both name another sparsity. Source: Zhu and Gupta 2017 (arXiv 1710.01878).
    """
    whole = (prune or Prune()).to(sparsity)
    companion = GradualSparsity(whole, start, end, updates)
    return replace(training or Finetune(epochs=10, optimizer=Optimizer(lr=0.025)), companion=companion)


def prune_by_movement(sparsity: float, *, training: Finetune | None = None, prune: Prune | None = None) -> Finetune:
    """Movement pruning: gradually, by the direction in which fine-tuning moves weights; those at zero may come back.

    Scores compete in the whole model unless ``prune`` says otherwise. Source: Sanh et al. 2020 (arXiv 2005.07683).
    """
    base = replace(prune or Prune(scope=Global()), score=Movement(), regrow=True)
    return prune_gradually(sparsity, training=training, prune=base)
