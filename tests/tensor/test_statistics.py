import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tersor.tensor.statistics import (
    bootstrap_interval,
    paired_difference,
    quantile_interval,
    ratio_interval,
    wilson,
)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_closed_form_of_the_paper(pair):
    k, n = pair
    z = stats.norm.ppf(0.975)
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson(k, n) == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=1e-9)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_counts_that_cannot_be(k, n):
    with pytest.raises(ValueError, match="successes"):
        wilson(k, n)


def test_bootstrap_interval_of_a_normal_mean_is_about_students():
    x = np.random.default_rng(0).normal(3, 1, 300)
    student = stats.t.interval(0.95, 299, loc=x.mean(), scale=stats.sem(x))
    assert bootstrap_interval(x) == pytest.approx(student, abs=0.02)


def test_bootstrap_interval_is_the_same_for_the_same_seed():
    x = np.random.default_rng(0).exponential(size=50)
    assert bootstrap_interval(x, "median", seed=1) == bootstrap_interval(x, "median", seed=1)


def test_bootstrap_interval_of_equal_values_has_no_width():
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_bootstrap_interval_of_many_values_stays_within_memory():
    low, high = bootstrap_interval(np.random.default_rng(0).normal(size=60_000))
    assert low < 0.01 and high > -0.01 and high - low == pytest.approx(2 * 1.96 / math.sqrt(60_000), rel=0.15)


@pytest.mark.parametrize("values", [[1.0], [1.0, math.nan], [[1.0, 2.0]]])
def test_bootstrap_interval_refuses_what_has_no_interval(values):
    with pytest.raises(ValueError):
        bootstrap_interval(values)


@pytest.mark.parametrize(("n", "known"), [(5, False), (6, True)])
def test_the_median_is_bounded_from_six_values_on(n, known):
    low, high = quantile_interval(np.arange(n), 0.5)
    assert math.isfinite(low) is known and math.isfinite(high) is known


def test_quantile_interval_of_nine_values_drops_one_at_each_end():
    assert quantile_interval([9, 1, 8, 2, 7, 3, 6, 4, 5], 0.5) == (2, 8)


@pytest.mark.parametrize(("q", "n"), [(0.5, 9), (0.5, 40), (0.95, 200)])
def test_quantile_interval_covers_the_quantile(q, n):
    random, truth = np.random.default_rng(0), -math.log(1 - q)
    hits = 0
    for _ in range(400):
        low, high = quantile_interval(random.exponential(size=n), q)
        hits += low <= truth <= high
    assert hits >= 0.92 * 400  # at least 95 % in truth: 2.7 standard errors below


@pytest.mark.parametrize(
    ("both", "only_a", "only_b", "n"), [(0.9, 0.03, 0.03, 150), (0.9, 0.05, 0.01, 150), (0.6, 0.2, 0.1, 60)]
)
def test_paired_difference_of_zeros_and_ones_covers_the_truth(both, only_a, only_b, n):
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(600):
        kind = random.choice(4, size=n, p=[both, only_a, only_b, 1 - both - only_a - only_b])
        result = paired_difference(kind <= 1, (kind == 0) | (kind == 2))
        assert result.low <= result.value <= result.high
        hits += result.low <= only_a - only_b <= result.high
    assert hits >= 0.925 * 600


def test_paired_difference_agrees_with_newcombes_published_example():
    # Newcombe 1998 (Statistics in Medicine 17, 2635), table II: 36, 12, 2, 0 of 50; method 10: 0.0569 to 0.3404.
    a = [1] * 48 + [0] * 2
    b = [1] * 36 + [0] * 12 + [1] * 2
    assert paired_difference(a, b) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)


def test_paired_difference_is_narrower_than_that_of_two_separate_samples():
    a = np.array([1] * 95 + [0] * 5)
    b = np.array([1] * 93 + [0] * 7)
    (l1, u1), (l2, u2) = wilson(95, 100), wilson(93, 100)
    result = paired_difference(a, b)
    separate = math.hypot(0.95 - l1, u2 - 0.93) + math.hypot(u1 - 0.95, 0.93 - l2)
    assert result.high - result.low < 0.8 * separate


def test_paired_difference_of_a_model_with_itself_still_has_a_width():
    result = paired_difference([1, 1, 0, 1] * 10, [1, 1, 0, 1] * 10)
    assert result.value == 0 and result.low < 0 < result.high


def test_paired_difference_of_real_values_bootstraps_the_differences():
    random = np.random.default_rng(0)
    b = random.normal(0, 10, 200)
    result = paired_difference(b + 1 + 0.1 * random.normal(size=200), b)
    assert result.value == pytest.approx(1, abs=0.05) and result.high - result.low < 0.1


def test_paired_difference_of_one_real_pair_is_not_bounded():
    assert paired_difference([1.5], [1.0]) == (0.5, -math.inf, math.inf)


def test_pairs_must_be_of_one_length():
    with pytest.raises(ValueError, match="3 and 2"):
        paired_difference([1, 2, 3], [1, 2])


def test_ratio_interval_cancels_a_drift_that_both_share():
    random = np.random.default_rng(0)
    drift = np.linspace(1, 5, 30)
    a, b = 2 * drift * random.normal(1, 0.01, 30), drift * random.normal(1, 0.01, 30)
    result = ratio_interval(a, b)
    assert result.low <= 2 <= result.high and result.high - result.low < 0.05


def test_ratio_interval_refuses_times_that_are_not_positive():
    with pytest.raises(ValueError, match="positive"):
        ratio_interval([1.0], [0.0])
