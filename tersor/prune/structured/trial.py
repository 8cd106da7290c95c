"""Trials on copies: whether the user's forward follows the removal of what was chosen."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tersor.core.apply import apply
from tersor.core.copies import sharing_copy
from tersor.core.errors import VerificationError
from tersor.core.plan import Plan, Skip
from tersor.core.task import Task
from tersor.core.verify import verify_edits
from tersor.graph.group import Groups, removal
from tersor.graph.reference import reference
from tersor.prune.structured.amount import Kept


def culprits(model: nn.Module, task: Task, groups: Groups, choices: Sequence[Kept], skips: list[Skip]) -> set[int]:
    """Numbers of the choices that the forward does not follow; each leaves a Skip.

    All are tried at once, on one copy; only where that fails are halves tried, and their halves. A choice that the
    forward runs without but that is not the masked model (it computes with the channels' number) is a culprit too.
    """
    found: set[int] = set()

    def search(numbers: list[int]) -> None:
        kept = {group: units for number in numbers for group, units in choices[number].items()}
        objection = _objection(model, task, groups, kept) if kept else None
        if objection is None:
            return
        if len(numbers) > 1:
            search(numbers[: len(numbers) // 2])
            search(numbers[len(numbers) // 2 :])
        else:
            found.add(numbers[0])
            why = "fails without it" if objection.__cause__ else "computes with its size: removing is not masking"
            skips.extend(Skip(group.name, f"the forward {why}: {objection.got}") for group in kept)

    if any(parameter.is_meta for parameter in model.parameters()):
        return found  # a plan without weights: nothing can run
    search([number for number, kept in enumerate(choices) if kept])
    return found


def _objection(model: nn.Module, task: Task, groups: Groups, kept: Kept) -> VerificationError | None:
    plan = Plan("trial", removal(kept), reference=reference(groups, model, kept))
    shrunk = apply(sharing_copy(model), plan, in_place=True)  # slices are new tensors; nothing is written into old ones
    try:
        verify_edits(model, shrunk, plan, task, draws=0)  # ``run`` verifies on noise too
    except VerificationError as error:
        return error
    return None
