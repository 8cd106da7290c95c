"""Calibration: whether a model that says 80 % is right in 80 % of the cases. Arrays in, plain floats out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from tersor.tensor.proportions import mover
from tersor.tensor.statistics import Estimate, is_binary, wilson, wilson_intervals

Array = NDArray[np.float64]
Kind = Literal["width", "mass"]
BINS = 15
HOTTEST = 100.0  # temperatures are looked for between this and its inverse
FEWEST_IN_BIN = 20  # samples below which nothing is said of the largest error of any bin
_MCE_SHIFT = 0.75
_ENOUGH = 10  # wrong (or right) answers, for the moments of bins
_UNSURE = 1.25  # standard errors that a bin may be off by chance
_STEPS = 100  # true errors that are tried
_SMALLEST = float(np.finfo(np.float64).eps)  # the probability below which a log likelihood is cut off


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram, one entry for each bin that has samples.

    ``low``, ``high``: the bin's edges; ``count``: its samples; ``confidence`` and ``accuracy``: their means in it;
    ``accuracy_low``, ``accuracy_high``: Wilson's interval of the accuracy. All [bins].
    """

    low: Array
    high: Array
    count: NDArray[np.int64]
    confidence: Array
    accuracy: Array
    accuracy_low: Array
    accuracy_high: Array


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS, kind: Kind = "width") -> Reliability:
    """Mean confidence and accuracy of ``confidence`` [n] in [0, 1] and ``correct`` [n] in {0, 1}, bin by bin.

    ``kind``: bins (low, high] of equal width, or of equal mass (as many samples in each; Nguyen and O'Connor 2015,
    arXiv:1508.05154). Samples of one confidence always share a bin. Raises ValueError for other lengths or values.
    """
    c, y = _checked(confidence, correct, bins)
    edges, number = _binned(c, bins, kind)
    count = np.bincount(number, minlength=len(edges) - 1)
    some = count > 0
    sums = [np.bincount(number, values, len(edges) - 1)[some] for values in (c, y)]
    n = count[some]
    low, high = wilson_intervals(sums[1], n)
    return Reliability(edges[:-1][some], edges[1:][some], n, sums[0] / n, sums[1] / n, low, high)


def _binned(c: Array, bins: int, kind: Kind) -> tuple[Array, NDArray[np.int64]]:
    """The edges [bins + 1] and the bin of each sample."""
    edges = np.linspace(0, 1, bins + 1)
    if kind == "mass":
        edges = np.unique(np.quantile(c, edges))
        if len(edges) == 1:
            edges = np.repeat(edges, 2)
    return edges, np.searchsorted(edges[1:-1], c, side="left")


def ece(
    confidence: ArrayLike, correct: ArrayLike, bins: int = BINS, kind: Kind = "width", *, debias: bool = False
) -> float:
    """Expected calibration error Σ_b (n_b / n) · |accuracy_b − confidence_b|, in [0, 1].

    Source: Naeini et al. 2015; Guo et al. 2017 (arXiv:1706.04599), section 2. It is never below zero, so noise alone
    raises it; ``debias`` takes off what noise adds, which for normal noise of each bin's accuracy is known exactly
    (Kumar et al. 2019, arXiv:1909.10155, section 5, draw it; Roelofs et al. 2022, arXiv:2012.08668, compare).
    """
    return _debiased(_bins(confidence, correct, bins, kind)) if debias else _bins(confidence, correct, bins, kind).error


@dataclass(frozen=True, eq=False)
class _Bins:
    """Samples, mean confidence and accuracy of each bin."""

    count: NDArray[np.int64]
    confidence: Array
    accuracy: Array

    @property
    def weight(self) -> Array:
        return self.count / self.count.sum()

    @property
    def gap(self) -> Array:
        return self.confidence - self.accuracy

    @property
    def error(self) -> float:
        return float(self.weight @ np.abs(self.gap))


def _bins(confidence: ArrayLike, correct: ArrayLike, bins: int, kind: Kind) -> _Bins:
    c, y = _checked(confidence, correct, bins)
    number = _binned(c, bins, kind)[1]
    count = np.bincount(number)
    some = count > 0
    sums = [np.bincount(number, values)[some] for values in (c, y)]
    return _Bins(count[some], sums[0] / count[some], sums[1] / count[some])


def _debiased(found: _Bins) -> float:
    noise = np.sqrt(found.accuracy * (1 - found.accuracy) / found.count)
    expected = _folded(found.gap, noise)[0]
    return max(0.0, found.error - float(found.weight @ (expected - np.abs(found.gap))))


def _folded(mean: Array, deviation: Array) -> tuple[Array, Array, Array]:
    """Mean, variance and third central moment of |X|, X normal (Leone, Nelson and Nottingham 1961)."""
    at = np.abs(mean)
    z = np.divide(at, deviation, out=np.full_like(at, np.inf), where=deviation > 0)
    density, inside = deviation * np.exp(-(z**2) / 2) * math.sqrt(2 / math.pi), 1 - 2 * special.ndtr(-z)
    first, second = density + at * inside, at**2 + deviation**2
    third = density * (at**2 + 2 * deviation**2) + at * inside * (at**2 + 3 * deviation**2)
    return first, second - first**2, third - 3 * first * second + 2 * first**3


def ece_interval(
    confidence: ArrayLike, correct: ArrayLike, bins: int = BINS, kind: Kind = "width", level: float = 0.95
) -> Estimate:
    """The debiased calibration error of the bins with its interval.

    The error is bounded by zero and biased, so that neither the normal nor the bootstrap interval holds. This one is of
    the true errors for which what was found is no surprise (test inversion; Carpenter 1999, "Test inversion bootstrap
    confidence intervals"), among models whose bins are off by s times what was found, for s from 0 (calibrated)
    upwards. Errors in few bins leave more room for noise in the others than errors in all do: for the lower end a bin
    counts as off by 1.25 standard errors less than found. What such a model would show follows from three moments of
    its bins' folded normal gaps (Cornish and Fisher 1938). The upper end is never below what was found. Moments say
    little where fewer than ten answers are wrong (or right): there it is never below that of |mean confidence −
    accuracy| over all samples, which the error is never below (who is 99.9 % sure and always right in 100 cases may be
    right in 98 %); nor is the lower end above it where all bins are off to one side and the two are the same.
    """
    found = _bins(confidence, correct, bins, kind)
    (_, low, high), value = _inverted(found, level), _debiased(found)
    return Estimate(value, min(low, value), high)


def _inverted(found: _Bins, level: float) -> Estimate:
    """The true error for which what was found is the median, and those for which it is at either end of the level."""
    few, many = _models(found)
    z = float(special.ndtri((1 + level) / 2))
    (low,) = _truths(found, few, [z])
    middle, high = _truths(found, many, [0.0, -z])
    nearest, farthest = _overall(found, level)
    return Estimate(middle, min(low, nearest, middle), max(high, farthest, found.error))


def _overall(found: _Bins, level: float) -> tuple[float, float]:
    """Between what the ends must lie where few answers are wrong (or right): the lower one not above the first, the
    upper one not below the second. By |mean confidence − accuracy| of all samples together, which is never more than
    the error of bins, and the same where all bins are off to one side."""
    right, n = round(float(found.count @ found.accuracy)), int(found.count.sum())
    if min(right, n - right) >= _ENOUGH:
        return 1.0, 0.0
    low, high = wilson(right, n, level)
    confidence = float(found.weight @ found.confidence)
    one_sided = abs(float(found.weight @ found.gap)) > found.error - 1e-12
    nearest = max(0.0, confidence - high, low - confidence) if one_sided else 1.0
    return nearest, max(confidence - low, high - confidence)


def _models(found: _Bins) -> tuple[Array, Array]:
    """True accuracies [scales, bins] of models that are off ever more, for the lower end and for the rest.

    In proportion to what was found less 1.25 standard errors; else to what was found, or a standard error where that is
    more (what was found may be zero).
    """
    noise, gap = _noise(found), np.abs(found.gap)
    few, many = np.maximum(gap - _UNSURE * noise, 0), np.maximum(gap, noise)
    top = found.error + 5 * math.sqrt(float(found.weight**2 @ noise**2)) + 5 / float(found.count.sum())
    spread = _off(found, many, top * float(many.max()) / float(found.weight @ many))
    if not few.any():
        return spread, spread
    return _off(found, few, top * float(few.max()) / float(found.weight @ few)), spread


def _noise(found: _Bins) -> Array:
    """Standard errors of the bins' accuracies."""
    shrunk = (found.count * found.accuracy + 2) / (found.count + 4)  # Agresti and Coull: never without noise
    return np.sqrt(shrunk * (1 - shrunk) / (found.count + 4))


def _off(found: _Bins, off: Array, most: float) -> Array:
    """True accuracies [scales, bins] of models whose bins are off in proportion to ``off``, by up to ``most``."""
    scales = np.linspace(0, most / max(float(off.max()), 1e-9), _STEPS)
    return np.clip(found.confidence - scales[:, None] * np.copysign(off, found.gap), 0, 1)


def _turned(found: _Bins) -> _Bins:
    """The same with what chance explains taken for the other side, the one with more room, for upper ends.

    Who is 99.9 % sure and always right in 100 cases may be right in 98 %.
    """
    gap = np.abs(found.gap)
    side = np.where(gap < _UNSURE * _noise(found), found.confidence - 0.5, found.gap)
    return _Bins(found.count, found.confidence, found.confidence - np.copysign(gap, side))


def _truths(found: _Bins, accuracy: Array, quantiles: list[float]) -> list[float]:
    """The true errors for which what was found is at these normal quantiles of what models [scales, bins] show."""
    gap, weight = found.confidence - accuracy, found.weight
    mean, variance, third = _folded(gap, np.sqrt(accuracy * (1 - accuracy) / found.count))
    truth = np.abs(gap) @ weight
    # How many samples fall in each bin varies as well.
    spread = np.maximum(gap**2 @ weight - truth**2, 0) / float(found.count.sum())
    deviation = np.sqrt(variance @ weight**2 + spread)
    skewness = third @ weight**3 / np.maximum(deviation, 1e-100) ** 3
    shown = [mean @ weight + deviation * (z + (z**2 - 1) * skewness / 6) for z in quantiles]
    return [float(np.interp(found.error, np.maximum.accumulate(each), truth)) for each in shown]


def ece_increase(
    original: tuple[ArrayLike, ArrayLike],
    compressed: tuple[ArrayLike, ArrayLike],
    bins: int = BINS,
    kind: Kind = "width",
    level: float = 0.95,
) -> Estimate:
    """Debiased ECE of ``compressed`` minus that of ``original``; positive is worse.

    Each is (confidence, correct) of the same samples. The interval puts together those of the two (``mover``), around
    the errors for which what was found is the median, with the correlation of what each sample adds to either error.
    Raises ValueError where they are not of the same samples.
    """
    pairs = [_checked(*pair, bins) for pair in (compressed, original)]
    if len(pairs[0][0]) != len(pairs[1][0]):
        raise ValueError(f"{len(pairs[1][0])} and {len(pairs[0][0])} samples are not the same samples")
    new, old = (_inverted(_bins(*pair, bins, kind), level) for pair in pairs)
    shares = [_shares(*pair, bins, kind) for pair in pairs]
    varied = all(np.ptp(share) > 0 for share in shares)
    found = mover(new, old, float(np.corrcoef(shares[0], shares[1])[0, 1]) if varied else 0.0)
    value = ece(*pairs[0], bins, kind, debias=True) - ece(*pairs[1], bins, kind, debias=True)
    return Estimate(value, min(found.low, value), max(found.high, value))


def _shares(c: Array, y: Array, bins: int, kind: Kind) -> Array:
    """What each sample adds to the calibration error: its gap, with the sign of its bin's."""
    _, number = _binned(c, bins, kind)
    return (c - y) * np.sign(np.bincount(number, c - y))[number]


def mce(
    confidence: ArrayLike, correct: ArrayLike, bins: int = BINS, kind: Kind = "width", level: float = 0.95
) -> Estimate:
    """Maximum calibration error max_b |accuracy_b − confidence_b| of the bins that have samples, with its interval.

    Source: Naeini et al. 2015. The interval is by test inversion as in ``ece_interval``, on the binomial distributions
    of the bins themselves. Bins that are off alike show a larger error than one alone: for the lower end bins count as
    off by ``_MCE_SHIFT`` standard errors more than found, up to the largest, for the upper end by as much less, and
    to either side where chance explains what was found.

    A bin of few samples may be off by anything: where one has fewer than ``FEWEST_IN_BIN`` the ends are infinite, which
    says that there are not enough data to tell.
    """
    found = _bins(confidence, correct, bins, kind)
    gap = np.abs(found.gap)
    value, noise, ends = float(gap.max()), _noise(found), []
    if found.count.min() < FEWEST_IN_BIN:
        return Estimate(value, -math.inf, math.inf)
    z = float(special.ndtri((1 + level) / 2))
    for shift, at, sided in ((_MCE_SHIFT, -z, found), (-_MCE_SHIFT, z, found), (-_MCE_SHIFT, z, _turned(found))):
        off = np.clip(gap + shift * noise, 0, value)
        off[gap.argmax()] = max(value, float(noise[gap.argmax()]))
        models = _off(sided, off, 2 * value + 5 * float(noise.max()))[::4]
        surprise = np.maximum.accumulate(-special.ndtri(np.clip(_chance_of_largest(found, models), 1e-12, 1 - 1e-12)))
        ends.append(float(np.interp(at, surprise, np.abs(found.confidence - models).max(axis=1))))
    return Estimate(value, min(ends[0], value), max(*ends[1:], value))


def _chance_of_largest(found: _Bins, accuracy: Array) -> Array:
    """How likely models of true ``accuracy`` [scales, bins] show no larger error in any bin, half of ties counted."""
    n, value = found.count, float(np.abs(found.gap).max())

    def within(gap: float) -> Array:
        most = np.clip(np.floor(n * (found.confidence + gap)), 0, n)
        least = np.clip(np.ceil(n * (found.confidence - gap)), 0, n + 1)
        under = np.where(least > 0, special.bdtr(np.maximum(least - 1, 0), n, accuracy), 0.0)
        return np.asarray(np.maximum(special.bdtr(most, n, accuracy) - under, 0).prod(axis=1))

    return (within(value - 1e-9) + within(value + 1e-9)) / 2


def brier(probabilities: ArrayLike, targets: ArrayLike) -> Array:
    """Brier score of each sample, Σ_k (p_k − [k = target])², float64 [n] in [0, 2], of ``probabilities`` [n, classes].

    Its mean is the model's; ``mean_interval`` and ``paired_difference`` give intervals. Source: Brier 1950.
    """
    p, y = _classes(probabilities, targets)
    rows = np.arange(len(y))
    return np.square(p).sum(axis=1) - 2 * p[rows, y] + 1


def nll(probabilities: ArrayLike, targets: ArrayLike) -> Array:
    """Negative log likelihood −log p_target of each sample in nats, float64 [n], of ``probabilities`` [n, classes].

    Probabilities below 2.2e-16 count as that, as in scikit-learn, so that it is finite.
    """
    p, y = _classes(probabilities, targets)
    return -np.log(np.maximum(p[np.arange(len(y)), y], _SMALLEST))


def softmax(logits: ArrayLike, temperature: float = 1.0) -> Array:
    """Probabilities softmax(logits / temperature) over the last axis, float64."""
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: expected above 0")
    return np.asarray(special.softmax(np.asarray(logits, np.float64) / temperature, axis=-1))


def fit_temperature(logits: ArrayLike, targets: ArrayLike) -> float:
    """The temperature T that minimises the mean NLL of softmax(logits / T), ``logits`` [n, classes].

    Looked for from 0.01 to 100: a model that is always right would be made ever surer, one that is no better than
    chance ever less. Source: Guo et al. 2017 (arXiv:1706.04599), section 4.2.
    """
    z, y = _classes(logits, targets)
    target = z[np.arange(len(y)), y]

    def loss(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        return float(np.mean(special.logsumexp(inverse * z, axis=1) - inverse * target))

    limit = math.log(HOTTEST)
    found = optimize.minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x))


def cross_fitted(logits: ArrayLike, targets: ArrayLike, folds: int = 5, seed: int = 0) -> tuple[Array, float]:
    """(probabilities [n, classes], mean temperature), each sample by a temperature fitted on the other folds.

    For when no validation set is there to fit on: the calibration error is then still that of unseen samples. Raises
    ValueError for fewer than two samples.
    """
    z, y = _classes(logits, targets)
    if len(y) < 2 or folds < 2:
        raise ValueError(f"{len(y)} samples in {folds} folds: expected at least two of both")
    fold = np.random.default_rng(seed).permutation(len(y)) % min(folds, len(y))
    probabilities, temperatures = np.empty_like(z), []
    for number in range(int(fold.max()) + 1):
        here = fold == number
        temperatures.append(fit_temperature(z[~here], y[~here]))
        probabilities[here] = softmax(z[here], temperatures[-1])
    return probabilities, float(np.mean(temperatures))


def _checked(confidence: ArrayLike, correct: ArrayLike, bins: int) -> tuple[Array, Array]:
    c, y = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if c.ndim != 1 or c.shape != y.shape or len(c) == 0 or bins < 1:
        raise ValueError(f"confidence {c.shape}, correct {y.shape}, {bins} bins: expected two of one length and a bin")
    if not np.all((c >= -1e-6) & (c <= 1 + 1e-6)) or not is_binary(y):
        raise ValueError("confidence lies in [0, 1] and correct is 0 or 1; these do not")
    return np.clip(c, 0, 1), y


def _classes(values: ArrayLike, targets: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    x, y = np.asarray(values, np.float64), np.asarray(targets)
    if x.ndim != 2 or y.shape != x.shape[:1] or len(y) == 0 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"values {x.shape} and targets {y.shape} {y.dtype}: expected [n, classes] and whole numbers [n]"
        )
    if not np.all(np.isfinite(x)) or y.min() < 0 or y.max() >= x.shape[1]:
        raise ValueError(f"values must be finite and targets lie in 0 to {x.shape[1] - 1}")
    return x, y
