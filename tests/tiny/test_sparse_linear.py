import numpy as np
import pytest

from tersor.tiny import SparseLinear


def layer(sparsity=0.8, dtype=np.float64):
    rng = np.random.default_rng(0)
    made = SparseLinear(30, 20)
    made.load_linear_weights(rng.normal(size=(20, 30)).astype(dtype), rng.normal(size=20).astype(dtype))
    made.prune_weights(sparsity)
    return made


def test_the_sparse_products_are_those_of_plain_loops():
    made, x = layer(), np.random.default_rng(1).normal(size=(4, 30))
    expected = np.zeros((4, 20))
    for n, o in np.ndindex(4, 20):
        expected[n, o] = sum(x[n, i] * made.sparse_weights[o, i] for i in range(30)) + made.bias[o]
    assert made.forward_sparse_optimized(x) == pytest.approx(expected)
    assert made.forward_sparse_naive(x) == pytest.approx(expected)
    assert made.forward_dense(x) == pytest.approx(x @ made.linear_weights.T + made.bias)
    assert not np.allclose(made.forward_dense(x), expected)


def test_the_compressed_rows_hold_the_weights_that_are_left_and_no_more():
    made = layer(0.9)
    assert made.sparse_ops == made._compressed_rows.nnz == 60 == int(made.mask.sum())
    assert made.dense_ops == 600 and made.sparsity == 0.9
    assert np.array_equal(made._compressed_rows.toarray(), made.sparse_weights)


def test_what_runs_is_the_compressed_rows_not_a_dense_array():
    made, x = layer(), np.ones((2, 30))
    expected = made.forward_sparse_optimized(x)
    made.sparse_weights = np.full((20, 30), 9.0)
    assert np.array_equal(made.forward_sparse_optimized(x), expected)


def test_the_benchmark_says_what_it_measured():
    found = layer().benchmark_speedup(batch_size=3, iterations=4)
    assert set(found) == {"dense_time_ms", "sparse_time_ms", "dense_ops", "sparse_ops", "theoretical_speedup",
                          "actual_speedup", "sparsity", "efficiency"}  # fmt: skip
    assert found["dense_time_ms"] > 0 and found["sparse_time_ms"] > 0
    assert found["theoretical_speedup"] == 600 / 120
    assert found["actual_speedup"] == pytest.approx(found["dense_time_ms"] / found["sparse_time_ms"])
    assert found["efficiency"] == pytest.approx(found["actual_speedup"] / 5)


def test_loading_again_forgets_what_was_pruned():
    made = layer()
    made.load_linear_weights(np.ones((20, 30)))
    assert made.sparse_weights is None and made.sparsity == 0 and not made.bias.any()
    with pytest.raises(ValueError, match="call prune_weights first"):
        made.forward_sparse_optimized(np.ones((1, 30)))
    with pytest.raises(ValueError, match="call load_linear_weights first"):
        SparseLinear(2, 2).prune_weights()


def test_shapes_and_numbers_are_checked():
    made = SparseLinear(3, 2)
    for weights, bias, said in (
        (np.ones((3, 2)), None, r"expected \[2, 3\]"), (np.ones((2, 3)), np.ones(3), r"bias \[3\]"),
        (np.full((2, 3), np.inf), None, "6 infinite"), (np.ones((2, 3), int), None, "int64"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            made.load_linear_weights(weights, bias)


def test_single_precision_stays_single():
    assert layer(dtype=np.float32).forward_sparse_optimized(np.ones((2, 30), np.float32)).dtype == np.float32
