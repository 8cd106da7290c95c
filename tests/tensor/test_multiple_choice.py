"""One option for each row within a budget: against trying everything, and against a solver of integer programs."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from tersor.tensor.multiple_choice import least_loss_choice

options = st.lists(st.tuples(st.integers(0, 30), st.one_of(st.floats(0, 3), st.integers(0, 3))), min_size=1, max_size=4)


def totals(costs, losses, chosen):
    rows = list(zip(costs, losses, chosen, strict=True))
    return sum(cost[x] for cost, _, x in rows), sum(loss[x] for _, loss, x in rows)


@given(st.lists(options, min_size=1, max_size=6), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_the_choice_is_the_best_of_all(rows, share):
    costs, losses = [[c for c, _ in row] for row in rows], [[loss for _, loss in row] for row in rows]
    low, high = sum(map(min, costs)), sum(map(max, costs))
    budget = low + share * (high - low)
    every = (totals(costs, losses, x) for x in itertools.product(*(range(len(row)) for row in rows)))
    best = min((loss, cost) for cost, loss in every if cost <= budget)
    cost, loss = totals(costs, losses, least_loss_choice(costs, losses, budget))
    assert cost <= budget and loss == pytest.approx(best[0], abs=1e-9)


def test_a_hundred_layers_of_five_widths_take_no_time_and_match_an_integer_program():
    random = np.random.default_rng(0)
    sizes = random.integers(1_000, 2_000_000, 100)
    costs = np.array([[size * bits // 8 for bits in (32, 8, 4, 3, 2)] for size in sizes])
    losses = np.cumsum(random.random((100, 5)) * [0, 0.001, 0.01, 0.1, 1], axis=1)
    budget = int(costs[:, 2].sum())
    begun = time.monotonic()
    cost, loss = totals(costs, losses, least_loss_choice(costs.tolist(), losses.tolist(), budget))
    assert time.monotonic() - begun < 5
    rows = np.kron(np.eye(100), np.ones(5))
    known = milp(
        losses.ravel(), integrality=np.ones(500), bounds=(0, 1), options={"mip_rel_gap": 0},
        constraints=[LinearConstraint(rows, 1, 1), LinearConstraint(costs.ravel(), -np.inf, budget)],
    )  # fmt: skip
    assert cost <= budget and loss == pytest.approx(known.fun, rel=1e-6)


def test_an_infinite_loss_is_no_option_and_of_equal_losses_the_cheapest_is_taken():
    assert least_loss_choice([[9, 1]], [[1, math.inf]], 10) == [0]
    assert least_loss_choice([[9, 1, 5]], [[0.5, 0.5, 0.5]], 10) == [1]
    assert least_loss_choice([], [], 0) == []


def test_what_cannot_be_chosen_is_said():
    with pytest.raises(ValueError, match="5 is asked, the least possible is 6"):
        least_loss_choice([[9, 2], [4]], [[0, 1], [0]], 5)
    with pytest.raises(ValueError, match="row 1 has no option"):
        least_loss_choice([[1], [1]], [[0], [math.inf]], 5)
    with pytest.raises(ValueError, match="row 0 has 2 costs and 1 losses"):
        least_loss_choice([[1, 2]], [[0]], 5)
