"""Lottery tickets: a sparse network, trained from where the dense one began."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

from torch import nn

from tersor.core.apply import apply
from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.plan import Plan
from tersor.core.randomness import seeded
from tersor.core.step import Context, Result, Step, derive_seed
from tersor.core.task import Task
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.rounds import first_epochs, last_epochs, parts_of
from tersor.prune.sparse.standing import plan_of, standing_masks
from tersor.train.finetune import Finetune


@final
@dataclass(frozen=True)
class LotteryTicket(Step):
    """Train, prune a fraction of what remains, put the weights that stay back to what they were early, train again.

    With θ_k the weights after ``rewind`` epochs of ``training`` (k = 0: the initialisation): each round trains from
    θ_k under the masks so far to the end, prunes, and goes back; the last mask's network is trained once more and
    handed back. The optimiser starts afresh at θ_k, the learning rate where it was.

    Args:
        sparsity: fraction of zeros in the end.
        rounds: how many times it is pruned; after round i of n a fraction (1 − s)^(i/n) is left.
        training: the whole training of the dense network. ``rounds`` + 1 of them are made, less what is rewound to.
        rewind: epochs, 0 or more, fewer than ``training`` has.
        initial: "given": the model given is the initialisation; "fresh": it is trained already, and every module's
            ``reset_parameters`` draws a new one from the context's seed.
        prune: everything else that ``Prune`` takes.

    Raises InputError for numbers out of range, another sparsity in ``prune``, and for "fresh" where a module with
    parameters has no ``reset_parameters``.
    Source: Frankle and Carbin 2019 (arXiv 1803.03635), section 2; Frankle et al. 2019 (arXiv 1903.01611) for k > 0.
    """

    sparsity: float = 0.8
    rounds: int = 5
    training: Finetune = field(default_factory=lambda: Finetune(epochs=10))
    rewind: int = 0
    initial: Literal["given", "fresh"] = "given"
    prune: Prune = field(default_factory=Prune)

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.rewind < self.training.epochs:
            raise InputError(
                "out of range",
                where="LotteryTicket.rewind",
                got=self.rewind,
                expected=f"0 … {self.training.epochs - 1}",
            )
        if self.initial not in ("given", "fresh"):
            raise InputError(
                "unknown", where="LotteryTicket.initial", got=repr(self.initial), expected="given or fresh"
            )
        parts_of(self.rounds, self._prune)  # checks them

    @property
    def _prune(self) -> Prune:
        return self.prune.to(self.sparsity)

    def run(self, model: nn.Module, task: Task, context: Context | None = None) -> Result:
        """The winning ticket, trained. ``facts``: what the last of its trainings noted."""
        context, task = context or Context(), task.ready()
        history: list[Mapping[str, Any]] = []
        start = copy.deepcopy(model) if self.initial == "given" else reinitialised(model, context.seed)
        if self.rewind:
            early = first_epochs(self.training, self.rewind).run(start, task, context.part(0, "Early"))
            start, history = early.model, [*early.history]
        late = last_epochs(self.training, self.training.epochs - self.rewind)
        ticket, plan = start, Plan("lottery ticket")
        for number, prune in enumerate(parts_of(self.rounds, self._prune)):
            trained = late.run(ticket, task, context.part(2 * number + 1, "Finetune"))
            pruned = prune.run(trained.model, task, context.part(2 * number + 2, "Prune"))
            plan = plan_of("lottery ticket", standing_masks(pruned.model))
            ticket = apply(start, plan)
            history += trained.history
        last = late.run(ticket, task, context.part(2 * self.rounds + 1, "Finetune"))
        return Result(last.model, (plan,), (*history, *last.history), last.facts)


def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose every module has drawn its parameters anew (``reset_parameters``), in the model's order."""
    target = copy.deepcopy(model)
    with seeded(derive_seed(seed, 0)):
        for path, module in target.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif any(parameter is not None for parameter in module._parameters.values()):
                raise InputError(
                    "its initialisation is not known", where=path or "<model>", got=type(module).__name__,
                    expected="a module with reset_parameters", do='Give the untrained network, with initial="given"',
                )  # fmt: skip
    return target
