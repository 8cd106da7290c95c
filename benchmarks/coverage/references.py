"""The same numbers by scikit-learn, scipy or a loop that can be read at a glance, on random inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, confusion_matrix, log_loss, recall_score

from tersor.tensor.calibration import brier, ece, mce, nll, reliability, softmax
from tersor.tensor.fairness import fairness
from tersor.tensor.statistics import benjamini_hochberg, holm, mcnemar

INPUTS = 50
Pairs = Iterator[tuple[float, float]]


@dataclass(frozen=True)
class Reference:
    """``apart``: the largest difference between ours and theirs over ``INPUTS`` random inputs."""

    what: str
    by: str
    apart: float


def references() -> list[Reference]:
    """Every comparison."""
    chosen: list[tuple[str, str, Callable[[Generator], Pairs]]] = [
        ("ECE and MCE, equal width", "a loop over bins", _width),
        ("ECE, equal mass", "a loop over bins", _mass),
        ("reliability diagram, both kinds of bins", "scikit-learn calibration_curve", _curve),
        ("Brier score", "scikit-learn brier_score_loss", _brier),
        ("negative log likelihood", "scikit-learn log_loss", _nll),
        ("accuracy, selection, true and false positive rate of groups", "scikit-learn metrics", _rates),
        ("demographic parity, disparate impact, equalised odds, accuracy gap", "a loop over groups", _gaps),
        ("McNemar, exact", "scipy binomtest", _mcnemar),
        ("McNemar, mid-p", "a sum of binomial terms", _mid_p),
        ("Benjamini and Hochberg", "scipy false_discovery_control", _false_discoveries),
        ("Holm", "a loop that steps down", _holm),
    ]
    return [Reference(what, by, _apart(pairs)) for what, by, pairs in chosen]


def _apart(pairs: Callable[[Generator], Pairs]) -> float:
    random = np.random.default_rng(0)
    return max(abs(ours - theirs) for _ in range(INPUTS) for ours, theirs in pairs(random))


def _answers(random: Generator) -> tuple[np.ndarray, np.ndarray]:
    n = int(random.integers(50, 500))
    confidence = 1 - 0.7 * random.beta(0.4, 2, n)
    return confidence, (random.random(n) < 0.9 * confidence).astype(float)


def _looped(confidence: np.ndarray, correct: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    gaps, weights = [], []
    for number, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        inside = (confidence > low if number else confidence >= low) & (confidence <= high)
        if inside.any():
            gaps.append(abs(confidence[inside].mean() - correct[inside].mean()))
            weights.append(inside.mean())
    return float(np.dot(weights, gaps)), max(gaps)


def _width(random: Generator) -> Pairs:
    answers, bins = _answers(random), int(random.integers(1, 25))
    average, largest = _looped(*answers, np.linspace(0, 1, bins + 1))
    yield ece(*answers, bins), average
    yield mce(*answers, bins).value, largest


def _mass(random: Generator) -> Pairs:
    answers, bins = _answers(random), int(random.integers(1, 25))
    yield ece(*answers, bins, "mass"), _looped(*answers, np.quantile(answers[0], np.linspace(0, 1, bins + 1)))[0]


def _curve(random: Generator) -> Pairs:
    confidence, correct = _answers(random)
    for kind, strategy in (("width", "uniform"), ("mass", "quantile")):
        found = reliability(confidence, correct, 10, kind)  # type: ignore[arg-type]
        theirs = calibration_curve(correct, confidence, n_bins=10, strategy=strategy)
        yield from zip([*found.accuracy, *found.confidence], np.concatenate(theirs), strict=True)


def _scores(random: Generator) -> tuple[np.ndarray, np.ndarray]:
    return softmax(random.normal(0, 2, (80, 5))), random.integers(0, 5, 80)


def _brier(random: Generator) -> Pairs:
    p, targets = _scores(random)
    yield float(brier(p, targets).mean()), brier_score_loss(targets, p, scale_by_half=False, labels=range(5))


def _nll(random: Generator) -> Pairs:
    p, targets = _scores(random)
    yield float(nll(p, targets).mean()), log_loss(targets, p, labels=range(5))


def _people(random: Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = int(random.integers(100, 400))
    actual, groups = random.integers(0, 2, n), random.choice(["a", "b", "c"], n)
    return np.where(random.random(n) < 0.8, actual, 1 - actual), actual, groups


def _rates(random: Generator) -> Pairs:
    predicted, actual, groups = _people(random)
    for rates in fairness(predicted, actual, groups).groups:
        p, y = predicted[groups == rates.group], actual[groups == rates.group]
        (tn, fp), _ = confusion_matrix(y, p)
        assert rates.true_positive is not None and rates.false_positive is not None
        yield rates.accuracy.value, accuracy_score(y, p)
        yield rates.true_positive.value, recall_score(y, p)
        yield rates.false_positive.value, fp / (fp + tn)
        yield rates.selection.value, p.mean()


def _gaps(random: Generator) -> Pairs:
    predicted, actual, groups = _people(random)
    found = fairness(predicted, actual, groups)
    assert found.disparate_impact is not None and found.equalised_odds is not None

    def of(rows: np.ndarray, values: np.ndarray) -> list[float]:
        return [float(values[rows & (groups == group)].mean()) for group in "abc"]

    selected, right = of(actual >= 0, predicted), of(actual >= 0, predicted == actual)
    odds = [of(actual == value, predicted) for value in (0, 1)]
    yield found.demographic_parity.value, max(selected) - min(selected)
    yield found.disparate_impact.value, min(selected) / max(selected)
    yield found.equalised_odds.value, max(max(rates) - min(rates) for rates in odds)
    yield found.accuracy_gap.value, max(right) - min(right)


def _split(random: Generator) -> tuple[int, int, np.ndarray, np.ndarray]:
    one, other = (int(count) for count in random.integers(0, 60, 2))
    return one, other, np.repeat([1, 0, 1], [one, other, 40]), np.repeat([0, 1, 1], [one, other, 40])


def _mcnemar(random: Generator) -> Pairs:
    one, other, a, b = _split(random)
    yield mcnemar(a, b).p, stats.binomtest(one, one + other).pvalue if one + other else 1.0


def _mid_p(random: Generator) -> Pairs:
    one, other, a, b = _split(random)
    terms = [math.comb(one + other, k) / 2 ** (one + other) for k in range(min(one, other) + 1)]
    yield mcnemar(a, b).p_mid, min(1.0, 2 * sum(terms[:-1]) + terms[-1])


def _false_discoveries(random: Generator) -> Pairs:
    p = random.random(int(random.integers(1, 30))) ** 3
    yield from zip(benjamini_hochberg(p), stats.false_discovery_control(p), strict=True)


def _holm(random: Generator) -> Pairs:
    p = random.random(int(random.integers(1, 30))) ** 3
    largest, theirs = 0.0, {}
    for step, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, p[index] * (len(p) - step)))
        theirs[index] = largest
    yield from ((ours, theirs[index]) for index, ours in enumerate(holm(p)))
