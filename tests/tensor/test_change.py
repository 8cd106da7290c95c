"""Statistics of changed weights, against plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tersor.tensor.change import change, quality

values = st.floats(-100, 100, allow_nan=False).map(lambda x: 0.0 if abs(x) < 1e-3 else x)


@given(arrays(np.float64, (2, 7), elements=values), arrays(np.bool_, (2, 7)))
def test_every_number_is_that_of_a_plain_loop(w, keep):
    new = np.where(keep, w, 0.0)
    errors = [abs(a - b) for a, b in zip(w.flat, new.flat, strict=True)]
    relative = [error / abs(a) for error, a in zip(errors, w.flat, strict=True) if a != 0] or [0.0]
    norms = [math.sqrt(sum(x * x for x in values.flat)) for values in (new, w)]
    kept = norms[0] / norms[1] if norms[1] else 1.0
    size = sum(abs(x) for x in w.flat) / 14
    score = kept * (1 - sum(errors) / 14 / size) if size else 1.0
    expected = (sum(errors) / 14, max(errors), sum(relative) / len(relative), max(relative), kept, score)
    for found in (change(w, new), change(torch.from_numpy(w), torch.from_numpy(new))):
        assert found == pytest.approx(expected, abs=1e-12)


def test_the_score_is_held_between_zero_and_one():
    w = np.array([1.0, -1.0])
    assert change(w, 3 * w).quality == 0.0 and change(w, w).quality == 1.0
    assert change(w, np.zeros(2)).norm_kept == 0.0 and quality(1.5, 0.0, 1.0) == 1.0


def test_an_original_of_zeros_keeps_all_or_nothing():
    zeros = np.zeros(3)
    assert change(zeros, zeros) == (0, 0, 0, 0, 1, 1)
    assert change(zeros, np.array([0, 0.5, 0]))[4:] == (0, 0)


def test_half_precision_is_compared_in_double():
    w = torch.full((4096,), 300.0, dtype=torch.float16)
    assert change(w, w.clone().index_fill_(0, torch.tensor([0]), 0.0)).norm_kept == pytest.approx(
        math.sqrt(4095 / 4096), abs=1e-12
    )


@pytest.mark.parametrize(
    ("w", "new", "message"),
    [
        (np.ones(3), np.ones(2), r"shapes \(3,\) and \(2,\)"),
        (np.ones((0, 2)), np.ones((0, 2)), "no element"),
        (np.ones(2), np.array([1, np.nan]), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(w, new, message):
    with pytest.raises(ValueError, match=message):
        change(w, new)
