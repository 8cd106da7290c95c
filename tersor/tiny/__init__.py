"""The edition to learn from: compression in NumPy, under the names of TinyTorch's modules. Never imports torch.

Read it in this order: ``layers``, ``losses``, ``training``; ``magnitude``, ``model_pruning``, ``structured``,
``sparse_linear``; ``quantization``, ``low_rank``, ``distillation``; ``compressor``, ``metrics``, ``deployment``,
``compare``, ``production``. docs/tiny.md says what each name does and what differs from the course's own version.
"""

from tersor.tiny.compare import compare_techniques
from tersor.tiny.compressor import ModelCompressor
from tersor.tiny.deployment import (
    analyze_deployment_scenarios,
    benchmark_sparse_inference_speedup,
    profile_compression_memory,
)
from tersor.tiny.distillation import DistillationLoss, KnowledgeDistillation, distill, train_with_distillation
from tersor.tiny.layers import Conv2D, Flatten, Linear, ReLU, Sequential, Tensor
from tersor.tiny.low_rank import low_rank_approximate
from tersor.tiny.magnitude import MagnitudePruner, analyze_weight_redundancy
from tersor.tiny.metrics import CompressionMetrics, count_params
from tersor.tiny.model_pruning import (
    calculate_sparsity,
    compress_model,
    magnitude_prune,
    measure_sparsity,
    progressive_prune,
    prune_magnitude,
    prune_model_by_magnitude,
    prune_weights_by_magnitude,
)
from tersor.tiny.production import compare_with_production_pruning, demonstrate_pruning_applications
from tersor.tiny.quantization import dequantize_layer_weights, quantize_layer_weights
from tersor.tiny.sparse_linear import SparseLinear
from tersor.tiny.structured import (
    compare_structured_vs_unstructured,
    compute_neuron_importance,
    prune_conv_filters,
    prune_layer_neurons,
    prune_structured,
    structured_prune,
)
from tersor.tiny.training import evaluate, train

__all__ = [
    "CompressionMetrics", "Conv2D", "DistillationLoss", "Flatten", "KnowledgeDistillation", "Linear",
    "MagnitudePruner", "ModelCompressor", "ReLU", "Sequential", "SparseLinear", "Tensor",
    "analyze_deployment_scenarios", "analyze_weight_redundancy", "benchmark_sparse_inference_speedup",
    "calculate_sparsity", "compare_structured_vs_unstructured", "compare_techniques",
    "compare_with_production_pruning", "compress_model", "compute_neuron_importance", "count_params",
    "demonstrate_pruning_applications", "dequantize_layer_weights", "distill", "evaluate", "low_rank_approximate",
    "magnitude_prune", "measure_sparsity", "profile_compression_memory", "progressive_prune", "prune_conv_filters",
    "prune_layer_neurons", "prune_magnitude", "prune_model_by_magnitude", "prune_structured",
    "prune_weights_by_magnitude", "quantize_layer_weights", "structured_prune", "train", "train_with_distillation",
]  # fmt: skip
