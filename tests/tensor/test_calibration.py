import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from tersor.tensor.calibration import (
    _folded,
    brier,
    cross_fitted,
    ece,
    ece_increase,
    ece_interval,
    fit_temperature,
    mce,
    nll,
    reliability,
    softmax,
)
from tersor.tensor.statistics import wilson


def naive_ece(confidence, correct, edges):
    """Bins (low, high], the first one with its low end."""
    errors = []
    for number, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        inside = [
            (c, y) for c, y in zip(confidence, correct, strict=True) if low < c <= high or (number == 0 and c == low)
        ]
        if inside:
            gap = abs(sum(c for c, _ in inside) - sum(y for _, y in inside)) / len(inside)
            errors.append((len(inside) / len(confidence), gap))
    return sum(weight * gap for weight, gap in errors), max(gap for _, gap in errors)


def sample(seed, n=400, temperature=1.0):
    """Confidences, and answers of a model whose logits should be divided by ``temperature``."""
    random = np.random.default_rng(seed)
    confidence = 1 - 0.6 * random.beta(0.4, 2, n)
    confidence = np.clip(confidence, 1e-6, 1 - 1e-6)
    truth = 1 / (1 + (1 / confidence - 1) ** (1 / temperature))
    return confidence, (random.random(n) < truth).astype(float)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
def test_ece_and_mce_of_equal_width_are_the_naive_ones(rows, bins):
    confidence, correct = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    expected = naive_ece(confidence, correct, np.linspace(0, 1, bins + 1))
    assert ece(confidence, correct, bins) == pytest.approx(expected[0])
    assert mce(confidence, correct, bins).value == pytest.approx(expected[1])


def test_ece_of_equal_mass_is_the_naive_one():
    confidence, correct = sample(0)
    expected, _ = naive_ece(confidence, correct, np.quantile(confidence, np.linspace(0, 1, 11)))
    assert ece(confidence, correct, 10, "mass") == pytest.approx(expected)
    assert reliability(confidence, correct, 10, "mass").count.tolist() == [40] * 10


@pytest.mark.parametrize(("kind", "strategy"), [("width", "uniform"), ("mass", "quantile")])
def test_reliability_is_scikit_learns_curve(kind, strategy):
    confidence, correct = sample(1)
    accuracy, mean = calibration_curve(correct, confidence, n_bins=10, strategy=strategy)
    found = reliability(confidence, correct, 10, kind)
    assert found.accuracy == pytest.approx(accuracy) and found.confidence == pytest.approx(mean)
    assert np.all((found.accuracy_low <= accuracy) & (accuracy <= found.accuracy_high))
    assert np.all((found.low <= mean) & (mean <= found.high)) and found.count.sum() == 400


def test_one_confidence_for_all_is_one_bin_of_mass():
    found = reliability([0.7] * 10, [1] * 6 + [0] * 4, 15, "mass")
    assert found.count.tolist() == [10] and found.accuracy == pytest.approx([0.6])


def test_debiased_ece_takes_off_what_noise_of_the_bins_adds():
    confidence, correct = sample(2, 300)
    found, random = reliability(confidence, correct), np.random.default_rng(0)
    noise = np.sqrt(found.accuracy * (1 - found.accuracy) / found.count)
    drawn = np.abs(random.normal(found.accuracy, noise, (100_000, len(noise))) - found.confidence)
    plain = ece(confidence, correct)
    expected = plain - (drawn.mean(0) @ found.count / 300 - plain)
    assert ece(confidence, correct, debias=True) == pytest.approx(max(0, expected), abs=2e-4)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 0.1), (0.05, 0.1), (-0.3, 0.1)])
def test_moments_of_folded_gaps_are_scipys(mean, deviation):
    first, variance, skewness = stats.foldnorm.stats(abs(mean) / deviation, scale=deviation, moments="mvs")
    expected = (first, variance, skewness * variance**1.5)
    assert np.ravel(_folded(np.array([mean]), np.array([deviation]))) == pytest.approx(expected, abs=1e-9)


def test_debiasing_brings_a_calibrated_model_closer_to_zero():
    pairs = [sample(seed) for seed in range(20)]
    plain, corrected = (np.mean([ece(*pair, debias=choice) for pair in pairs]) for choice in (False, True))
    assert corrected < 0.75 * plain


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["width", "mass"])
def test_ece_interval_covers_the_true_error(temperature, kind):
    random = np.random.default_rng(9)
    confidence = np.clip(1 - 0.6 * random.beta(0.4, 2, 400_000), 1e-6, 1 - 1e-6)
    edges = np.linspace(0, 1, 16) if kind == "width" else np.quantile(confidence, np.linspace(0, 1, 16))
    gap = confidence - 1 / (1 + (1 / confidence - 1) ** (1 / temperature))
    truth = np.abs(np.bincount(np.searchsorted(edges[1:-1], confidence), gap)).sum() / len(gap)
    found = [ece_interval(*sample(seed, 300, temperature), kind=kind) for seed in range(60)]
    assert all(one.low <= one.value <= one.high for one in found)
    assert np.mean([one.low <= truth + 1e-9 and truth <= one.high for one in found]) >= 0.88  # 2.5 errors below 95 %


def test_always_right_and_sure_still_leaves_room_for_an_error():
    found = ece_interval(np.ones(100), np.ones(100))
    assert found[:2] == (0, 0) and 0.02 < found.high < 0.05  # 0.036: the rule of three, two-sided


@pytest.mark.parametrize("interval", [ece_interval, mce])
@pytest.mark.parametrize(("sure", "right", "n"), [(0.999, 0.985, 100), (0.99, 0.97, 100), (0.999, 0.995, 500)])
def test_who_is_nearly_sure_and_always_right_may_be_surer_than_he_should(interval, sure, right, n):
    counts = np.flatnonzero(stats.binom.pmf(np.arange(n + 1), n, right) > 1e-4)
    found = [interval(np.full(n, sure), np.arange(n) < count) for count in counts]
    inside = [one.low <= sure - right <= one.high for one in found]
    assert stats.binom.pmf(counts, n, right) @ inside >= 0.92


def test_ece_increase_sees_a_model_made_overconfident_and_not_one_left_as_it_is():
    confidence, correct = sample(3, 2000)
    logit = np.log(confidence / (1 - confidence))
    surer = 1 / (1 + np.exp(-2.5 * logit))
    found = ece_increase((confidence, correct), (surer, correct))
    assert 0 < found.low <= found.value <= found.high
    same = ece_increase((confidence, correct), (confidence, correct))
    assert same.value == 0 and same.low <= 0 <= same.high
    alone = ece_interval(confidence, correct)  # twice the same noise is none: only its lopsidedness is left
    assert same.high - same.low < 0.8 * (alone.high - alone.low)


def test_ece_increase_needs_the_same_samples():
    with pytest.raises(ValueError, match="400 and 300"):
        ece_increase(sample(0), sample(0, 300))


def test_mce_says_nothing_where_a_bin_has_too_few_samples():
    confidence, correct = np.array([0.5] * 200 + [0.95]), np.array([1, 0] * 100 + [0])
    assert mce(confidence, correct) == (pytest.approx(0.95), -math.inf, math.inf)


@pytest.mark.parametrize("right", [64, 75])
def test_mce_of_one_bin_is_the_binomial_interval_of_its_accuracy(right):
    found = mce([0.6] * 100, [1] * right + [0] * (100 - right))

    def apart(gap, side=1):  # of models less sure than they should be, or surer; mid-p
        chances = stats.binom.pmf(np.arange(101), 100, 0.6 + side * gap)
        distance = np.abs(np.arange(101) - 60)
        return chances[distance < right - 60].sum() + chances[distance == right - 60].sum() / 2

    assert found.value == pytest.approx((right - 60) / 100)
    sides = (1, -1) if right < 70 else (1,)  # that it is surer than it should be is then no surprise either
    assert max(apart(found.high, side) for side in sides) == pytest.approx(0.025, abs=0.005)
    assert (
        found.low == pytest.approx(0, abs=1e-9) if right < 70 else apart(found.low) == pytest.approx(0.975, abs=0.005)
    )


def test_mce_of_bins_that_are_all_right_still_leaves_room_for_an_error():
    found = mce([0.6] * 100, [1] * 60 + [0] * 40)
    assert found.value == pytest.approx(0) and 0.03 < found.high < 0.12


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mce_covers_the_largest_error_of_bins(temperature):
    random, hits = np.random.default_rng(5), 0
    for _ in range(300):
        confidence = random.uniform(0.2, 1, 1000)
        truth = 1 / (1 + (1 / confidence - 1) ** (1 / temperature))
        number = np.searchsorted(np.linspace(0, 1, 16)[1:-1], confidence)
        count = np.bincount(number)
        gaps = np.abs(np.bincount(number, confidence - truth))[count > 0] / count[count > 0]
        found = mce(confidence, random.random(1000) < truth)
        hits += found.low <= gaps.max() <= found.high
    assert hits >= 0.92 * 300


def test_brier_and_nll_are_scikit_learns():
    random = np.random.default_rng(0)
    logits, targets = random.normal(size=(50, 4)), random.integers(0, 4, 50)
    p = softmax(logits)
    assert brier(p, targets).mean() == pytest.approx(brier_score_loss(targets, p, scale_by_half=False, labels=range(4)))
    assert nll(p, targets).mean() == pytest.approx(log_loss(targets, p, labels=range(4)))


def test_an_impossible_target_has_a_finite_likelihood():
    assert nll([[1.0, 0.0]], [1])[0] == pytest.approx(-math.log(np.finfo(float).eps))


def test_temperature_undoes_what_the_logits_were_multiplied_by():
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (20_000, 5))
    targets = (logits + random.gumbel(size=logits.shape)).argmax(1)  # as softmax(logits) says
    assert fit_temperature(3 * logits, targets) == pytest.approx(3, rel=0.03)


def test_temperature_is_where_a_fine_grid_finds_the_least_loss():
    random = np.random.default_rng(1)
    logits, targets = random.normal(0, 3, (100, 3)), random.integers(0, 3, 100)
    logits[np.arange(100), targets] += 2
    grid = np.geomspace(0.1, 10, 4000)
    losses = [nll(softmax(logits, t), targets).mean() for t in grid]
    assert fit_temperature(logits, targets) == pytest.approx(grid[int(np.argmin(losses))], rel=2e-3)


def test_a_model_always_right_gets_the_coldest_temperature():
    assert fit_temperature(np.eye(3) * 5, np.arange(3)) < 0.2


def test_cross_fitting_scales_each_sample_by_what_the_others_say():
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (1000, 4))
    targets = (logits + random.gumbel(size=logits.shape)).argmax(1)
    scaled, temperature = cross_fitted(4 * logits, targets)
    assert temperature == pytest.approx(4, rel=0.2)
    before, after = nll(softmax(4 * logits), targets).mean(), nll(scaled, targets).mean()
    assert after < before and after >= nll(softmax(4 * logits, fit_temperature(4 * logits, targets)), targets).mean()
    assert scaled.sum(1) == pytest.approx(np.ones(1000))


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [([0.5], [1, 0], "one length"), ([], [], "one length"), ([1.2], [1], "lies in"), ([0.5], [2], "0 or 1"),
     ([math.nan], [1], "lies in")],
)  # fmt: skip
def test_confidences_that_cannot_be_are_refused(confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        ece(confidence, correct)


@pytest.mark.parametrize(
    ("values", "targets"), [([0.5, 0.5], [0]), ([[0.5, 0.5]], [2]), ([[0.5, 0.5]], [0.0]), ([[math.inf, 0]], [0])]
)
def test_probabilities_and_targets_that_do_not_fit_are_refused(values, targets):
    with pytest.raises(ValueError):
        brier(values, targets)


def test_intervals_narrow_with_more_samples():
    few, many = (ece_interval(*sample(4, n, 2.0)) for n in (200, 5000))
    assert many.high - many.low < 0.4 * (few.high - few.low)


def test_the_error_of_bins_may_be_as_large_as_that_of_all_samples_together():
    confidence = np.linspace(0.998, 1, 100)
    by_mass = ece_interval(confidence, np.ones(100), kind="mass")
    low, _ = wilson(100, 100)
    assert by_mass.high == pytest.approx(0.999 - low, abs=1e-9)
    assert by_mass.low == 0


def test_bins_that_are_all_off_to_one_side_are_off_as_all_samples_together_are():
    found = ece_interval(np.full(100, 0.999), np.arange(100) < 96)
    low, high = wilson(96, 100)
    assert found.low == pytest.approx(0.999 - high) and found.high >= 0.999 - low - 1e-12
