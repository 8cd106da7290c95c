"""Code as learners of the course write it, in each of the course's generations, runs and holds what it should."""

import numpy as np
import pytest

from tersor import tiny


def test_the_module_on_pruning_for_the_edge():
    rng = np.random.default_rng(42)
    weights = {
        "conv1": rng.normal(0, 0.02, (32, 3, 3, 3)),
        "conv2": rng.normal(0, 0.02, (64, 32, 3, 3)),
        "fc1": rng.normal(0, 0.01, (512, 1024)),
        "fc2": rng.normal(0, 0.01, (10, 512)),
    }
    compressor = tiny.ModelCompressor()
    analysis = compressor.analyze_model_for_compression(weights)
    assert analysis["layers"]["conv1"]["type"] == "Conv2D" and analysis["layers"]["fc1"]["type"] == "Linear"
    sparsities = {"conv1": 0.5, "conv2": 0.6, "fc1": 0.8, "fc2": 0.3}
    compressed = compressor.compress_model(weights, sparsities)
    assert compressor.compression_stats["overall_compression"] > 2.0
    validation = compressor.validate_compression_quality(weights, compressed)
    assert 0 <= validation["quality_score"] <= 1
    for name, info in compressed.items():
        assert abs(np.mean(info["weights"] == 0) - sparsities[name]) < 1 / info["weights"].size

    layer = tiny.SparseLinear(256, 128)
    layer.load_linear_weights(rng.normal(0, 0.1, (128, 256)), rng.normal(0, 0.01, 128))
    layer.prune_weights(sparsity=0.8)
    x = rng.normal(0, 1, (4, 256))
    np.testing.assert_allclose(layer.forward_sparse_naive(x), layer.forward_sparse_optimized(x), rtol=1e-5)
    benchmark = layer.benchmark_speedup(batch_size=32, iterations=5)
    assert benchmark["dense_ops"] == 256 * 128 > benchmark["sparse_ops"]


def test_the_module_on_compression_metrics():
    layer = tiny.Linear(100, 50)
    pruned, info = tiny.prune_weights_by_magnitude(layer, pruning_ratio=0.3)
    assert info["total_weights"] == 5000 and abs(tiny.calculate_sparsity(pruned) - info["sparsity"]) < 1e-3
    layer.weights = tiny.Tensor(np.zeros((10, 10)))
    assert tiny.calculate_sparsity(layer) == 1.0 and layer.weights is layer.weight
    _, info = tiny.quantize_layer_weights(tiny.Linear(100, 50), bits=16)
    assert info["memory_reduction"] == 2.0
    _, info = tiny.prune_layer_neurons(tiny.Linear(100, 50), keep_ratio=0.75, importance_method="weight_variance")
    assert (info["original_neurons"], info["remaining_neurons"], info["neurons_removed"]) == (50, 37, 13)
    rng = np.random.default_rng(0)
    loss = tiny.DistillationLoss(temperature=3.0, alpha=0.5)(
        rng.normal(size=(32, 10)), rng.normal(size=(32, 10)), rng.integers(0, 10, 32)
    )
    assert isinstance(loss, float) and loss >= 0


def test_the_module_on_models():
    first, second = tiny.Linear(4, 3), tiny.Linear(3, 2)
    model = tiny.Sequential(first, second)
    first.weight.data = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [1.5, 2.5, 3.5], [4.5, 5.5, 6.5]])
    second.weight.data = np.array([[0.001, 0.002], [0.003, 0.004], [0.005, 0.006]])
    with pytest.warns(UserWarning, match="lost all"):
        assert tiny.magnitude_prune(model, sparsity=0.5) is model
    assert np.mean(second.weight.data == 0) == 1 and np.sum(first.weight.data == 0) == 3

    model = tiny.Sequential(tiny.Linear(100, 50), tiny.Linear(50, 10))
    tiny.structured_prune(model, prune_ratio=0.3)
    assert tiny.measure_sparsity(model) == pytest.approx(27.3, abs=0.05)

    teacher, student = tiny.Sequential(tiny.Linear(10, 20), tiny.Linear(20, 5)), tiny.Sequential(tiny.Linear(10, 5))
    kd = tiny.KnowledgeDistillation(teacher, student, temperature=3.0, alpha=0.7)
    x = tiny.Tensor(np.random.default_rng(0).standard_normal((8, 10)))
    loss = kd.distillation_loss(student.forward(x), teacher.forward(x), np.array([0, 1, 2, 3, 4, 0, 1, 2]))
    assert np.isfinite(loss) and loss > 0


def test_a_model_of_the_learners_own_can_be_pruned():
    class Parameter:
        def __init__(self, data):
            self.data = data

    class Mine:
        def __init__(self):
            self.both = [Parameter(np.array([[1.0, -2.0], [3.0, 0.5]])), Parameter(np.array([0.1, 0.1]))]

        def parameters(self):
            return self.both

    mine = tiny.magnitude_prune(Mine(), 0.5)
    assert mine.both[0].data.tolist() == [[0.0, -2.0], [3.0, 0.0]] and mine.both[1].data.all()
    assert tiny.measure_sparsity(mine) == 50 and tiny.count_params(mine) == 4
