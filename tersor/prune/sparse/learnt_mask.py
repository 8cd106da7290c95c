"""Masks learnt by gradient: a threshold for each weight, under a penalty on how many numbers are left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast, final

import torch
from torch import Tensor, nn

from tersor.core.apply import write
from tersor.core.attached import attach, attached, detach
from tersor.core.check_fields import check_fields
from tersor.core.edit import Mask
from tersor.core.errors import InputError
from tersor.core.masked import Masked
from tersor.core.place import Everything, Selector, stored_at, tensor_at
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.scopes import Global
from tersor.prune.sparse.standing import plan_of, standing_masks
from tersor.tensor import masks
from tersor.train.companion import Companion, Moment

_KEY = "learnt masks"
_WIDTH = 0.5  # of the transition of a mask, in units of ln w²: w from 0.78 to 1.28 times the threshold
_START = -6.0  # where thresholds begin, as ln(τ / mean w²): some 4 % of normally distributed weights are below
_BETAS = (0.9, 0.99)


@final
@dataclass(frozen=True)
class LearnMasks(Companion):
    """Weight w of tensor l is kept where w² > τ_l; training moves the thresholds τ_l by gradient, loss and penalty.

        m = σ((ln w² − θ) / T),  θ = ln τ
        ∂/∂θ_l (L + λ · D) = −(1/T) Σ_{w in l} m (1 − m) (w ∂L/∂v + λ / N),  D = Σ m / N

    v is the masked weight (forward it is hard: w or 0; the smooth m is for the gradient alone), N how many numbers
    there are in all. λ = ``strength`` while more than 1 − s(t) of them are left, else 0; s(t) = sparsity · (1 −
    (1 − t / t₁)³). So thresholds rise where what lies about them costs the loss less (−w ∂L/∂v) than the price λ / N:
    tensors that bear it lose more. They take Adam's steps, so that their pace does not depend on the loss's scale.
    Weights that are masked get no gradient.
    At t₁ the masks harden: exactly ⌊sparsity · N⌋ numbers with the smallest w² / τ_l are zero, each tensor keeping at
    least one, and they stand while the network recovers. What was masked before stays so.

    Args:
        sparsity: fraction of zeros in all these weights together, in the end.
        strength: λ, in units of the loss, for all numbers.
        reach: how far a threshold can go in all, in units of ln w²; it begins at mean w² · e⁻⁶.
        end: t₁ as a fraction of the training.
        where: modules whose weights may go.

    Raises InputError for numbers out of range, and what ``Prune`` raises.
    Source: Azarian et al. 2020, learned threshold pruning (arXiv 2003.00075), section 3. We differ: logarithms of
    thresholds, a hard forward, a penalty that ends at a target, and exact counts.
    """

    sparsity: float = 0.5
    strength: float = 3.0
    reach: float = 20.0
    end: float = 0.5
    where: Selector = field(default_factory=Everything)

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.sparsity < 1:
            raise InputError("not a fraction", where="LearnMasks.sparsity", got=self.sparsity, expected="(0, 1)")
        if not 0 < self.end <= 1:
            raise InputError("not a fraction", where="LearnMasks.end", got=self.end, expected="(0, 1]")
        for name in ("strength", "reach"):
            if not 0 < (got := getattr(self, name)) < float("inf"):
                raise InputError("must be positive", where=f"LearnMasks.{name}", got=got)

    def begin(self, model: nn.Module, task: Task) -> None:
        """A mask on every weight that is meant, and beside the model their thresholds."""
        places = [weight.place for weight in Prune(where=self.where).weights(model)]
        if not places:
            raise InputError("no weight can be masked", where="LearnMasks", got=repr(self.where))
        for place in places:
            write(model, Mask(place, torch.ones_like(tensor_at(model, place), dtype=torch.bool)))
        found = dict(standing_masks(model))
        meant = {id(stored_at(model, place)) for place in places}
        thresholds = nn.ModuleDict()
        for place, mask in found.items():
            mask.dense_gradient = True
            stored = stored_at(model, place)
            if id(stored) in meant:
                thresholds[_name(place)] = _Threshold(stored.detach(), mask.keep)
                meant.discard(id(stored))
        attach(model, _KEY, thresholds)

    def after_backward(self, moment: Moment) -> None:
        """Move the thresholds until t₁; then masked weights have no gradient."""
        learnt = list(_learnt(moment.model))
        if moment.done < self._end(moment.steps):
            numbers = sum(each.stored.numel() for each in learnt)
            price = self.strength / numbers if self._left(learnt) > 1 - self._asked(moment) else 0.0
            for each in learnt:
                each.threshold.learn(each.stored, price, self.reach / self._end(moment.steps))
        for place, mask in standing_masks(moment.model):
            gradient = stored_at(moment.model, place).grad
            if gradient is not None:
                gradient.masked_fill_(~mask.keep, 0)

    @torch.no_grad()
    def after_step(self, moment: Moment) -> None:
        """Mask by the thresholds; at t₁ with the exact count."""
        if moment.done > self._end(moment.steps):
            return
        learnt = list(_learnt(moment.model))
        margins = [each.threshold.margins(each.stored) for each in learnt]
        if moment.done < self._end(moment.steps):
            keeps = [margin > 0 for margin in margins]
        else:
            keeps = _exact(margins, self.sparsity)
        for each, keep in zip(learnt, keeps, strict=True):
            for mask in each.masks:
                mask.keep.copy_(keep)

    def settled(self, done: int, steps: int) -> bool:
        """Once the masks are hard."""
        return done >= self._end(steps)

    def expected(self, model: nn.Module, task: Task) -> Plan | None:
        """As many zeros, by magnitude: which they are is learnt."""
        return Prune(self.sparsity, scope=Global(), where=self.where, may_empty=True).plan(model, task)

    def noted(self, model: nn.Module) -> Mapping[str, float]:
        """The fraction of zeros as the masks stand."""
        return {"masked weights": 1 - self._left(list(_learnt(model)))}

    def finish(self, model: nn.Module) -> Plan:
        """The masks as they stand now; thresholds are taken off."""
        meant = {id(mask) for each in _learnt(model) for mask in each.masks}
        for _, mask in standing_masks(model):
            mask.dense_gradient = False
        detach(model, _KEY)
        return plan_of("learn masks", [(place, mask) for place, mask in standing_masks(model) if id(mask) in meant])

    def _end(self, steps: int) -> int:
        return max(1, round(self.end * steps))

    def _asked(self, moment: Moment) -> float:
        """s(t)."""
        return self.sparsity * (1 - (1 - moment.done / self._end(moment.steps)) ** 3)

    def _left(self, learnt: list[_Learnt]) -> float:
        kept = sum(int(each.masks[0].keep.sum()) for each in learnt)
        return kept / sum(each.stored.numel() for each in learnt)


class _Threshold(nn.Module):
    """θ of one tensor with Adam's moments, and what may be kept at all; buffers, so that checkpoints hold them."""

    log: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor
    allowed: Tensor

    def __init__(self, weight: Tensor, allowed: Tensor):
        super().__init__()
        mean = (weight.float() * allowed).square().sum() / allowed.sum().clamp_min(1)
        self.register_buffer("log", mean.clamp_min(torch.finfo(torch.float32).tiny).log() + _START)
        for name in ("first", "second", "steps"):
            self.register_buffer(name, torch.zeros_like(self.log))
        self.register_buffer("allowed", allowed.clone())

    def margins(self, weight: Tensor) -> Tensor:
        """ln w² − θ, −∞ where the weight is 0 or may not be kept: the weight's shape."""
        return (weight.detach().float().square().log() - self.log).masked_fill(~self.allowed, -torch.inf)

    @torch.no_grad()
    def learn(self, weight: nn.Parameter, price: float, rate: float) -> None:
        """One step of Adam down the gradient of loss and penalty."""
        if weight.grad is None:
            return
        slope = (self.margins(weight) / _WIDTH).sigmoid()
        slope *= 1 - slope
        gradient = -(slope * (weight * weight.grad + price)).sum() / _WIDTH
        if not bool(torch.isfinite(gradient)):
            return  # training notices
        self.steps += 1
        self.first.lerp_(gradient, 1 - _BETAS[0])
        self.second.lerp_(gradient.square(), 1 - _BETAS[1])
        first, second = self.first / (1 - _BETAS[0] ** self.steps), self.second / (1 - _BETAS[1] ** self.steps)
        self.log -= rate * first / second.sqrt().clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, eq=False)
class _Learnt:
    """A stored weight, its masks (several where it is tied), and its threshold."""

    stored: nn.Parameter
    masks: list[Masked]
    threshold: _Threshold


def _name(place: object) -> str:
    return str(place).replace(".", "|")  # a module's name has no dot


def _learnt(model: nn.Module) -> Iterator[_Learnt]:
    thresholds = cast(nn.ModuleDict, attached(model, _KEY))
    tied: dict[int, list[Masked]] = {}
    first: dict[str, nn.Parameter] = {}
    for place, mask in standing_masks(model):
        stored = cast(nn.Parameter, stored_at(model, place))
        tied.setdefault(id(stored), []).append(mask)
        first[_name(place)] = stored
    for name, threshold in thresholds.items():
        yield _Learnt(first[name], tied[id(first[name])], cast(_Threshold, threshold))


def _exact(margins: list[Tensor], sparsity: float) -> list[Tensor]:
    """Masks with just ⌊sparsity · N⌋ zeros, the smallest margins of all; each tensor keeps its largest."""
    flat = [margin.flatten().clone() for margin in margins]
    for each in flat:
        largest = each.argmax()
        each[largest] = torch.where(each[largest] == -torch.inf, -torch.inf, torch.inf)
    scores = torch.cat(flat)
    zeros = min(masks.count(sparsity, scores.numel()), scores.numel() - len(flat))
    gone = int((scores == -torch.inf).sum())
    kept = masks.keep_largest(scores, max(zeros, gone))
    parts = kept.split([each.numel() for each in flat])
    return [part.view_as(margin) for part, margin in zip(parts, margins, strict=True)]
