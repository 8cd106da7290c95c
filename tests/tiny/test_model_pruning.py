import copy
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.tiny import (
    Conv2D,
    Linear,
    ReLU,
    Sequential,
    calculate_sparsity,
    compress_model,
    count_params,
    evaluate,
    magnitude_prune,
    measure_sparsity,
    progressive_prune,
    prune_magnitude,
    prune_model_by_magnitude,
    prune_weights_by_magnitude,
    train,
)


def small():
    rng = np.random.default_rng(0)
    return Sequential(Linear(6, 5, rng=rng), ReLU(), Sequential(Linear(5, 4, rng=rng), Linear(4, 3, rng=rng)))


@pytest.mark.filterwarnings("ignore:weight . .* has lost all")
@given(st.floats(0, 0.999), st.booleans())
def test_all_layers_compete_for_an_exact_count(sparsity, tied):
    model = small()
    if tied:
        for p in model.parameters():
            p.data[:] = 1
    before = np.concatenate([np.abs(p.data).ravel() for p in model.parameters() if p.ndim > 1])
    assert magnitude_prune(model, sparsity) is model
    zero = np.concatenate([(p.data == 0).ravel() for p in model.parameters() if p.ndim > 1])
    zeros = math.floor(sparsity * 62 + 1e-9)
    assert int(zero.sum()) == zeros and measure_sparsity(model) == pytest.approx(100 * zeros / 62)
    assert set(np.flatnonzero(zero)) == set(np.argsort(before, kind="stable")[:zeros].tolist())


@given(st.floats(0, 0.999))
def test_each_layer_alone_loses_its_exact_count(sparsity):
    model = prune_magnitude(small(), sparsity)
    for p in model.parameters():
        if p.ndim > 1:
            assert int(np.sum(p.data == 0)) == math.floor(sparsity * p.size + 1e-9)


def test_biases_are_left_alone():
    model = small()
    for p in model.parameters():
        if p.ndim == 1:
            p.data[:] = 1e-9
    for prune in (magnitude_prune, prune_magnitude):
        assert all(p.data.all() for p in prune(model, 0.9).parameters() if p.ndim == 1)


def test_a_layer_that_loses_everything_is_warned_of():
    model = small()
    model.layers[0].weight.data *= 1e-6
    with pytest.warns(UserWarning, match=r"weight 0 \[6, 5\] has lost all 30"):
        magnitude_prune(model, 0.5)


@pytest.mark.parametrize("prune", [magnitude_prune, prune_magnitude, prune_model_by_magnitude])
def test_a_model_with_bad_weights_is_refused_and_not_changed(prune):
    model = small()
    model.layers[2].layers[1].weight.data[0, 0] = np.nan
    before = [p.data.copy() for p in model.parameters()]
    with pytest.raises(ValueError, match="weight 2: 1 NaN"):
        prune(model, 0.5)
    assert all(np.array_equal(p.data, old, equal_nan=True) for p, old in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="no weights"):
        prune(Sequential(ReLU()), 0.5)
    with pytest.raises(ValueError, match="sparsity 1"):
        prune(small(), 1)


def test_sparsity_counts_weights_only():
    layer = Linear(4, 5)
    layer.weight.data[0] = 0  # the bias is zero too
    assert calculate_sparsity(layer) == 0.25 and measure_sparsity(Sequential(layer)) == pytest.approx(25)
    assert calculate_sparsity(ReLU()) == 0


def test_one_layer_is_pruned_and_says_how():
    layer = Linear(10, 10, rng=np.random.default_rng(0))
    layer.weight.data[0] = 0
    same, info = prune_weights_by_magnitude(layer, 0.29)
    assert same is layer and info["sparsity"] == 0.29 == calculate_sparsity(layer)
    assert info["total_weights"] == 100 and info["remaining_weights"] == 71 and info["weights_removed"] == 19
    assert info["compression_ratio"] == pytest.approx(100 / 71) and info["pruning_ratio"] == 0.29
    kept = np.abs(layer.weight.data[layer.weight.data != 0])
    assert info["threshold"] <= kept.min()


def test_equal_weights_do_not_all_go():
    layer = Linear(10, 10)
    layer.weight.data[:] = 0.5
    assert prune_weights_by_magnitude(layer, 0.3)[1]["sparsity"] == 0.3  # |w| > percentile removes all of them


def test_a_model_is_pruned_layer_by_layer():
    model = Sequential(Conv2D(1, 4, 3), ReLU(), Linear(10, 10))
    same, info = prune_model_by_magnitude(model, 0.5)
    assert same is model and list(info["layers"]) == ["layer_0", "layer_2"]
    assert info["total_weights"] == 136 and info["remaining_weights"] == 68 and info["weights_removed"] == 68
    assert info["sparsity"] == 0.5 and info["layers"]["layer_2"]["weights_removed"] == 50


def test_layers_inside_layers_are_pruned_too():
    model = Sequential(Sequential(Linear(4, 8), ReLU()), Sequential(Linear(8, 3)))
    _, info = prune_model_by_magnitude(model, 0.5)
    assert list(info["layers"]) == ["layer_0", "layer_2"] and info["sparsity"] == 0.5


def test_a_weight_that_two_layers_share_counts_once():
    one, two = Linear(6, 6), Linear(6, 6)
    two.weight = one.weight
    model = magnitude_prune(Sequential(one, ReLU(), two), 0.5)
    assert np.sum(one.weight.data == 0) == 18 and len(model.parameters()) == 3
    _, info = prune_model_by_magnitude(model, 0.75)
    assert list(info["layers"]) == ["layer_0"] and (info["total_weights"], info["weights_removed"]) == (36, 9)


def test_progressive_pruning_recovers_what_one_shot_loses(trained, digits, capsys):
    training, held_out = digits
    dense = evaluate(trained, held_out)
    weights = [p.data.copy() for p in trained.parameters()]
    once = evaluate(magnitude_prune(copy.deepcopy(trained), 0.9), held_out)
    pruned = progressive_prune(trained, 0.9, data=training)
    assert measure_sparsity(pruned) == pytest.approx(100 * math.floor(0.9 * 6464) / 6464)
    assert dense > 90 and once < dense - 20
    assert evaluate(pruned, held_out) > dense - 4
    assert all(np.array_equal(p.data, w) for p, w in zip(trained.parameters(), weights, strict=True))
    assert count_params(pruned) == 106 + 6464 - math.floor(0.9 * 6464) and count_params(trained) == 6570
    assert "after retraining" in capsys.readouterr().out


def test_training_without_masks_would_fill_the_zeros_again(trained, digits):
    magnitude_prune(trained, 0.9)
    train(trained, digits[0], epochs=1)
    assert measure_sparsity(trained) < 50


def test_progressive_pruning_without_data_says_so_and_prunes(trained):
    with pytest.warns(UserWarning, match="cannot retrain"):
        pruned = progressive_prune(trained, 0.8)
    assert measure_sparsity(pruned) == pytest.approx(80, abs=0.02) and measure_sparsity(trained) < 1


def test_compressing_a_model_is_in_place_and_reported(capsys):
    model = Sequential(Linear(20, 15), ReLU(), Linear(15, 10), Linear(10, 5))
    stats = compress_model(model, {"structured_prune": 0.2, "magnitude_prune": 0.7})
    assert stats["original_params"] == 315 + 160 + 55 and stats["original_sparsity"] == 0
    assert stats["applied_techniques"] == ["magnitude_prune_0.7", "structured_prune_0.2"]
    assert stats["final_sparsity"] == measure_sparsity(model) > 70
    assert stats["sparsity_increase"] == stats["final_sparsity"]
    assert "structured_prune_0.2" in capsys.readouterr().out


def test_low_rank_really_replaces_layers():
    model = Sequential(Linear(40, 30), ReLU(), Linear(30, 2))
    stats = compress_model(model, {"low_rank": 0.25})
    assert [p.shape for p in model.parameters()] == [(40, 7), (7, 30), (30,), (30, 1), (1, 2), (2,)]
    assert stats["final_params"] == 70 * 7 + 30 + 32 + 2 < stats["original_params"]


@pytest.mark.parametrize("config, said", [
    ({"magnitude_prune": 0.5, "magic": 1}, r"\['magic'\]"), ({"magnitude_prune": 1.0}, "magnitude_prune 1.0"),
    ({"magnitude_prune": 0.5, "structured_prune": -1}, "structured_prune -1"), ({"low_rank": 0}, "low_rank 0"),
])  # fmt: skip
def test_a_bad_configuration_changes_nothing(config, said):
    model = small()
    with pytest.raises(ValueError, match=said):
        compress_model(model, config)
    assert measure_sparsity(model) == 0
