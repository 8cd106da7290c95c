"""Sums whose weights change while they are trained: by gradient norms, or by the terms' losses on validation data."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast, final

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from tersor.core.attached import attach, attached, detach, is_attached
from tersor.core.check_fields import check_fields
from tersor.core.device import device_of
from tersor.core.errors import InputError
from tersor.core.eval_mode import eval_mode
from tersor.core.loading import batches_of
from tersor.core.plan import Plan
from tersor.core.randomness import fixed_randomness
from tersor.core.task import Task
from tersor.train.companion import Companion, Moment
from tersor.train.layers import Reading
from tersor.train.objective import Forward, Objective, Sum, term_names, terms_of


class Rule(ABC):
    """How weights follow what is measured. Subclasses are frozen dataclasses of plain settings."""

    @abstractmethod
    def measured(self, losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
        """One number of 0 or more for each term, from its loss on a batch: float32 [terms]."""

    @abstractmethod
    def factors(self, now: Tensor, before: Tensor, weights: Tensor) -> Tensor:
        """What the terms' own ``weights`` are multiplied by, from what is measured now and at the last update: all
        [terms]; ``before`` is 0 where nothing is known yet."""


@final
@dataclass(frozen=True)
class GradientNorms(Rule):
    """f_i = c / g_i, g_i = ‖∇ L_i‖₂ over the model's parameters, c such that Σ w_i f_i = Σ w_i.

    So w_i f_i g_i, what each term pulls with, is in proportion to w_i alone, whatever a loss's scale is. A term without
    a gradient keeps its weight.
    Source: Chen et al. 2017, GradNorm (arXiv 1711.02257), section 3, with α = 0, set at once instead of learnt, and
    over all parameters.
    """

    def measured(self, losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
        return torch.stack([_gradient_norm(loss, parameters) for loss in losses])

    def factors(self, now: Tensor, before: Tensor, weights: Tensor) -> Tensor:
        pulling = now > 0
        inverse = torch.where(pulling, 1 / now.clamp_min(torch.finfo(now.dtype).tiny), 0)
        scale = (weights * pulling).sum() / (weights * inverse).sum().clamp_min(torch.finfo(now.dtype).tiny)
        return torch.where(pulling, scale * inverse, 1)


def _gradient_norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    if not loss.requires_grad:
        return torch.zeros((), device=loss.device)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    return torch.stack(squares).sum().sqrt()


@final
@dataclass(frozen=True)
class ValidationLoss(Rule):
    """f_i = K exp(r_i / T) / Σ_k exp(r_k / T), r_i = L_i now / L_i at the last update, of K terms, T = ``temperature``.

    L_i is the term's loss on validation data: what has stopped falling there gets more weight, what still falls less.
    Until there are two measurements every f is 1. Raises InputError for a temperature that is not positive.
    Source: Liu et al. 2018, dynamic weight average (arXiv 1803.10704), equation 7, there of training losses.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.temperature < float("inf"):
            raise InputError("must be positive", where="ValidationLoss.temperature", got=self.temperature)

    def measured(self, losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
        return torch.stack([loss.detach().float() for loss in losses])

    def factors(self, now: Tensor, before: Tensor, weights: Tensor) -> Tensor:
        known = before > 0
        ratio = torch.where(known, now / torch.where(known, before, 1), 1)
        return len(now) * torch.softmax(ratio / self.temperature, dim=0)


@final
@dataclass(frozen=True)
class Adaptive(Objective):
    """Σ w_i f_i · objective_i over the terms of a sum, with factors f that ``rule`` sets anew ``updates`` times.

    Written ``Adaptive(TaskLoss() + 2 * Hints(…))``. It is measured on the first ``batches`` of validation data, in eval
    mode, after the first step and at equal distances from there; between updates f is constant, at first 1. The history
    has the weights w f of each epoch's end. Use it in ``Finetune``, with a loader that has a length.

    Raises InputError for fewer than two terms, and for updates or batches below 1.
    """

    objective: Objective
    rule: Rule = GradientNorms()
    updates: int = 20
    batches: int = 4

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("updates", "batches"):
            if (got := getattr(self, name)) < 1:
                raise InputError("too few", where=f"Adaptive.{name}", got=got, expected="1 or more")
        if len(self.terms) < 2:
            raise InputError(
                "there is nothing to balance",
                where="Adaptive.objective",
                got=f"{self.objective}",
                expected="a sum of two or more terms with weights above 0",
            )

    @property
    def terms(self) -> tuple[tuple[float, Objective], ...]:
        """(weight, objective) of each term that counts."""
        return self.objective.counting if isinstance(self.objective, Sum) else terms_of(self.objective)

    @property
    def key(self) -> str:
        """The name under which its factors stand on the model: of these very settings."""
        return f"Adaptive_{zlib.crc32(repr(self).encode()):08x}"

    def of(self, forward: Forward) -> Tensor:
        """The weighted sum for one forward pass: []."""
        factors = _factors_of(forward.student, self).factors
        first, *rest = (w * f * part.of(forward) for (w, part), f in zip(self.terms, factors, strict=True))
        return sum(rest, start=first)

    def reads(self) -> tuple[Reading, ...]:
        """What its terms read."""
        return self.objective.reads()

    def companions(self) -> tuple[Companion, ...]:
        """Its terms', and what sets the factors."""
        return (*self.objective.companions(), Adapt(self))

    def review(self, model: nn.Module, task: Task, history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Its terms'."""
        return self.objective.review(model, task, history)

    def weights(self, model: nn.Module) -> Mapping[str, float]:
        """w f of each term by its class (numbered where there are several), and what its terms say."""
        names = term_names(self.terms)
        factors = _factors_of(model, self).factors.tolist()
        own = {name: w * f for name, (w, _), f in zip(names, self.terms, factors, strict=True)}
        return {**own, **self.objective.weights(model)}


class _Factors(nn.Module):
    """The factors in force, and what was measured last; buffers, so that checkpoints hold them."""

    def __init__(self, terms: int, device: torch.device):
        super().__init__()
        self.factors: Tensor
        self.measured: Tensor
        self.register_buffer("factors", torch.ones(terms, device=device))
        self.register_buffer("measured", torch.zeros(terms, device=device))


def _factors_of(model: nn.Module, objective: Adaptive) -> _Factors:
    return cast(_Factors, attached(model, objective.key))


@final
@dataclass(frozen=True)
class Adapt(Companion):
    """Sets the factors of ``objective`` while it is trained."""

    objective: Adaptive

    def begin(self, model: nn.Module, task: Task) -> None:
        """Every factor is 1."""
        attach(model, self.objective.key, _Factors(len(self.objective.terms), device_of(model)))

    def after_step(self, moment: Moment) -> None:
        """Measure and set the factors, where it is time. What is not finite is left to the training, which notices."""
        updates = self.objective.updates
        if moment.done not in {max(1, round(moment.steps * number / updates)) for number in range(updates)}:
            return
        now = self._measure(moment)
        if not bool(torch.isfinite(now).all()):
            return
        state = _factors_of(moment.model, self.objective)
        weights = torch.tensor([weight for weight, _ in self.objective.terms], device=now.device)
        state.factors.copy_(self.objective.rule.factors(now, state.measured, weights))
        state.measured.copy_(now)

    def _measure(self, moment: Moment) -> Tensor:
        """The rule's numbers, the mean over batches and processes: [terms]."""
        model, task, device = moment.model, moment.task, device_of(moment.model)
        loader = task.demand_loader("validation")
        parameters = [p for name, p in model.named_parameters() if p.requires_grad and not is_attached(name)]
        found = []
        with fixed_randomness(0), eval_mode(model), torch.enable_grad():
            for batch in islice(batches_of(loader, "task.validation"), self.objective.batches):
                forward = Forward(model, send_to_device(batch, device), task, self.objective.reads())
                losses = [part.of(forward) for _, part in self.objective.terms]
                found.append(self.objective.rule.measured(losses, parameters))
        if not found:
            raise InputError("the loader is empty", where="task.validation", got="no batch", expected="a batch")
        mean = torch.stack(found).mean(dim=0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        return mean

    def finish(self, model: nn.Module) -> Plan:
        """Take the factors off."""
        detach(model, self.objective.key)
        return Plan("adapt weights")
