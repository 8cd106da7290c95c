"""Trials on copies: whether the user's forward follows the removal of what was chosen."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tersor.core.apply import apply
from tersor.core.errors import VerificationError
from tersor.core.plan import Plan, Skip
from tersor.core.task import Task
from tersor.core.verify import verify_edits
from tersor.graph.group import removal
from tersor.prune.amount import Kept


def culprits(model: nn.Module, task: Task, choices: Sequence[Kept], skips: list[Skip]) -> set[int]:
    """Numbers of the choices that the forward does not follow; each leaves a Skip.

    All are tried at once, on one copy; only where that fails are halves tried, and their halves. A choice that flows
    through no literal size and merely changes the numbers is no culprit: that is a wrong rule, and ``run`` raises.
    """
    found: set[int] = set()
    _search(model, task, choices, [number for number, kept in enumerate(choices) if kept], found, skips)
    return found


def _search(
    model: nn.Module, task: Task, choices: Sequence[Kept], numbers: list[int], found: set[int], skips: list[Skip]
) -> None:
    objection = _objection(model, task, [choices[number] for number in numbers]) if numbers else None
    if objection is None:
        return
    if len(numbers) > 1:
        half = len(numbers) // 2
        _search(model, task, choices, numbers[:half], found, skips)
        _search(model, task, choices, numbers[half:], found, skips)
        return
    literals = [literal for group in choices[numbers[0]] for literal in group.literals]
    if literals or objection.__cause__:
        found.add(numbers[0])
        where = f"its size is a literal in the forward ({', '.join(literals[:3])})"
        for group in choices[numbers[0]]:
            skips.append(Skip(group.name, f"{where if literals else 'the forward fails without it'}: {objection.got}"))


def _objection(model: nn.Module, task: Task, choices: Sequence[Kept]) -> VerificationError | None:
    plan = Plan("trial", removal({group: kept for choice in choices for group, kept in choice.items()}))
    try:
        verify_edits(model, apply(model, plan), plan, task)
    except VerificationError as error:
        return error
    return None
