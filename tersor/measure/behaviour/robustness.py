"""Both models on corrupted and on attacked inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError, VerificationError
from tersor.core.measurement import Measurement
from tersor.core.progress import Progress
from tersor.measure.behaviour.attacks import Attacked, Corrupted, Scale
from tersor.measure.behaviour.collect import Collected, collect
from tersor.measure.behaviour.corruptions import NUMBERS, PICTURES, SEVERITIES
from tersor.measure.behaviour.data import EvaluationData
from tersor.measure.behaviour.inputs import Change
from tersor.measure.behaviour.intervals import mean_of
from tersor.measure.behaviour.quality import drop_of, metric_of
from tersor.measure.behaviour.schema import Condition, Robustness, Skipped
from tersor.measure.behaviour.scores import Scores
from tersor.measure.runnable import Runnable

_FEWEST = 50  # samples below which a shorter measurement says nothing
_MOST_CHANGED = 0.01  # of the answers that may differ at a second pass: sums of floats do not always come out the same


@final
@dataclass(frozen=True)
class Stress:
    """How both models are tried: the first ``samples``, at ``severities`` of corruptions, attacked within ``budgets``.

    ``budgets``: L∞, of pixels in [0, 1]. ``steps`` of PGD (FGSM comes along; 0: no attacks). ``seconds``: where it
    would take longer, fewer samples are taken (at least 50), and that is said. Raises InputError for settings that
    cannot be.
    """

    samples: int = 500
    severities: tuple[int, ...] = (1, 3, 5)
    budgets: tuple[float, ...] = (2 / 255, 8 / 255)
    steps: int = 10
    seconds: float = 120.0

    def __post_init__(self) -> None:
        check_fields(self)
        fits = self.samples >= 1 and set(self.severities) <= set(SEVERITIES) and self.steps >= 0 and self.seconds > 0
        if not fits or not all(0 < budget < 1 for budget in self.budgets):
            raise InputError(
                "unusable settings", where="Stress", got=str(self),
                expected="samples from 1, severities of 1 to 5, budgets in (0, 1), steps from 0, seconds above 0",
            )  # fmt: skip


def robustness(
    original: Runnable,
    compressed: Runnable,
    data: EvaluationData,
    clean: Collected,
    stress: Stress = Stress(),
    progress: Progress | None = None,
) -> tuple[Robustness | None, tuple[Skipped, ...]]:
    """Both on corrupted and attacked inputs, and what was left out and why; ``clean``: what they answer unchanged.

    A PyTorch model is attacked with its own gradients, and what was made against one is given to the other too; an ONNX
    file is attacked by transfer only.
    """
    if clean.reach is None or not clean.reach.floating:
        return None, (Skipped(what="robustness", why="the inputs are no real numbers that could be corrupted"),)
    scale = Scale.of(clean.reach, data)
    samples, said = _samples(clean, stress, scale)
    progress = progress or Progress()

    def run(change: Change | None) -> Collected:
        return collect(original, compressed, data, change=change, limit=samples, progress=progress)

    base = run(None)
    if (changed := _changed(clean, base)) is not None:
        return None, (Skipped(what="robustness", why=changed),)
    found, broken = _corrupted(scale, stress, run)
    attacks, skipped = _attacks((original, compressed), data, scale, stress, run, base)
    corrupted = tuple(_condition(name, severity, each, data) for name, severity, each in found)
    mean = _mean([each for *_, each in found], data) if found else None
    result = Robustness(
        samples=base.n, scale=scale.said, clean=_condition("clean", 0, base, data), corruptions=corrupted, mean=mean,
        attacks=attacks,
    )  # fmt: skip
    return result, (*said, *broken, *skipped)


def _changed(clean: Collected, base: Collected) -> str | None:
    """Why a second pass cannot be set beside the first; None where the same samples get the same answers."""
    one: NDArray[Any]
    other: NDArray[Any]
    for before, after in zip(clean.both, base.both, strict=True):
        if before.scores is not None and after.scores is not None:
            one, other = before.scores.classes[: len(after.scores.classes)], after.scores.classes
        elif before.values is not None and after.values is not None:
            one, other = before.values[: base.n], after.values
        else:
            one, other = clean.difference[: base.n], base.difference
        if len(one) != len(other) or np.mean(~np.isclose(one, other, rtol=1e-3)) > _MOST_CHANGED:
            return (
                f"at a second pass over the unchanged data {after.name} says something else: the loader gives other "
                "samples each time (shuffle=False mends that), or the model has randomness of its own"
            )
    return None


def _corrupted(
    scale: Scale, stress: Stress, run: Callable[[Change | None], Collected]
) -> tuple[list[tuple[str, int, Collected]], list[Skipped]]:
    """Name, severity and answers for each corruption, and those under which a model gives no finite output."""
    found: list[tuple[str, int, Collected]] = []
    broken: list[Skipped] = []
    for name in PICTURES if scale.pictures else NUMBERS:
        for severity in stress.severities:
            try:
                found.append((name, severity, run(Corrupted(name, severity, scale))))
            except VerificationError as error:
                broken.append(Skipped(what=f"{name} {severity}", why=str(error)))
    return found, broken


def _samples(clean: Collected, stress: Stress, scale: Scale) -> tuple[int, tuple[Skipped, ...]]:
    """How many samples fit in the time, by how long the clean data took."""
    wanted = min(stress.samples, clean.n)
    corruptions = len(PICTURES if scale.pictures else NUMBERS) * len(stress.severities)
    attacks = len(stress.budgets) * 2 * (2 + 3 * (stress.steps + 1)) if stress.steps else 0
    each = clean.seconds / clean.n * (1 + corruptions + attacks)
    fit = max(min(_FEWEST, wanted), int(stress.seconds / max(each, 1e-12)))
    if fit >= wanted:
        return wanted, ()
    why = (
        f"{wanted} samples would take about {wanted * each:.0f} s of the {stress.seconds:g} s allowed: {fit} were taken"
    )
    return fit, (Skipped(what="a part of the samples for robustness", why=why),)


def _attacks(
    models: tuple[Runnable, Runnable],
    data: EvaluationData,
    scale: Scale,
    stress: Stress,
    run: Callable[[Change | None], Collected],
    base: Collected,
) -> tuple[tuple[Condition, ...], tuple[Skipped, ...]]:
    if not stress.steps or not stress.budgets:
        return (), (Skipped(what="attacks", why="not asked for"),)
    if base.kind == "numbers" and not data.labelled:
        return (), (Skipped(what="attacks", why="without targets there is no loss to raise"),)
    found: list[Condition] = []
    skipped: list[Skipped] = []
    for model in models:
        if model.module is None:
            other = next((each.name for each in models if each.module is not None), None)
            how = (
                "neither is a PyTorch model"
                if other is None
                else f"by transfer only, with what was made against {other}"
            )
            why = f"{model.backend} gives no gradients: {how}"
            skipped.append(Skipped(what=f"attacks on {model.name} with its own gradients", why=why))
            continue
        try:
            for budget in stress.budgets:
                for steps in dict.fromkeys((1, stress.steps)):
                    change = Attacked(model, data.based, scale, budget, steps)
                    found.append(_condition(change.name, budget, run(change), data, model.name))
        except (InputError, VerificationError) as error:
            skipped.append(Skipped(what=f"attacks on {model.name} with its own gradients", why=str(error)))
    return tuple(found), tuple(skipped)


def _condition(name: str, severity: float, found: Collected, data: EvaluationData, against: str = "") -> Condition:
    first, second = _scores(found)
    same = None if first is None or second is None else mean_of(first.classes == second.classes, found)
    one, other, drop = _three(found, data)
    return Condition(
        name=name, severity=severity, against=against, original=one, compressed=other, drop=drop, agreement=same
    )


def _three(found: Collected, data: EvaluationData) -> tuple[Measurement | None, Measurement | None, Measurement | None]:
    if not data.labelled:
        return None, None, None
    return metric_of(found.original, data), metric_of(found.compressed, data), drop_of(found, data)


def _mean(conditions: Iterable[Collected], data: EvaluationData) -> Condition:
    """Each sample's mean over the corruptions: what hangs on the samples is resampled with them."""
    each = list(conditions)
    first = each[0]
    same = [one.classes == other.classes for one, other in map(_scores, each) if one is not None and other is not None]
    agreement = mean_of(np.mean(same, axis=0), first) if same else None
    if not data.labelled:
        return Condition(name="mean", severity=0, agreement=agreement)
    models = []
    for which in ("original", "compressed"):
        answers = [found.original if which == "original" else found.compressed for found in each]
        values = np.mean([answer.values for answer in answers if answer.values is not None], axis=0)
        models.append(replace(answers[0], values=values))
    joined = replace(first, original=models[0], compressed=models[1])
    one, other, drop = _three(joined, data)
    return Condition(name="mean", severity=0, original=one, compressed=other, drop=drop, agreement=agreement)


def _scores(found: Collected) -> tuple[Scores | None, Scores | None]:
    return found.original.scores, found.compressed.scores
