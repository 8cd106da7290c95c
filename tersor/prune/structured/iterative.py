"""Iterative pruning: a little goes, the model recovers, a little more goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tersor.core.errors import InputError
from tersor.core.step import Pipeline, Step
from tersor.prune.structured.amount import Keep, exact
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.scores import Magnitude, Score


def prune_iteratively(
    steps: int,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    keep: Keep | None = None,
    recovery: Step,
    score: Score | None = None,
    method: PruneChannels | None = None,
) -> Pipeline:
    """Prune towards ``sparsity`` or ``keep`` in ``steps`` equal parts of the way, each followed by ``recovery``.

    Part i of n prunes to i/n of ``sparsity``, or to 1 − (1 − keep)·i/n of what the task's model has: always of the
    original, so that rounding does not add up, and the last part arrives where one shot would. Scores are taken anew
    at each part.

    Args:
        steps: parts of the way, 1 or more.
        sparsity: fraction of channels removed in the end, or fractions by name; 0.5 where no ``keep`` is given either.
        keep: in its place, the fraction of MACs, parameters or bytes that is left in the end.
        recovery: a step that trains or repairs (Finetune, RecalibrateBatchNorm, a Pipeline).
        score: what ranks channels at each part.
        method: everything else that PruneChannels takes (where, scope, multiple_of, …); its amounts are not read.

    Raises InputError where ``steps`` is below 1, or ``keep`` is an absolute number, of which no part can be taken
    before the model is known.

    Source: Molchanov et al. 2017 (arXiv 1611.06440), section 2, who remove one feature map at a time.
    """
    if steps < 1:
        raise InputError("out of range", where="prune_iteratively.steps", got=steps, expected="1 or more")
    if keep is not None and keep.number > 1 and steps > 1:
        raise InputError(
            "an absolute number cannot be approached in parts", where=f"prune_iteratively.keep.{keep.what}",
            got=keep.number, expected="a fraction in (0, 1]", do="Divide by what the model has",
        )  # fmt: skip
    base = method or PruneChannels()
    base = replace(base, score=score or (method.score if method else Magnitude()), relative_to="original")
    whole = replace(base, sparsity=sparsity, keep=keep)  # checks the amounts
    parts: list[Step] = []
    for number in range(1, steps + 1):
        parts += [_part(whole, number, steps), recovery]
    return Pipeline(tuple(parts))


def _part(whole: PruneChannels, number: int, steps: int) -> PruneChannels:
    if whole.keep is not None:
        left = 1 - (1 - whole.keep.number) * number / steps if steps > 1 else whole.keep.number
        return replace(whole, keep=replace(whole.keep, **{whole.keep.what: left}))
    if isinstance(whole.sparsity, Mapping):
        parts = {pattern: _fraction(value, number, steps) for pattern, value in whole.sparsity.items()}
        return replace(whole, sparsity=parts)
    assert whole.sparsity is not None
    return replace(whole, sparsity=_fraction(whole.sparsity, number, steps))


def _fraction(sparsity: float, number: int, steps: int) -> float:
    return float(exact(sparsity) * number / steps)
