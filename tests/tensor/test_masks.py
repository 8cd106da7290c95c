import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.tensor.masks import allocate, blocks, count, keep_largest, n_of_m, rows, spread, spread_rows

MAKERS = [np.asarray, torch.tensor]
few_scores = st.lists(st.sampled_from([-math.inf, -1.0, 0.0, -0.0, 0.5, 2.0, math.inf]), min_size=1, max_size=40)


def naive_keep(scores, zeros):
    """Python's sort is stable: of equals the earlier goes first."""
    gone = sorted(range(len(scores)), key=lambda i: scores[i])[:zeros]
    return [i not in gone for i in range(len(scores))]


@pytest.mark.parametrize(
    "sparsity, n, zeros", [(0.29, 100, 29), (0.5, 3, 1), (0.999, 3, 2), (0, 7, 0), (0.9, 10, 9), (0.1, 0, 0)]
)
def test_the_count_is_the_floor_and_not_thrown_off_by_rounding(sparsity, n, zeros):
    assert count(sparsity, n) == zeros


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf, "0.5", None])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity):
    with pytest.raises(ValueError, match="expected a number, at least 0 and below 1"):
        count(sparsity, 10)


@given(scores=few_scores, data=st.data(), make=st.sampled_from(MAKERS))
def test_exactly_so_many_go_and_of_equals_the_earlier(scores, data, make):
    zeros = data.draw(st.integers(0, len(scores)))
    mask = keep_largest(make(scores), zeros)
    assert mask.tolist() == naive_keep(scores, zeros)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_scores_with_many_ties_are_counted_exactly(dtype):
    scores = torch.randn(7, 5, 9, generator=torch.manual_seed(0)).to(dtype)
    assert int((~keep_largest(scores, 123)).sum()) == 123


def test_numpy_and_torch_choose_the_same():
    scores = np.random.default_rng(0).integers(0, 9, (20, 12)).astype(np.float32)
    assert keep_largest(scores, 100).tolist() == keep_largest(torch.tensor(scores), 100).tolist()
    assert n_of_m(scores, 2, 4).tolist() == n_of_m(torch.tensor(scores), 2, 4).tolist()


@pytest.mark.parametrize("make", MAKERS)
def test_nan_scores_are_counted_and_refused(make):
    bad = make([1.0, math.nan, math.nan, 2.0])
    for choose in (lambda: keep_largest(bad, 1), lambda: n_of_m(bad, 2, 4), lambda: allocate([bad, bad], 3)):
        with pytest.raises(ValueError, match="are NaN"):
            choose()


@pytest.mark.parametrize("zeros", [-1, 5])
def test_more_zeros_than_scores_are_refused(zeros):
    with pytest.raises(ValueError, match="of 4 scores"):
        keep_largest(np.ones(4), zeros)


@given(parts=st.lists(few_scores, max_size=4), data=st.data(), make=st.sampled_from(MAKERS))
def test_a_choice_over_several_arrays_is_the_choice_over_their_concatenation(parts, data, make):
    joined = [score for part in parts for score in part]
    zeros = data.draw(st.integers(0, len(joined)))
    masks = allocate([make(part) for part in parts], zeros)
    assert [mask.tolist() for mask in masks] == split_like(naive_keep(joined, zeros), parts)


def split_like(flat, parts):
    ends = np.cumsum([0, *map(len, parts)])
    return [flat[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]


@pytest.mark.parametrize("n, m, axis", [(2, 4, -1), (1, 4, 0), (3, 8, 1), (1, 1, 1), (4, 4, 0)])
@pytest.mark.parametrize("make", MAKERS)
def test_n_of_every_m_stay_along_the_axis(make, n, m, axis):
    scores = np.random.default_rng(1).integers(0, 5, (8, 16, 4)).astype(np.float32)
    expected = np.apply_along_axis(
        lambda line: np.concatenate([naive_keep(line[i : i + m].tolist(), m - n) for i in range(0, len(line), m)]),
        axis, scores,
    )  # fmt: skip
    assert n_of_m(make(scores), n, m, axis).tolist() == expected.tolist()


def test_an_axis_that_m_does_not_divide_is_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"m=4 does not divide axis -1 of \[2, 10\]: 10 = 2 × 4 \+ 2"):
        n_of_m(np.ones((2, 10)), 2, 4)
    with pytest.raises(ValueError, match="0 < n <= m"):
        n_of_m(np.ones((2, 8)), 5, 4)


@pytest.mark.parametrize("make", MAKERS)
def test_blocks_are_summed_and_spread_again(make):
    scores = np.arange(4 * 6 * 3, dtype=np.float32).reshape(4, 6, 3)
    sums = blocks(make(scores), (2, 3))
    assert tuple(sums.shape) == (2, 2, 3)
    assert float(sums[1, 0, 2]) == scores[2:4, 0:3, 2].sum()
    chosen = keep_largest(sums, 5)
    full = spread(chosen, (2, 3), make(scores))
    assert all(bool(full[i, j, k]) == bool(chosen[i // 2, j // 3, k]) for i, j, k in np.ndindex(4, 6, 3))


def test_blocks_that_do_not_divide_are_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"axis 0 of \[6, 4\]: 6 = 1 × 4 \+ 2"):
        blocks(np.ones((6, 4)), (4, 1))
    with pytest.raises(ValueError, match=r"expected \[3, 2\]"):
        spread(np.ones((2, 2), dtype=bool), (2, 2), np.ones((6, 4)))
    with pytest.raises(ValueError, match="at most 1 sizes"):
        blocks(np.ones(4), (2, 2))


def test_half_precision_blocks_are_summed_in_float32():
    assert float(blocks(torch.full((4096, 1), 1.0, dtype=torch.bfloat16), (4096, 1))[0, 0]) == 4096
    assert float(rows(np.full((1, 4096), 0.1, dtype=np.float16))[0]) == pytest.approx(409.5, rel=1e-3)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("make", MAKERS)
def test_rows_are_summed_and_spread_again(make, axis):
    scores = np.random.default_rng(2).random((3, 4, 5)).astype(np.float32)
    others = tuple(i for i in range(3) if i != axis % 3)
    sums = rows(make(scores), axis)
    np.testing.assert_allclose(np.asarray(sums), scores.sum(others), rtol=1e-6)
    full = spread_rows(keep_largest(sums, 1), make(scores), axis)
    gone = int(np.argmin(scores.sum(others)))
    assert np.argwhere(~np.asarray(full))[:, axis].tolist() == [gone] * (scores.size // scores.shape[axis])
