import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import optimize, stats

from tersor.tensor.statistics import (
    benjamini_hochberg,
    bootstrap_interval,
    bootstrap_rows,
    compare_pairs,
    holm,
    mcnemar,
    mean_interval,
    paired_difference,
    quantile_interval,
    ratio_interval,
    wilson,
    wilson_intervals,
)


@example((5, 8))  # on both sides of where exact limits end
@example((5, 9))
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_closed_form_of_the_paper_but_where_few_succeed_or_fail(pair):
    k, n = pair
    z = stats.norm.ppf(0.975)
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = max(0, middle - half), min(1, middle + half)
    if 1 <= k <= (n if n <= 8 else min(4, n / 2)):
        low = min(low, binomial_limit(k, n))
    if 1 <= n - k <= (n if n <= 8 else min(4, n / 2)):
        high = max(high, 1 - binomial_limit(n - k, n))
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-9)


def binomial_limit(k, n):
    """The proportion of which k or more of n come with 5 %."""
    return optimize.brentq(lambda p: stats.binom.sf(k - 1, n, p) - 0.05, 0, 1, xtol=1e-14)


@pytest.mark.parametrize("n", [50, 200, 1000])
def test_wilson_covers_proportions_near_one_as_well(n):
    p = np.linspace(0.5, 1 - 0.2 / n, 300)
    low, high = wilson_intervals(np.arange(n + 1), np.full(n + 1, n))
    inside = (low[:, None] <= p) & (p <= high[:, None])
    coverage = (stats.binom.pmf(np.arange(n + 1)[:, None], n, p) * inside).sum(0)
    assert coverage.min() > 0.928 and 0.945 < coverage.mean() < 0.965


@pytest.mark.parametrize("n", range(1, 30))
def test_wilson_of_a_few_leaves_neither_side_out_more_often_than_one_in_fourteen(n):
    p = np.linspace(0.001, 0.999, 999)
    low, high = wilson_intervals(np.arange(n + 1), np.full(n + 1, n))
    chance = stats.binom.pmf(np.arange(n + 1)[:, None], n, p)
    assert (chance * (high[:, None] < p)).sum(0).max() < 1 / 14
    assert (chance * (low[:, None] > p)).sum(0).max() < 1 / 14


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_counts_that_cannot_be(k, n):
    with pytest.raises(ValueError, match="successes"):
        wilson(k, n)


def students(x):
    return stats.t.interval(0.95, len(x) - 1, loc=x.mean(), scale=stats.sem(x))


def test_mean_interval_of_symmetric_values_is_students():
    x = np.random.default_rng(0).normal(3, 1, 300)
    assert mean_interval(np.concatenate([x, 6 - x])) == pytest.approx(students(np.concatenate([x, 6 - x])))


def test_mean_interval_undoes_skewness_as_halls_cubic_does():
    x = np.random.default_rng(0).exponential(size=40)
    gamma, scale = stats.skew(x), stats.sem(x)

    def cubic(w):
        g = gamma / math.sqrt(40)
        return w + g * w**2 / 3 + g**2 * w**3 / 27 + g / 6

    t = stats.t.ppf(0.975, 39)
    halls = [x.mean() - optimize.brentq(lambda w: cubic(w) - q, -30, 30) * scale for q in (t, -t)]
    low, high = mean_interval(x)
    assert low == pytest.approx(min(halls[0], students(x)[0])) and high == pytest.approx(max(halls[1], students(x)[1]))
    assert high > students(x)[1] + 0.05


@pytest.mark.parametrize("scale", [1e-150, 1e110])
def test_mean_interval_knows_no_unit(scale):
    x = np.random.default_rng(0).exponential(size=40)
    assert np.array(mean_interval(scale * x)) / scale == pytest.approx(mean_interval(x))


@pytest.mark.parametrize(("name", "truth"), [("normal", 0), ("exponential", 1), ("lognormal", math.exp(0.5))])
def test_mean_interval_covers_the_mean_of_skewed_values(name, truth):
    random = np.random.default_rng(0)
    ends = [mean_interval(getattr(random, name)(size=50)) for _ in range(1500)]
    covered = np.mean([low <= truth <= high for low, high in ends])
    assert 0.93 <= covered <= 0.975


def test_bootstrap_interval_is_the_same_for_the_same_seed():
    x = np.random.default_rng(0).exponential(size=50)
    assert bootstrap_interval(x, np.median, seed=1) == bootstrap_interval(x, np.median, seed=1)
    assert bootstrap_interval(x, np.median, seed=1) != bootstrap_interval(x, np.std, seed=1)


@pytest.mark.parametrize("interval", [mean_interval, lambda x: bootstrap_interval(x, np.median)])
def test_an_interval_of_equal_values_has_no_width(interval):
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_bootstrap_interval_of_many_values_stays_within_memory():
    low, high = bootstrap_interval(np.random.default_rng(0).normal(size=10_000), np.mean)
    assert low < 0.02 and high > -0.02 and high - low == pytest.approx(2 * 1.96 / math.sqrt(10_000), rel=0.15)


def test_bootstrap_interval_contains_scipys_of_the_same_kind():
    x = np.random.default_rng(3).exponential(size=60)
    low, high = bootstrap_interval(x, np.std)
    theirs = stats.bootstrap((x,), np.std, n_resamples=2000, method="BCa", rng=np.random.default_rng(0))
    assert low <= theirs.confidence_interval.low + 0.02 and high >= theirs.confidence_interval.high - 0.02
    assert high - low <= 1.25 * (theirs.confidence_interval.high - theirs.confidence_interval.low)


def test_a_resample_without_the_metric_counts_against_both_ends():
    labels = np.array([1.0] + [0.0] * 29)  # a third of the resamples have no positive
    scores = np.random.default_rng(0).normal(size=30)

    def mean_of_positives(label, score):
        return score[label == 1].mean() if label.any() else math.nan

    found = bootstrap_rows(mean_of_positives, labels, scores)
    assert found.low == -math.inf and found.high == math.inf and math.isfinite(found.value)


def test_a_resample_in_which_the_metric_is_infinite_leaves_that_end_open():
    found = bootstrap_rows(lambda x: 1 / x.sum() if x.any() else math.inf, np.array([1.0] + [0.0] * 29))
    assert found.value == 1 and 0 < found.low < 1 and found.high == math.inf


def correlation(a, b):
    return float(np.corrcoef(a, b)[0, 1])


def test_bootstrap_rows_resamples_rows_together():
    random = np.random.default_rng(0)
    a = random.normal(size=150)
    b = a + random.normal(size=150)
    found = bootstrap_rows(correlation, a, b)
    assert found.value == correlation(a, b)
    assert found.low < math.sqrt(0.5) < found.high and found.high - found.low < 0.25


def test_bootstrap_rows_refuses_rows_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"rows of \[2, 3\]"):
        bootstrap_rows(lambda a, b: 0.0, np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="is nan"):
        bootstrap_rows(lambda a: math.nan, np.zeros(2))


@pytest.mark.parametrize("values", [[1.0], [1.0, math.nan], [[1.0, 2.0]]])
@pytest.mark.parametrize("interval", [mean_interval, lambda x: bootstrap_interval(x, np.median)])
def test_what_has_no_interval_is_refused(interval, values):
    with pytest.raises(ValueError):
        interval(values)


@pytest.mark.parametrize(("n", "known"), [(5, False), (6, True)])
def test_the_median_is_bounded_from_six_values_on(n, known):
    low, high = quantile_interval(np.arange(n), 0.5)
    assert math.isfinite(low) is known and math.isfinite(high) is known


def order_statistics(n, q):
    """The ranks of the interval without interpolation: naive, by adding binomial terms."""
    terms = [math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(n + 1)]
    low = max(r for r in range(n + 1) if sum(terms[:r]) <= 0.025)
    return low, min(r for r in range(1, n + 1) if sum(terms[r:]) <= 0.025)


@pytest.mark.parametrize(("n", "q"), [(9, 0.5), (20, 0.5), (101, 0.5), (100, 0.95)])
def test_quantile_interval_lies_within_a_rank_of_order_statistics(n, q):
    low, high = quantile_interval(np.random.default_rng(0).permutation(np.arange(1, n + 1)), q)
    first, last = order_statistics(n, q)
    assert first <= low < first + 1 and last - 1 < high <= last


def test_quantile_interval_of_the_median_is_hettmansperger_and_sheathers():
    # 1986, section 2: with I = (γ_r − γ) / (γ_r − γ_{r+1}), weight (n − r) I / (r + (n − 2r) I) of the next value.
    n, r = 20, 6
    below = stats.binom.cdf([r - 1, r], n, 0.5)
    part = (0.025 - below[0]) / (below[1] - below[0])
    weight = (n - r) * part / (r + (n - 2 * r) * part)
    assert quantile_interval(np.arange(1, n + 1), 0.5) == pytest.approx((r + weight, n + 1 - r - weight))


@pytest.mark.parametrize(("q", "n"), [(0.5, 9), (0.5, 40), (0.95, 200)])
@pytest.mark.parametrize("name", ["normal", "exponential"])
def test_quantile_interval_covers_the_quantile(q, n, name):
    random, truth = np.random.default_rng(0), {"normal": stats.norm, "exponential": stats.expon}[name].ppf(q)
    ends = [quantile_interval(getattr(random, name)(size=n), q) for _ in range(1500)]
    assert 0.935 <= np.mean([low <= truth <= high for low, high in ends]) <= 0.965


@pytest.mark.parametrize("q", [0, 1, math.nan])
def test_quantiles_outside_the_values_are_refused(q):
    with pytest.raises(ValueError, match="between 0 and 1"):
        quantile_interval([1.0, 2.0], q)


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


def test_paired_difference_corrects_a_positive_correlation_as_newcombe_does():
    both, only_a, only_b, neither = 80, 6, 4, 10
    a, b = np.repeat([1, 1, 0, 0], [80, 6, 4, 10]), np.repeat([1, 0, 1, 0], [80, 6, 4, 10])
    phi = (both * neither - only_a * only_b - 100 / 2) / math.sqrt(86 * 14 * 84 * 16)
    (l1, u1), (l2, u2) = wilson(86, 100), wilson(84, 100)
    below, above = (0.86 - l1, u2 - 0.84), (u1 - 0.86, 0.84 - l2)
    reach = [math.sqrt(x**2 - 2 * phi * x * y + y**2) for x, y in (below, above)]
    assert paired_difference(a, b) == pytest.approx((0.02, 0.02 - reach[0], 0.02 + reach[1]))


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


def test_paired_difference_of_real_values_is_that_of_the_differences():
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


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (7, 2), (5, 5), (40, 61)])
def test_mcnemar_is_the_binomial_test_and_its_mid_p_a_naive_sum(only_a, only_b):
    a = [1] * only_a + [0] * only_b + [1] * 30 + [0] * 4
    b = [0] * only_a + [1] * only_b + [1] * 30 + [0] * 4
    found, n = mcnemar(a, b), only_a + only_b
    assert found[:2] == (only_a, only_b)
    assert found.p == pytest.approx(stats.binomtest(only_a, n).pvalue if n else 1)
    weights = [math.comb(n, k) / 2**n for k in range(n + 1)]
    less_likely = sum(w for w in weights if w < weights[only_a] - 1e-12)
    assert found.p_mid == pytest.approx(
        min(1, less_likely + (weights[only_a] if only_a != only_b else 1 - less_likely))
    )


def test_mcnemar_refuses_what_is_neither_right_nor_wrong():
    with pytest.raises(ValueError, match="zeros and ones"):
        mcnemar([0.5, 1], [1, 0])


@given(st.lists(st.floats(0, 1), max_size=20))
def test_benjamini_hochberg_is_scipys(p):
    theirs = stats.false_discovery_control(p) if p else []
    assert benjamini_hochberg(p) == pytest.approx(theirs)


@given(st.lists(st.floats(0, 1), max_size=20), st.floats(0.001, 0.5))
def test_holm_rejects_what_stepping_down_rejects(p, alpha):
    rejected = set()
    for step, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[index] * (len(p) - step) > alpha:
            break
        rejected.add(index)
    assert set(np.flatnonzero(holm(p) <= alpha)) == rejected


def test_p_values_outside_zero_to_one_are_refused():
    with pytest.raises(ValueError, match="from 0 to 1"):
        holm([0.1, math.nan])


def times(random, n, factor):
    shared = random.lognormal(0, 0.3, n)
    return shared * random.lognormal(0, 0.05, n), factor * shared * random.lognormal(0, 0.05, n)


def test_a_thing_compared_with_itself_seldom_differs_and_ten_per_cent_are_mostly_seen():
    random = np.random.default_rng(0)
    same = [compare_pairs(*times(random, 9, 1)).verdict for _ in range(100)]
    slower = [compare_pairs(*times(random, 9, 1.1)).verdict for _ in range(100)]
    assert same.count("no difference shown") >= 90
    assert slower.count("slower") >= 60 and slower.count("faster") == 0


def test_a_verdict_is_said_with_its_interval():
    a = np.array([20.0, 21, 22, 20, 21, 22, 24, 20, 20])
    assert str(compare_pairs(a, a / 2)) == "faster by 2× (2–2)"
    assert str(compare_pairs(a / 4, a)) == "slower by 4× (4–4)"
    assert str(compare_pairs(a, a)) == "no difference shown" and compare_pairs(a, a).p == 1


def test_five_pairs_show_no_difference_however_large():
    found = compare_pairs([10.0] * 5, [1.0] * 5)
    assert found.verdict == "no difference shown" and found.ratio == (10, -math.inf, math.inf)
