"""What the package offers, and that it never needs torch."""

import subprocess
import sys

import pytest

import tersor.tiny as tiny

LISTED = """
analyze_weight_redundancy MagnitudePruner prune_conv_filters compare_structured_vs_unstructured SparseLinear
ModelCompressor profile_compression_memory analyze_deployment_scenarios benchmark_sparse_inference_speedup
compare_with_production_pruning demonstrate_pruning_applications measure_sparsity magnitude_prune prune_magnitude
prune_structured progressive_prune count_params evaluate distill structured_prune KnowledgeDistillation
low_rank_approximate compress_model Linear Conv2D ReLU Sequential CompressionMetrics prune_weights_by_magnitude
prune_model_by_magnitude calculate_sparsity quantize_layer_weights dequantize_layer_weights DistillationLoss
train_with_distillation compute_neuron_importance prune_layer_neurons compare_techniques
""".split()

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is blocked")
sys.meta_path.insert(0, Blocked())
"""
USED = """
import numpy as np
from tersor.tiny import *
from tersor.tiny import Linear, ReLU, Sequential, compare_techniques, low_rank_approximate
model = Sequential(Linear(20, 16), ReLU(), Linear(16, 4))
compare_techniques(model, repeats=1, epochs=1)
low_rank_approximate(np.eye(8)[:, :5], 0.5)
compressor = ModelCompressor()
weights = {"fc": np.random.standard_normal((30, 20))}
compressor.validate_compression_quality(weights, compressor.compress_model(weights))
profile_compression_memory(weights)
magnitude_prune(model)
quantize_layer_weights(model.layers[0])
assert not [name for name, module in sys.modules.items() if name.split(".")[0] == "torch" and module is not None]
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    "code",
    [
        "import sys, tersor.tiny; assert 'torch' not in sys.modules",
        "import sys\nsys.modules['torch'] = None\n" + USED,
        BLOCKED + USED,
    ],
    ids=["imported", "used with torch as None", "used with torch blocked"],
)
def test_importing_and_using_it_never_imports_torch(code):
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", LISTED)
def test_every_name_is_there_and_documented(name):
    assert name in tiny.__all__
    assert (getattr(tiny, name).__doc__ or "").strip()


def test_what_is_exported_is_there_once():
    assert len(set(tiny.__all__)) == len(tiny.__all__)
    assert all(getattr(tiny, name) is not None for name in tiny.__all__)
