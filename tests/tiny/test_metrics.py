import numpy as np
import pytest

from tersor.tiny import CompressionMetrics, Conv2D, Flatten, Linear, ReLU, Sequential, count_params, magnitude_prune


def test_parameters_are_counted_by_layer():
    model = Sequential([Linear(784, 128), Linear(128, 64), Linear(64, 10)])
    assert CompressionMetrics().count_parameters(model) == {
        "layer_0_weights": 100352, "layer_0_bias": 128, "layer_1_weights": 8192, "layer_1_bias": 64,
        "layer_2_weights": 640, "layer_2_bias": 10, "total_parameters": 109386, "total_weights": 109184,
        "total_bias": 202,
    }  # fmt: skip


def test_layers_without_parameters_keep_their_number():
    counts = CompressionMetrics().count_parameters(
        Sequential(Conv2D(1, 2, 3), ReLU(), Flatten(), Linear(8, 3, bias=False))
    )
    assert counts == {"layer_0_weights": 18, "layer_0_bias": 2, "layer_3_weights": 24, "total_parameters": 44,
                      "total_weights": 42, "total_bias": 2}  # fmt: skip


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("float16", 2), ("int8", 1)])
def test_sizes_are_not_rounded_away(dtype, size):
    found = CompressionMetrics().calculate_model_size(Sequential(Linear(3, 2)), dtype)
    assert found == {"total_parameters": 8, "bytes_per_parameter": size, "total_bytes": 8 * size,
                     "size_kb": 8 * size / 1024, "size_mb": 8 * size / 1024**2, "dtype": dtype}  # fmt: skip


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="int3"):
        CompressionMetrics().calculate_model_size(Sequential(Linear(3, 2)), "int3")


def test_distributions_are_by_layer_and_overall(capsys):
    model = Sequential(Linear(4, 2), ReLU(), Linear(2, 2))
    model.layers[0].weight.data = np.array([[1.0, -1], [3, 0], [0, 0], [1, 0]])
    model.layers[2].weight.data = np.array([[2.0, 2], [2, 2]])
    found = CompressionMetrics().analyze_weight_distribution(model)
    assert list(found) == ["layer_0", "layer_2", "overall"]
    first = found["layer_0"]
    assert (first["mean"], first["min"], first["max"], first["sparsity"]) == (0.5, -1, 3, 0.5)
    assert first["std"] == pytest.approx(np.sqrt(12 / 8 - 0.25))
    assert found["overall"]["mean"] == 1.0 and found["overall"]["redundancy"]["total_params"] == 12
    assert "Weights of layer_2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no layer with weights"):
        CompressionMetrics().analyze_weight_distribution(Sequential(ReLU()))


def test_pruned_weights_do_not_count():
    model = Sequential(Linear(10, 10), Linear(10, 10))
    assert count_params(model) == 220
    assert count_params(magnitude_prune(model, 0.9)) == 20 + 20
