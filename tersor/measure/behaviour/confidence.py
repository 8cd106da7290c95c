"""How far each model's confidence can be believed: calibration, and what it says of data from elsewhere."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from tersor.core.measurement import Measurement
from tersor.measure.behaviour.collect import Answers, Collected
from tersor.measure.behaviour.intervals import mean_of
from tersor.measure.behaviour.schema import Bins, Calibration, ModelCalibration
from tersor.measure.behaviour.scores import Scores
from tersor.measure.quality import MEAN
from tersor.tensor import calibration as maths
from tersor.tensor.statistics import mean_interval, wilson

Floats = NDArray[np.float64]
VALIDATION = 5000  # samples of validation that a temperature is fitted on
_FEWEST = 20  # rows below which no temperature is fitted
_INVERTED = "test inversion"
_NORMAL = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


def calibration(found: Collected, validation: Collected | None = None) -> Calibration | None:
    """Calibration of both models before and after temperature scaling; None without class scores and targets.

    ``validation``: answers to other samples, which temperatures are fitted on; without it each fifth of the rows is
    scaled by a temperature fitted on the others. Rows are taken as independent, positions of a text too.
    """
    if found.targets is None or found.original.scores is None or found.compressed.scores is None:
        return None
    pairs = [_judged(answers, found.targets) for answers in found.both]
    increase = maths.ece_increase(pairs[0], pairs[1])
    return Calibration(
        original=_of_model(found.original, found, None if validation is None else (validation.original, validation)),
        compressed=_of_model(
            found.compressed, found, None if validation is None else (validation.compressed, validation)
        ),
        ece_increase=Measurement.of(increase, "probability", len(pairs[0][0]), interval=_INVERTED, positive="worse"),
    )


def _judged(answers: Answers, targets: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """(confidence, correct) of each row."""
    assert answers.scores is not None
    return answers.scores.confidence, (answers.scores.classes == targets).astype(np.float64)


def _of_model(answers: Answers, found: Collected, other: tuple[Answers, Collected] | None) -> ModelCalibration:
    scores, targets = answers.scores, found.targets
    assert scores is not None and targets is not None and scores.loss is not None and scores.brier is not None
    confidence, correct = _judged(answers, targets)
    plain = _measurements(confidence, correct, scores.brier, scores.loss)
    kept = len(scores.logits)
    fitted = _temperature(scores, targets, other)
    if fitted is None:
        return ModelCalibration(measurements=plain, bins=_bins(confidence, correct))
    probabilities, temperature, where = fitted
    best, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets[:kept]
    briers, losses = maths.brier(probabilities, targets[:kept]), maths.nll(probabilities, targets[:kept])
    return ModelCalibration(
        measurements=plain, bins=_bins(confidence, correct), temperature=temperature, fitted_on=where,
        scaled=_measurements(best, right.astype(np.float64), briers, losses),
        scaled_bins=_bins(best, right.astype(np.float64)),
    )  # fmt: skip


def _temperature(
    scores: Scores, targets: NDArray[np.int64], other: tuple[Answers, Collected] | None
) -> tuple[Floats, float, str] | None:
    """(probabilities of the rows whose logits are kept, temperature, what it was fitted on); None for too few rows."""
    logits = scores.logits
    if other is not None and other[1].targets is not None and other[0].scores is not None:
        fit = other[0].scores.logits
        if len(fit) >= _FEWEST:
            temperature = maths.fit_temperature(fit, other[1].targets[: len(fit)])
            return maths.softmax(logits, temperature), temperature, f"{other[1].n} validation samples"
    if len(logits) < _FEWEST:
        return None
    probabilities, temperature = maths.cross_fitted(logits, targets[: len(logits)])
    return probabilities, temperature, "the other fifths of the test rows"


def _measurements(confidence: Floats, correct: Floats, briers: Floats, losses: Floats) -> dict[str, Measurement]:
    n = len(confidence)
    kinds: tuple[tuple[Literal["width", "mass"], str], ...] = (("width", ""), ("mass", "_equal_mass"))
    said = {}
    for kind, suffix in kinds:
        said[f"ece{suffix}"] = Measurement(
            maths.ece(confidence, correct, kind=kind), "probability", n=n,
            conditions={"bins": maths.BINS, "interval": f"that of ece_debiased{suffix}: noise alone raises this one"},
        )  # fmt: skip
        said[f"ece_debiased{suffix}"] = Measurement.of(
            maths.ece_interval(confidence, correct, kind=kind), "probability", n, bins=maths.BINS, interval=_INVERTED
        )
    said["mce"] = Measurement.of(maths.mce(confidence, correct), "probability", n, bins=maths.BINS, interval=_INVERTED)
    for name, values, unit in (
        ("brier", briers, "squared probability"), ("nll", losses, "nats"), ("confidence", confidence, "probability"),
    ):  # fmt: skip
        ends = mean_interval(values) if n > 1 else (-np.inf, np.inf)
        said[name] = Measurement.of((float(values.mean()), *ends), unit, n, interval=MEAN)
    return said


def _bins(confidence: Floats, correct: Floats) -> Bins:
    found = maths.reliability(confidence, correct)
    return Bins(**{name: tuple(getattr(found, name).tolist()) for name in Bins.model_fields})


def outside(found: Collected, elsewhere: Collected) -> dict[str, Measurement]:
    """What both say of data from elsewhere, where nothing is right: name → measurement.

    ``agreement``; ``original_confidence`` and ``compressed_confidence`` there, ``…_confidence_inside`` on the test
    data; ``…_auroc``: how well confidence tells the two apart (1: perfectly, 0.5: not at all; Hendrycks and Gimpel
    2017, arXiv:1610.02136); ``auroc_drop``: the original's minus the compressed model's.
    """
    one, other = elsewhere.original.scores, elsewhere.compressed.scores
    if one is None or other is None or found.original.scores is None or found.compressed.scores is None:
        return {}
    said = {"agreement": mean_of(one.classes == other.classes, elsewhere)}
    pairs = []
    for name, inside, away in (
        ("original", found.original.scores, one),
        ("compressed", found.compressed.scores, other),
    ):
        said[f"{name}_confidence"] = mean_of(away.confidence, elsewhere, "probability")
        said[f"{name}_confidence_inside"] = mean_of(inside.confidence, found, "probability")
        pairs.append((inside.confidence, away.confidence))
        said[f"{name}_auroc"] = auroc([pairs[-1]])
    said["auroc_drop"] = auroc(pairs)
    return said


def auroc(pairs: list[tuple[Floats, Floats]]) -> Measurement:
    """AUROC of a pair (inside, away) of confidences; of two pairs on the same samples, the first's minus the second's.

    Source: DeLong et al. 1988, "Comparing the areas under two or more correlated receiver operating characteristic
    curves", whose variance is that of the placements; one area's interval is that of its logit (Qin and Hotilovac 2008,
    "Comparison of non-parametric confidence intervals for the area under the ROC curve", section 2.2). Where nothing
    varies (told apart without an error, all tied, the same model twice) an end lies as far away as Wilson's of none in
    the smaller sample.
    """
    signs = (1.0, -1.0)
    placed = [_placements(*pair) for pair in pairs]
    inside = np.sum([sign * each[0] for sign, each in zip(signs, placed, strict=False)], axis=0)
    away = np.sum([sign * each[1] for sign, each in zip(signs, placed, strict=False)], axis=0)
    value, n, fewer = float(inside.mean()), len(inside) + len(away), min(len(inside), len(away))
    if fewer < 2:
        return Measurement(value, "AUROC", n=n, conditions={"interval": "none: one sample"})
    reach = _NORMAL * float(np.sqrt(inside.var(ddof=1) / len(inside) + away.var(ddof=1) / len(away)))
    if reach > 0 and len(pairs) == 1:
        logit, spread = special.logit(value), reach / (value * (1 - value))
        ends = float(special.expit(logit - spread)), float(special.expit(logit + spread))
        return Measurement.of((value, *ends), "AUROC", n, interval="DeLong, of the logit")
    reach, how = (reach, "DeLong") if reach > 0 else (wilson(0, fewer)[1], "Wilson, of none")
    ends = max(value - reach, 0.0 if len(pairs) == 1 else -1.0), min(value + reach, 1.0)
    return Measurement.of((value, *ends), "AUROC", n, interval=how)


def _placements(inside: Floats, away: Floats) -> tuple[Floats, Floats]:
    """For each confidence inside the fraction of those away that lie below it (a tie counts half), and the reverse."""

    def below(values: Floats, others: Floats) -> Floats:
        ordered = np.sort(others)
        ends = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
        return ends / (2 * len(others))

    return below(inside, away), 1 - below(away, inside)
