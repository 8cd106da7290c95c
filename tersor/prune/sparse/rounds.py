"""Prune in rounds, each followed by training: a fraction of what remains goes, the network recovers, and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tersor.core.errors import InputError
from tersor.core.step import Pipeline, Step
from tersor.prune.sparse.prune import Prune
from tersor.train.finetune import Finetune
from tersor.train.schedules import Part


def prune_in_rounds(
    rounds: int,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    recovery: Step,
    prune: Prune | None = None,
) -> Pipeline:
    """Remove the same fraction of what remains in each of ``rounds``, each followed by ``recovery``.

    After round i of n a fraction (1 − s)^(i/n) of the weights is left: at s = 0.9 in three rounds 46 %, 22 %, 10 %.
    One round is one shot.

    Args:
        rounds: 1 or more.
        sparsity: fraction of zeros in the end, or fractions by name; by default that of ``prune``.
        recovery: a step that trains or repairs; ``Finetune(patience=…)`` stops early and keeps the best epoch.
        prune: everything else that ``Prune`` takes.

    Raises InputError for fewer than one round, and two sparsities.
    Source: Han et al. 2015 (arXiv 1506.02626), section 3.
    """
    steps: list[Step] = []
    for part in parts_of(rounds, (prune or Prune()).to(sparsity)):
        steps += [part, recovery]
    return Pipeline(tuple(steps))


def parts_of(rounds: int, prune: Prune) -> list[Prune]:
    """What each round prunes to; the last is ``prune`` itself."""
    if rounds < 1:
        raise InputError("too few", where="rounds", got=rounds, expected="1 or more")
    return [prune.remaining(number / rounds) for number in range(1, rounds)] + [prune]


def rewind_learning_rate(
    rounds: int,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    training: Finetune,
    epochs: int,
    prune: Prune | None = None,
) -> Pipeline:
    """``prune_in_rounds`` whose recovery is the last ``epochs`` epochs of ``training`` over again: weights go on from
    where they are, the learning rate goes back to where it was then.

    ``training``: as the dense network was trained. Raises InputError unless 1 ≤ epochs ≤ training.epochs.
    Source: Renda, Frankle, Carbin 2020 (arXiv 2003.02389), section 3.
    """
    return prune_in_rounds(rounds, sparsity, recovery=last_epochs(training, epochs), prune=prune)


def first_epochs(training: Finetune, epochs: int) -> Finetune:
    """The first ``epochs`` of a training, with the learning rates that they have in the whole of it."""
    _expect_within(training, epochs)
    schedule = Part(training.schedule, 0.0, epochs / training.epochs)
    return replace(training, epochs=epochs, schedule=schedule, keep="last", patience=None)


def last_epochs(training: Finetune, epochs: int) -> Finetune:
    """The last ``epochs`` of a training, with the learning rates that they have in the whole of it."""
    _expect_within(training, epochs)
    return replace(training, epochs=epochs, schedule=Part(training.schedule, 1 - epochs / training.epochs, 1.0))


def _expect_within(training: Finetune, epochs: int) -> None:
    if not 1 <= epochs <= training.epochs:
        raise InputError("no such part of the training", where="epochs", got=epochs, expected=f"1 … {training.epochs}")
