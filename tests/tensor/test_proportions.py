import math

import numpy as np
import pytest

from tersor.tensor.proportions import (
    difference_of,
    largest_difference,
    largest_of_differences,
    mover,
    ratio_of,
    smallest_ratio,
)
from tersor.tensor.statistics import Estimate


@pytest.mark.parametrize(
    ("successes", "totals", "low", "high"),
    [((56, 48), (70, 80), 0.0524, 0.3339), ((9, 3), (10, 10), 0.1705, 0.8090), ((10, 0), (10, 20), 0.6791, 1.0)],
)
def test_difference_agrees_with_newcombes_published_examples(successes, totals, low, high):
    # Newcombe 1998 (Statistics in Medicine 17, 873), table II, method 10; the second and third have few successes or
    # failures, where the limits of the proportions are wider than the plain ones.
    found = difference_of(successes, totals)
    assert found.low <= low + 5e-5 and found.high >= high - 5e-5
    assert found.high - found.low <= 1.15 * (high - low)


@pytest.mark.parametrize(("p", "q", "n", "m"), [(0.9, 0.9, 100, 60), (0.3, 0.1, 80, 80), (0.97, 0.93, 300, 100)])
def test_difference_and_ratio_cover_the_truth(p, q, n, m):
    random, hits = np.random.default_rng(0), np.zeros(2)
    for x, y in zip(random.binomial(n, p, 400), random.binomial(m, q, 400), strict=True):
        for which, (found, truth) in enumerate(
            [(difference_of((x, y), (n, m)), p - q), (ratio_of((x, y), (n, m)), p / q)]
        ):
            hits[which] += found.low <= truth <= found.high
    assert np.all(hits >= 0.925 * 400)


def test_ratio_of_large_samples_is_that_of_the_logarithm():
    found = ratio_of((3000, 4000), (10_000, 10_000))
    log_error = math.sqrt(1 / 3000 - 1 / 10_000 + 1 / 4000 - 1 / 10_000)
    assert found == pytest.approx(
        (0.75, 0.75 * math.exp(-1.96 * log_error), 0.75 * math.exp(1.96 * log_error)), rel=2e-3
    )


def test_ratios_with_nobody_are_bounded_on_one_side_or_none():
    none, infinite = ratio_of((0, 5), (10, 10)), ratio_of((5, 0), (10, 10))
    assert none[:2] == (0, 0) and 0.1 < none.high < 1
    assert infinite.value == infinite.high == math.inf and 1 < infinite.low < 3
    neither = ratio_of((0, 0), (10, 10))
    assert math.isnan(neither.value) and neither[1:] == (0, math.inf)


def test_a_correlation_narrows_the_interval_of_a_difference():
    one, other = Estimate(0.5, 0.4, 0.65), Estimate(0.45, 0.35, 0.6)
    assert mover(one, other, 1.0)[1:] == pytest.approx((0.05 - 0.05, 0.05 + 0.05))
    assert mover(one, other)[1:] == pytest.approx((0.05 - math.hypot(0.1, 0.15), 0.05 + math.hypot(0.15, 0.1)))
    assert mover(one, Estimate(0.4, -math.inf, math.inf))[1:] == (-math.inf, math.inf)


def test_the_largest_of_two_groups_is_their_difference_without_its_sign():
    found = largest_difference([30, 60], [100, 100])
    assert found == pytest.approx(difference_of((60, 30), (100, 100)))
    near = largest_difference([50, 48], [100, 100])
    assert near.low == 0 and near.high == pytest.approx(max(map(abs, difference_of((50, 48), (100, 100)))))


@pytest.mark.parametrize("rates", [[0.5] * 6, [0.5, 0.5, 0.7], [0.9, 0.95, 0.97, 0.99], [0.2, 0.6]])
def test_gaps_of_several_groups_cover_the_truth(rates):
    random, totals = np.random.default_rng(0), np.array([150, 60, 200, 90, 120, 80][: len(rates)])
    hits = np.zeros(2)
    for _ in range(200):
        x = random.binomial(totals, rates)
        gap, ratio = largest_difference(x, totals), smallest_ratio(x, totals)
        assert gap.low <= gap.value <= gap.high and ratio.low <= ratio.value <= ratio.high
        hits += [gap.low <= np.ptp(rates) <= gap.high, ratio.low <= min(rates) / max(rates) <= ratio.high]
    assert np.all(hits >= 0.915 * 200)


def test_the_two_of_six_groups_that_lie_farthest_apart_are_no_surprise():
    right, totals = [68, 60, 60, 61, 59, 52], [100] * 6
    assert difference_of((68, 52), (100, 100)).low > 0.01
    assert largest_difference(right, totals).low == 0 and smallest_ratio(right, totals).high == 1
    apart = largest_difference([80, 60, 60, 61, 59, 40], totals)
    assert 0.2 < apart.low < 0.3


def test_the_lower_end_is_where_so_large_a_gap_is_found_once_in_forty():
    # All groups alike but for one: drawn from the binomial itself, with what was found as the shape.
    random, found = np.random.default_rng(0), largest_difference([140, 100, 100, 100], [200] * 4)
    farther = np.ptp(random.binomial(200, [0.5 + found.low, 0.5, 0.5, 0.5], (20_000, 4)) / 200, axis=1) >= 0.2 - 1e-9
    assert 0.01 <= farther.mean() <= 0.04


def test_a_small_group_may_lie_as_far_away_as_it_does_alone():
    found = largest_difference([4750, 47, 47], [5000, 50, 50])
    assert found.high >= difference_of((47, 47), (50, 50), 0.85).high


def test_the_largest_of_several_tables_is_at_least_that_of_each():
    table = ([80, 50, 60], [100, 100, 100])
    alone, both = largest_difference(*table), largest_of_differences([table, ([50, 50, 52], [100, 100, 100])])
    assert both.value == alone.value and both.low <= alone.low + 1e-3 and both.high >= alone.high - 1e-3
    vague = largest_of_differences([table, ([5, 5, 5], [10, 10, 10])])  # in which 0.3 is no surprise
    assert vague.value == alone.value and vague.low == 0 < alone.low


@pytest.mark.parametrize("alike", [([5, 5, 5], [10, 10, 10]), ([90, 90, 90], [100, 100, 100])])
def test_tables_come_in_any_order(alike):
    table = ([80, 50, 60], [100, 100, 100])
    assert largest_of_differences([alike, table]) == pytest.approx(largest_of_differences([table, alike]))


def test_groups_that_are_equal_differ_by_zero_without_a_sign():
    assert str(largest_difference([3, 3], [10, 10]).value) == str(largest_difference([3] * 3, [10] * 3).value) == "0.0"


@pytest.mark.parametrize("interval", [largest_difference, smallest_ratio])
def test_a_gap_is_bounded_at_low_confidence_too(interval):
    low, high = interval([3, 4, 3], [10, 10, 10], 0.5)[1:]
    wide = interval([3, 4, 3], [10, 10, 10])
    assert wide.low <= low <= high <= wide.high


def test_nobody_selected_anywhere_has_no_ratio():
    found = smallest_ratio([0, 0], [20, 20])
    assert math.isnan(found.value) and found[1:] == (0, 1)


@pytest.mark.parametrize(("successes", "totals"), [([1], [2]), ([1, 2], [3]), ([3, 1], [2, 2]), ([0, 0], [0, 5])])
def test_groups_that_cannot_be_are_refused(successes, totals):
    with pytest.raises(ValueError):
        largest_difference(successes, totals)
