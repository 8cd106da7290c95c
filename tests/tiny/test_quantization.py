import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.tiny import Linear, dequantize_layer_weights, magnitude_prune, measure_sparsity, quantize_layer_weights


def layer(seed=0, low=-1.0, high=1.0):
    made = Linear(50, 20)
    made.weight.data = np.random.default_rng(seed).uniform(low, high, (50, 20)).astype(np.float32)
    return made


def test_eight_bits_are_a_quarter_of_the_bytes_and_half_a_step_away():
    made = layer()
    before = made.weight.data.copy()
    same, info = quantize_layer_weights(made)
    assert same is made and info["bits"] == 8 and info["total_weights"] == 1000
    assert info["quantized_weights"].dtype == np.int8 and info["quantized_weights"].nbytes == info["quantized_bytes"]
    assert (info["original_bytes"], info["quantized_bytes"], info["memory_reduction"]) == (4000, 1000, 4.0)
    assert made.weight.data.dtype == np.float32 and info["original_dtype"] == "float32"
    error = np.abs(made.weight.data.astype(float) - before)
    assert info["max_error"] == pytest.approx(error.max()) and info["mse_error"] == pytest.approx((error**2).mean())
    assert 0 < info["max_error"] <= info["scale"] * 1.01  # half a step, and half a step more where zero moved the ends
    assert info["scale"] == pytest.approx((info["max_val"] - info["min_val"]) / 255)


def test_the_integers_give_back_the_weights():
    made = layer()
    _, info = quantize_layer_weights(made)
    rounded = made.weight.data.copy()
    by_hand = (info["quantized_weights"].astype(float) - info["zero_point"]) * info["scale"]
    assert np.allclose(rounded, by_hand, atol=1e-7)
    made.weight.data = np.zeros_like(rounded)
    assert dequantize_layer_weights(made, info) is made and np.array_equal(made.weight.data, rounded)
    with pytest.raises(ValueError, match=r"integers \[50, 20\]"):
        dequantize_layer_weights(Linear(2, 2), info)


@given(st.integers(0, 50), st.floats(-2, 0.5), st.floats(0.6, 3))
def test_pruned_weights_stay_zero(seed, low, high):
    made = magnitude_prune(layer(seed, low, high), 0.7)
    quantize_layer_weights(made)
    assert measure_sparsity(made) >= 70


@pytest.mark.parametrize("bits, reduction", [(16, 2.0), (8, 4.0), (4, 8.0), (2, 16.0)])
def test_bits_are_counted_as_they_are(bits, reduction):
    made = layer()
    _, info = quantize_layer_weights(made, bits)
    assert info["memory_reduction"] == reduction and len(np.unique(made.weight.data)) <= 2**bits


def test_equal_weights_and_other_dtypes():
    made = Linear(3, 3)
    made.weight.data = np.full((3, 3), 0.25)
    _, info = quantize_layer_weights(made)
    assert np.allclose(made.weight.data, 0.25) and made.weight.data.dtype == np.float64
    assert info["memory_reduction"] == 8.0


def test_what_cannot_be_quantised_is_refused():
    for bits in (1, 17):
        with pytest.raises(ValueError, match="expected 2 to 16"):
            quantize_layer_weights(layer(), bits)
    made = layer()
    made.weight.data[0, 0] = np.inf
    with pytest.raises(ValueError, match="1 infinite"):
        quantize_layer_weights(made)
