import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.tiny import (
    Conv2D,
    Flatten,
    Linear,
    ReLU,
    Sequential,
    compare_structured_vs_unstructured,
    compute_neuron_importance,
    prune_conv_filters,
    prune_layer_neurons,
    prune_structured,
    structured_prune,
)
from tersor.tiny.structured import shrink


@given(st.integers(1, 40), st.floats(0, 0.999))
def test_the_strongest_filters_stay_in_their_order(filters, sparsity):
    weights = np.random.default_rng(filters).normal(size=(filters, 2, 3, 3))
    pruned, kept, stats = prune_conv_filters(weights, sparsity)
    norms = [math.sqrt(sum(w * w for w in weights[i].flat)) for i in range(filters)]
    expected = max(1, math.floor(filters * (1 - sparsity) + 1e-9))
    assert kept == sorted(sorted(range(filters), key=lambda i: norms[i])[filters - expected :])
    assert np.array_equal(pruned, weights[kept])
    assert stats["kept_filter_indices"] == kept and stats["filter_norms"] == pytest.approx(norms)
    assert stats["original_filters"] == filters and stats["remaining_filters"] == expected
    assert stats["pruned_filters"] == filters - expected and stats["target_sparsity"] == sparsity
    assert stats["actual_sparsity"] == 1 - expected / filters
    assert stats["compression_ratio"] == filters / expected


def test_a_tenth_of_ten_filters_is_one():
    weights = np.arange(1.0, 11)[:, None, None, None]
    assert prune_conv_filters(weights, 0.9)[1] == [9]  # int(10 * (1 - 0.9)) is 0
    assert len(prune_conv_filters(weights, 0.7)[1]) == 3  # int(10 * (1 - 0.7)) is 3


@pytest.mark.parametrize("weights, said", [
    (np.ones((2, 3)), "four axes"), (np.full((2, 1, 1, 1), np.nan), "2 NaN"), (np.ones((2, 1, 1, 1), int), "int64"),
    (np.ones((0, 1, 1, 1)), "empty"),
])  # fmt: skip
def test_filters_of_bad_weights_are_refused(weights, said):
    with pytest.raises(ValueError, match=said):
        prune_conv_filters(weights)
    with pytest.raises(ValueError, match="sparsity 1"):
        prune_conv_filters(np.ones((2, 1, 1, 1)), 1)


def test_structured_and_unstructured_are_compared(capsys):
    weights = np.random.default_rng(0).normal(size=(8, 4, 3, 3))
    found = compare_structured_vs_unstructured(weights, 0.5)
    (loose, loose_stats), (whole, whole_stats) = found["unstructured"], found["structured"]
    assert loose.shape == weights.shape and np.mean(loose == 0) == 0.5 and loose_stats["actual_sparsity"] == 0.5
    assert whole.shape == (4, 4, 3, 3) and whole_stats["pruned_filters"] == 4
    assert "norm kept" in capsys.readouterr().out


def test_structured_prune_zeroes_whole_channels_and_their_biases_and_spares_the_classes():
    rng = np.random.default_rng(0)
    model = Sequential(Conv2D(1, 10, 3, rng=rng), ReLU(), Flatten(), Linear(40, 6, rng=rng), Linear(6, 3, rng=rng))
    for p in model.parameters():
        p.data = p.data + (p.ndim == 1)
    conv, hidden, head = model.layers[0], model.layers[3], model.layers[4]
    norms = np.sqrt((conv.weight.data**2).sum(axis=(1, 2, 3)))
    assert structured_prune(model, 0.29) is model
    gone = np.argsort(norms)[:2]
    assert set(np.flatnonzero(~conv.weight.data.any(axis=(1, 2, 3)))) == set(gone)
    assert set(np.flatnonzero(conv.bias.data == 0)) == set(gone)
    assert int((~hidden.weight.data.any(axis=0)).sum()) == 1 and int((hidden.bias.data == 0).sum()) == 1
    assert head.weight.data.all() and head.bias.data.all()


def test_the_zeros_of_structured_prune_are_counted_exactly():
    model = structured_prune(Sequential(Linear(3, 100), Linear(100, 2)), 0.29)
    assert int((~model.layers[0].weight.data.any(axis=0)).sum()) == 29  # int(100 * 0.29) is 28


def test_prune_structured_removes_filters_and_the_inputs_that_read_them():
    rng = np.random.default_rng(0)
    conv, after, head = Conv2D(1, 6, 3, rng=rng), Conv2D(6, 4, 3, rng=rng), Linear(4 * 4, 3, rng=rng)
    conv.weight.data[[1, 4]], conv.bias.data[:] = 0, [1, 0, 2, 3, 0, 4]
    model, x = Sequential(conv, ReLU(), after, ReLU(), Flatten(), head), rng.normal(size=(5, 1, 6, 6))
    expected = model(x)
    assert prune_structured(conv, 2, next_layer=after) is conv
    assert conv.weight.shape == (4, 1, 3, 3) and conv.bias.data.tolist() == [1, 2, 3, 4]
    assert after.weight.shape == (4, 4, 3, 3) and (conv.out_channels, after.in_channels) == (4, 4)
    assert np.allclose(model(x), expected, atol=1e-6)  # the filters that went were zero
    prune_structured(after, 1, next_layer=head)
    assert head.weight.shape == (12, 3) and model(x).shape == (5, 3)


def test_prune_structured_keeps_one_filter():
    conv = Conv2D(1, 3, 2)
    for removed in (3, -1, 1.5, "1"):
        with pytest.raises(ValueError, match="of 3 filters"):
            prune_structured(conv, removed)
    with pytest.raises(ValueError, match="ReLU"):
        prune_structured(conv, 1, next_layer=ReLU())
    assert conv.weight.shape == (3, 1, 2, 2)


def test_importance_is_that_of_columns():
    layer = Linear(2, 3)
    layer.weight.data = np.array([[1.0, -2.0, 3.0], [1.0, -2.0, -3.0]])
    assert compute_neuron_importance(layer).tolist() == [2, 4, 6]
    assert compute_neuron_importance(layer, "weight_variance").tolist() == [0, 0, 9]
    random = compute_neuron_importance(layer, "random")
    assert random.shape == (3,) and np.array_equal(random, compute_neuron_importance(layer, "random"))
    with pytest.raises(ValueError, match="weight_magnitude, weight_variance or random"):
        compute_neuron_importance(layer, "guess")


@given(st.integers(1, 60), st.floats(0.01, 1))
def test_neurons_go_and_the_next_layers_inputs_with_them(neurons, keep_ratio):
    rng = np.random.default_rng(neurons)
    layer, following = Linear(7, neurons, rng=rng), Linear(neurons, 3, rng=rng)
    before = (layer.weight.data.copy(), following.weight.data.copy())
    pruned, info = prune_layer_neurons(layer, keep_ratio, next_layer=following)
    kept = max(1, math.floor(neurons * keep_ratio + 1e-9))
    strongest = sorted(np.argsort(np.abs(before[0]).sum(axis=0), kind="stable")[neurons - kept :].tolist())
    assert info["keep_indices"] == strongest and info["next_layer"] is following
    assert np.array_equal(pruned.weight.data, before[0][:, strongest]) and pruned.out_features == kept
    assert np.array_equal(following.weight.data, before[1][strongest]) and following.in_features == kept
    assert np.array_equal(layer.weight.data, before[0])  # the layer given is not changed
    assert Sequential(pruned, ReLU(), following)(np.ones((2, 7))).shape == (2, 3)
    assert info["original_params"] == 8 * neurons and info["new_params"] == 8 * kept
    assert info["param_reduction"] == pytest.approx(1 - kept / neurons)


def test_a_keep_ratio_that_keeps_nothing_is_refused():
    for ratio in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="keep_ratio"):
            prune_layer_neurons(Linear(2, 2), ratio)
    with pytest.raises(ValueError, match="cannot fill evenly"):
        prune_layer_neurons(Linear(2, 3), 0.7, next_layer=Linear(4, 2))


def test_shrinking_removes_neurons_that_give_nothing_without_changing_the_output():
    rng = np.random.default_rng(0)
    hidden, head = Linear(32, 10, rng=rng), Linear(10, 4, rng=rng)
    model = Sequential(Conv2D(1, 8, 3, rng=rng), ReLU(), Flatten(), hidden, ReLU(), head)
    structured_prune(model, 0.5)
    x = rng.normal(size=(6, 1, 4, 4))
    small = shrink(model, 0.5)
    assert np.allclose(small(x), model(x), atol=1e-6)
    assert [p.shape for p in small.parameters()] == [(4, 1, 3, 3), (4,), (16, 5), (5,), (5, 4), (4,)]
    assert model.layers[0].weight.shape == (8, 1, 3, 3)
