import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tersor.tiny import MagnitudePruner, analyze_weight_redundancy

shapes = st.tuples(st.integers(1, 6), st.integers(1, 9))
ties = arrays(np.float32, shapes, elements=st.sampled_from([-2, -1, 0, 1, 2, 3]))
sparsities = st.floats(0, 0.999)


def test_redundancy_counts_what_is_near_zero():
    weights = np.random.default_rng(0).normal(0, 0.1, (40, 25)).astype(np.float32)
    found = analyze_weight_redundancy(weights, "a layer")
    size = sorted(abs(float(w)) for w in weights.flat)
    mean = sum(size) / 1000
    assert set(found) == {"total_params", "mean_abs", "std", "natural_sparsity", "percentiles"}
    assert found["total_params"] == 1000 and found["mean_abs"] == pytest.approx(mean)
    assert found["natural_sparsity"] == pytest.approx(sum(s <= 0.1 * mean for s in size) / 10)
    assert found["std"] == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in size) / 1000))
    assert list(found["percentiles"]) == [50, 70, 80, 90, 95, 99]
    assert found["percentiles"][50] == pytest.approx((size[499] + size[500]) / 2)


def test_the_table_has_the_title(capsys):
    analyze_weight_redundancy(np.ones(3), "My layer")
    printed = capsys.readouterr().out
    assert "My layer" in printed and "99 %" in printed


@given(ties, sparsities)
def test_pruning_hits_the_exact_count_even_where_all_are_tied(weights, sparsity):
    pruned, mask, stats = MagnitudePruner().prune(weights, sparsity)
    zeros = math.floor(sparsity * weights.size + 1e-9)
    assert int((mask == 0).sum()) == stats["pruned_params"] == zeros
    assert stats["remaining_params"] == weights.size - zeros
    assert np.array_equal(pruned, weights * mask) and pruned.dtype == weights.dtype
    gone, kept = np.abs(weights[mask == 0]), np.abs(weights[mask == 1])
    assert not len(gone) or not len(kept) or gone.max() <= kept.min()


@given(st.integers(1, 200), sparsities)
def test_without_ties_threshold_and_mask_hit_the_count_too(n, sparsity):
    weights = np.random.default_rng(n).permutation(np.arange(1, n + 1)) / n
    pruner = MagnitudePruner()
    threshold = pruner.calculate_threshold(weights, sparsity)
    kept = int(pruner.create_mask(weights, threshold).sum())
    assert kept == n - math.floor(sparsity * n + 1e-9)
    assert threshold <= np.percentile(weights, sparsity * 100) + 1e-12


def test_the_threshold_is_the_percentile_where_that_is_right():
    weights = np.random.default_rng(0).normal(size=(30, 20))
    assert MagnitudePruner().calculate_threshold(weights, 0.7) == pytest.approx(np.percentile(np.abs(weights), 70))


def test_the_mask_keeps_what_is_at_least_the_threshold():
    assert MagnitudePruner().create_mask(np.array([-3.0, 2.0, 1.0]), 2.0).tolist() == [1, 1, 0]


def test_of_equal_weights_the_earlier_go():
    assert MagnitudePruner().prune(np.array([1.0, -1.0, 1.0, 1.0]), 0.5)[1].tolist() == [0, 0, 1, 1]


def test_the_pruner_remembers():
    pruner, weights = MagnitudePruner(), np.array([1.0, 2.0])
    _, mask, stats = pruner.prune(weights, 0.5, "fc1")
    pruner.prune(weights, 0.0)
    assert pruner.pruning_stats == {"fc1": stats, "weights_1": pruner.pruning_stats["weights_1"]}
    assert np.array_equal(pruner.pruning_masks["fc1"], mask)
    weights[:] = 0
    assert pruner.original_weights["fc1"].tolist() == [1.0, 2.0]
    assert set(stats) == {"target_sparsity", "actual_sparsity", "threshold", "original_params", "remaining_params",
                          "pruned_params", "compression_ratio"}  # fmt: skip
    assert stats["compression_ratio"] == 2.0 and stats["actual_sparsity"] == 0.5


def test_the_impact_is_measured_on_weights():
    found = MagnitudePruner().measure_accuracy_impact(np.array([3.0, 4.0, 0.0]), np.array([0.0, 4.0, 0.0]))
    assert found == {"mean_absolute_error": 1.0, "max_absolute_error": 3.0, "mean_relative_error": 0.5,
                     "weight_norm_preservation": 0.8}  # fmt: skip


@pytest.mark.parametrize(
    "weights, sparsity, said",
    [
        (np.array([1.0, np.nan, np.inf, np.nan]), 0.5, "2 NaN and 1 infinite of 4"),
        (np.array([]), 0.5, "empty"),
        (np.array([1, 2, 3]), 0.5, "int64"),
        (np.array([True, False]), 0.5, "bool"),
        (np.array([1.0]), 1.0, "sparsity 1.0"),
        (np.array([1.0]), -0.1, "sparsity -0.1"),
        (np.array([1.0]), float("nan"), "sparsity nan"),
    ],
)
def test_bad_input_is_refused(weights, sparsity, said):
    with pytest.raises(ValueError, match=said):
        MagnitudePruner().prune(weights, sparsity)
    with pytest.raises(ValueError, match=said):
        MagnitudePruner().calculate_threshold(weights, sparsity)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_dtype_is_kept(dtype):
    weights = np.linspace(-60000, 60000, 11).astype(dtype)
    pruned, _, _ = MagnitudePruner().prune(weights, 0.5)
    assert pruned.dtype == dtype
    assert 0.8 < MagnitudePruner().measure_accuracy_impact(weights, pruned)["weight_norm_preservation"] < 1
