"""Sums whose terms pull apart: the angle between their gradients is measured, and may be damped by a projection."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from tersor.core.attached import attach, attached, detach
from tersor.core.check_fields import check_fields
from tersor.core.device import device_of
from tersor.core.errors import InputError
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.train.companion import Companion
from tersor.train.layers import Reading
from tersor.train.objective import Forward, Objective, Sum, term_names, terms_of

_MEMORY = 0.05  # of the running means: about the last twenty batches that were measured


@final
@dataclass(frozen=True)
class Conflict(Objective):
    """The sum ``objective``, its terms' gradients g_i = ∇ w_i L_i compared; where they point apart, projected.

    Two terms are in conflict on a batch where g_i · g_j < 0. ``damp``: then g_i ← g_i − (g_i · g_j / ‖g_j‖²) g_j, for
    each i with the others j in random order, and the step is by Σ g_i; the value stays the sum's. Without it the
    gradient is the sum's own and every ``every``-th batch is measured. The history's ``noted`` has for each pair the
    cosine of the angle and the share of batches in conflict, both running means over about twenty measured batches.

    A backward pass for each term and memory for each term's gradient, on every batch that is measured. Use it in
    ``Finetune``: ``Conflict(TaskLoss() + 0.1 * ScaleSpread())``. Raises InputError for fewer than two terms, and for
    ``every`` below 1.
    Source: Yu et al. 2020, PCGrad (arXiv 2001.06782), algorithm 1.
    """

    objective: Objective
    damp: bool = True
    every: int = 10

    def __post_init__(self) -> None:
        check_fields(self)
        if self.every < 1:
            raise InputError("too few", where="Conflict.every", got=self.every, expected="1 or more")
        if len(self.terms) < 2:
            raise InputError(
                "nothing can be in conflict", where="Conflict.objective", got=f"{self.objective}",
                expected="a sum of two or more terms with weights above 0",
            )  # fmt: skip

    @property
    def terms(self) -> tuple[tuple[float, Objective], ...]:
        """(weight, objective) of each term that counts."""
        return self.objective.counting if isinstance(self.objective, Sum) else terms_of(self.objective)

    @property
    def key(self) -> str:
        """The name under which its measurements stand on the model: of these very settings."""
        return f"Conflict_{zlib.crc32(repr(self).encode()):08x}"

    def of(self, forward: Forward) -> Tensor:
        """The sum for one forward pass: [], with the gradient that is to be followed."""
        losses = [weight * part.of(forward) for weight, part in self.terms]
        total = torch.stack([loss.reshape(()) for loss in losses]).sum()
        model = forward.student
        if not (model.training and torch.is_grad_enabled()):
            return total
        state = _state_of(model, self)
        due = self.damp or int(state.batches) % self.every == 0
        state.batches += 1
        if not due:
            return total
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.stack([flat_gradient(loss, parameters) for loss in losses])
        state.remember(gradients)
        if not self.damp:
            return total
        return _with_gradient(total, projected(gradients), parameters)

    def reads(self) -> tuple[Reading, ...]:
        """What its terms read."""
        return self.objective.reads()

    def companions(self) -> tuple[Companion, ...]:
        """Its terms', and what holds the measurements."""
        return (*self.objective.companions(), MeasureConflict(self))

    def weights(self, model: nn.Module) -> Mapping[str, float]:
        """Its terms'."""
        return self.objective.weights(model)

    def review(self, model: nn.Module, task: Task, history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Its terms'."""
        return self.objective.review(model, task, history)


def flat_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """∇ loss over all parameters, one after another: float32 [n], 0 where the loss does not depend on one."""
    if not loss.requires_grad:
        return torch.cat([torch.zeros_like(p, dtype=torch.float32).flatten() for p in parameters])
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).float().flatten() for g, p in pairs])


def projected(gradients: Tensor) -> Tensor:
    """Σ_i of the rows of ``gradients`` [terms, n], each without what points against the others: [n].

    >>> projected(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    tensor([0.5000, 1.5000])
    """
    squares = gradients.square().sum(1)
    total = torch.zeros_like(gradients[0])
    for own, start in enumerate(gradients):
        gradient = start.clone()
        for other in torch.randperm(len(gradients)).tolist():
            against = gradient @ gradients[other]
            if other != own and against < 0 and squares[other] > 0:
                gradient -= against / squares[other] * gradients[other]
        total += gradient
    return total


def _with_gradient(value: Tensor, gradient: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """``value`` with this gradient instead of its own."""
    parts = gradient.split([parameter.numel() for parameter in parameters])
    slopes = [(p.float() * g.view_as(p)).sum() for p, g in zip(parameters, parts, strict=True)]
    surrogate = torch.stack(slopes).sum()
    return value.detach() + (surrogate - surrogate.detach())


class _State(nn.Module):
    """What was measured, pair by pair; buffers, so that checkpoints hold them."""

    batches: Tensor
    measured: Tensor
    cosine: Tensor
    share: Tensor

    def __init__(self, pairs: int, device: torch.device):
        super().__init__()
        for name in ("batches", "measured"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        for name in ("cosine", "share"):
            self.register_buffer(name, torch.zeros(pairs, device=device))

    def remember(self, gradients: Tensor) -> None:
        """Take the pairs' cosines of ``gradients`` [terms, n] into the running means. 0 where a gradient is 0."""
        unit = gradients / gradients.norm(dim=1, keepdim=True).clamp_min(torch.finfo(gradients.dtype).tiny)
        products = unit @ unit.T
        first, second = map(list, zip(*combinations(range(len(gradients)), 2), strict=True))
        cosine = products[first, second]
        part = 1.0 if int(self.measured) == 0 else _MEMORY
        self.cosine.lerp_(cosine, part)
        self.share.lerp_((cosine < 0).float(), part)
        self.measured += 1


def _state_of(model: nn.Module, objective: Conflict) -> _State:
    return cast(_State, attached(model, objective.key))


@final
@dataclass(frozen=True)
class MeasureConflict(Companion):
    """Holds what ``objective`` measures while it is trained, and tells it."""

    objective: Conflict

    def begin(self, model: nn.Module, task: Task) -> None:
        """Nothing is measured yet."""
        terms = len(self.objective.terms)
        attach(model, self.objective.key, _State(terms * (terms - 1) // 2, device_of(model)))

    def noted(self, model: nn.Module) -> Mapping[str, float]:
        """For each pair of terms: the cosine of their gradients' angle, the share of batches where it is negative."""
        state = _state_of(model, self.objective)
        pairs = [f"{a}, {b}" for a, b in combinations(term_names(self.objective.terms), 2)]
        cosines = zip(pairs, state.cosine.tolist(), state.share.tolist(), strict=True)
        return {
            name: value
            for pair, cosine, share in cosines
            for name, value in ((f"cosine {pair}", cosine), (f"in conflict {pair}", share))
        }

    def finish(self, model: nn.Module) -> Plan:
        """Take the measurements off."""
        detach(model, self.objective.key)
        return Plan("measure conflict")
