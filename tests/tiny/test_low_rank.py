import warnings

import numpy as np
import pytest

from tersor.tiny import Conv2D, Linear, ReLU, Sequential, low_rank_approximate
from tersor.tiny.low_rank import factorize


@pytest.mark.parametrize("shape, ratio, rank", [((20, 15), 0.4, 6), ((15, 20), 0.4, 6), ((200, 100), 0.29, 29),
                                                ((8, 5), 0.01, 1)])  # fmt: skip
def test_the_factors_are_the_nearest_of_their_rank(shape, ratio, rank):
    weight = np.random.default_rng(0).normal(size=shape)
    u, s, v = low_rank_approximate(weight, ratio)
    assert u.shape == (shape[0], rank) and s.shape == (rank,) and v.shape == (rank, shape[1])
    left_out = np.linalg.svd(weight, compute_uv=False)[rank:]
    assert np.linalg.norm(weight - u @ np.diag(s) @ v) == pytest.approx(np.sqrt((left_out**2).sum()))


def test_factors_that_are_larger_are_warned_of():
    with pytest.warns(UserWarning, match="rank 8 of 10 × 10 stores 160 numbers instead of 100"):
        low_rank_approximate(np.eye(10), 0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low_rank_approximate(np.eye(10), 0.5)


@pytest.mark.parametrize("matrix, ratio, said", [
    (np.eye(4), 0, "rank_ratio 0"), (np.eye(4), 1.5, "rank_ratio 1.5"), (np.ones(4), 0.5, "two axes"),
    (np.full((2, 2), np.nan), 0.5, "4 NaN"), (np.ones((2, 2), int), 0.5, "int64"), (np.ones((0, 2)), 0.5, "empty"),
])  # fmt: skip
def test_what_has_no_factors_is_refused(matrix, ratio, said):
    with pytest.raises(ValueError, match=said):
        low_rank_approximate(matrix, ratio)


def test_half_precision_is_decomposed():
    u, s, v = low_rank_approximate(np.eye(6, dtype=np.float16), 0.5)
    assert s.tolist() == [1, 1, 1]


def test_a_layer_of_low_rank_becomes_two_and_says_the_same():
    rng = np.random.default_rng(0)
    model = Sequential(Linear(20, 16, rng=rng), ReLU(), Sequential(Linear(16, 10, rng=rng)), Linear(10, 1, rng=rng))
    for layer in (model.layers[0], model.layers[2].layers[0]):
        m, n = layer.weight.shape
        layer.weight.data = (rng.normal(size=(m, 2)) @ rng.normal(size=(2, n))).astype(np.float32)
    model.layers[0].bias.data[:] = 1
    x = rng.normal(size=(5, 20)).astype(np.float32)
    expected, before = model(x), sum(p.size for p in model.parameters())
    assert factorize(model, 0.25) is model
    assert sum(p.size for p in model.parameters()) < before and len(model.layers) == 4 + 1
    assert len(model.layers[3].layers) == 2 and model.layers[4].weight.shape == (10, 1)  # the last would not be smaller
    assert np.allclose(model(x), expected, atol=1e-4)


def test_only_a_sequential_can_be_factorised():
    with pytest.raises(ValueError, match="a Conv2D"):
        factorize(Conv2D(1, 1, 1), 0.5)
