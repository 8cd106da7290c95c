import numpy as np
import pytest
import torch

from tersor.tensor.low_rank import break_even_rank, truncated_svd

MAKERS = [np.asarray, torch.tensor]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("shape, rank", [((6, 4), 2), ((4, 6), 4), ((1, 5), 1)])
def test_the_error_is_what_the_singular_values_left_out_say(make, shape, rank):
    matrix = np.random.default_rng(0).normal(size=shape)
    u, s, v = truncated_svd(make(matrix), rank)
    assert (tuple(u.shape), tuple(s.shape), tuple(v.shape)) == ((shape[0], rank), (rank,), (rank, shape[1]))
    nearest = np.asarray(u) * np.asarray(s) @ np.asarray(v)
    left_out = np.linalg.svd(matrix, compute_uv=False)[rank:]
    assert np.linalg.norm(matrix - nearest) == pytest.approx(np.sqrt((left_out**2).sum()))


def test_the_factors_hold_no_view_of_the_whole():
    u, s, v = truncated_svd(np.eye(50), 2)
    assert all(part.base is None for part in (u, s, v))


@pytest.mark.parametrize("make", MAKERS)
def test_what_has_no_such_rank_is_refused(make):
    for rank in (0, 4):
        with pytest.raises(ValueError, match=f"rank {rank}"):
            truncated_svd(make(np.ones((3, 5))), rank)
    with pytest.raises(ValueError, match="expected a matrix"):
        truncated_svd(make(np.ones(3)), 1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        truncated_svd(make(np.array([[1.0, np.inf]])), 1)


def test_break_even_is_where_the_factors_hold_as_much():
    for m, n in ((100, 50), (64, 64), (7, 3), (1, 9)):
        rank = break_even_rank(m, n)
        assert rank * (m + n) <= m * n < (rank + 1) * (m + n)
