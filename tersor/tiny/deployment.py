"""What compression is for: bytes on disk, devices with limits, and time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tersor.tensor.encodings import sizes, smallest
from tersor.tiny.compressor import ModelCompressor
from tersor.tiny.layers import Array, Conv2D, Layer, Linear, walk
from tersor.tiny.metrics import MEGABYTE, stored_bytes
from tersor.tiny.model_pruning import magnitude_prune
from tersor.tiny.sparse_linear import SparseLinear
from tersor.tiny.tables import show
from tersor.tiny.training import as_arrays, evaluate

SCENARIOS: tuple[dict[str, Any], ...] = (
    {"name": "Mobile Phone", "memory_limit_mb": 100, "compute_limit_gflops": 10},
    {"name": "IoT Device", "memory_limit_mb": 20, "compute_limit_gflops": 1},
    {"name": "Edge Server", "memory_limit_mb": 1000, "compute_limit_gflops": 100},
    {"name": "Wearable", "memory_limit_mb": 10, "compute_limit_gflops": 0.5},
)
EXAMPLE_CONFIGURATIONS: tuple[dict[str, Any], ...] = (
    {"name": "Dense Model", "size_mb": 200, "gflops": 50, "accuracy": 95.0},
    {"name": "50% Sparse", "size_mb": 100, "gflops": 25, "accuracy": 94.5},
    {"name": "70% Sparse", "size_mb": 60, "gflops": 15, "accuracy": 93.8},
    {"name": "90% Sparse", "size_mb": 20, "gflops": 5, "accuracy": 91.2},
)
SPARSITIES = (0.0, 0.5, 0.7, 0.9)
_SHOWN = ("dense", "coo", "csr", "bitmap", "gaps")
SHAPES = ((256, 512, 0.5), (512, 1024, 0.7), (1024, 2048, 0.8), (2048, 4096, 0.9))


def profile_compression_memory(
    model_weights: Mapping[str, Any] | None = None, layer_sparsities: Mapping[str, float] | None = None
) -> dict[str, float]:
    """original_params, compressed_params, original_size_mb, compressed_size_mb (1024² bytes), compression_ratio (of
    counts), size_reduction (of sizes).

    Without arrays, it makes the course's example of 4.6 million weights. What changed: the compressed size is that of
    the smallest real encoding of each layer (indices, row pointers, gaps and bitmaps counted), where the classic
    multiplied the dense size by the share of weights left, which no file reaches; the example is float32 and always
    the same.
    """
    weights = _example_weights() if model_weights is None else model_weights
    compressed = ModelCompressor().compress_model(weights, layer_sparsities)
    rows, original_bytes, compressed_bytes = [], 0, 0
    for name, layer in compressed.items():
        found = sizes(layer["weights"])
        best = smallest(found)
        original_bytes, compressed_bytes = original_bytes + found["dense"], compressed_bytes + found[best]
        each = [f"{found[kind] / MEGABYTE:.3g}" if kind in found else "" for kind in _SHOWN]
        rows.append((name, f"{layer['stats']['actual_sparsity']:.0%}", *each, best))
    original = sum(layer["stats"]["original_params"] for layer in compressed.values())
    left = sum(int(np.count_nonzero(layer["weights"])) for layer in compressed.values())
    result = {
        "original_params": original,
        "compressed_params": left,
        "original_size_mb": original_bytes / MEGABYTE,
        "compressed_size_mb": compressed_bytes / MEGABYTE,
        "compression_ratio": original / left if left else float("inf"),
        "size_reduction": original_bytes / compressed_bytes,
    }
    show(
        "Megabytes in each encoding",
        ("layer", "zeros", *_SHOWN, "smallest"), rows,
        [f"{result['compression_ratio']:.1f} times fewer weights make it {result['size_reduction']:.1f} times smaller: "
         "where the weights stand has to be stored too"],
    )  # fmt: skip
    return result


def analyze_deployment_scenarios(
    model: Layer | None = None, data: Any = None, configurations: Sequence[Mapping[str, Any]] | None = None,
    scenarios: Sequence[Mapping[str, Any]] = SCENARIOS,
) -> list[dict[str, Any]]:  # fmt: skip
    """Which versions of a model fit which device. For each scenario: name, memory_limit_mb, compute_limit_gflops, fits
    (configuration → fits | too large | too slow | neither) and best_option (the most accurate that fits, or None).

    The configurations (name, size_mb, gflops of one forward pass, accuracy in percent) are those given; or those of
    ``model``, dense and pruned to 50, 70 and 90 % by ``magnitude_prune`` without retraining, on ``data`` (x, y);
    or, without either, the course's example, whose figures nobody measured. What changed: the classic had that example
    only, and returned nothing. Operations of pruned weights count as saved, which only a kernel that skips zeros does.
    """
    if configurations is None:
        configurations = EXAMPLE_CONFIGURATIONS if model is None else _configurations_of(model, data)
    found = []
    for scenario in scenarios:
        fits = {str(each["name"]): _fit(each, scenario) for each in configurations}
        fitting = [each for each in configurations if fits[str(each["name"])] == "fits"]
        best = max(fitting, key=lambda each: each["accuracy"])["name"] if fitting else None
        limits = {key: scenario[key] for key in ("name", "memory_limit_mb", "compute_limit_gflops")}
        found.append({**limits, "fits": fits, "best_option": best})
    show(
        "The versions", ("version", "MB", "GFLOPs", "accuracy"),
        [(each["name"], f"{each['size_mb']:.4g}", f"{each['gflops']:.4g}", f"{each['accuracy']:.1f} %")
         for each in configurations],
    )  # fmt: skip
    show(
        "Which version fits which device",
        ("device", "MB", "GFLOPs", *(str(each["name"]) for each in configurations), "best"),
        [(each["name"], each["memory_limit_mb"], each["compute_limit_gflops"], *each["fits"].values(),
          each["best_option"] or "none fits") for each in found],
        ["Fewer operations are fewer milliseconds only where the kernel skips zeros."],
    )  # fmt: skip
    return found


def benchmark_sparse_inference_speedup(
    shapes: Sequence[tuple[int, int, float]] = SHAPES, batch_size: int = 16, iterations: int = 20
) -> list[dict[str, Any]]:
    """For each (in, out, sparsity) what ``SparseLinear.benchmark_speedup`` gives, with in_features and out_features.

    What changed: the sparse product is a sparse one (the classic timed a dense one against a dense one), and no cause
    is made up for what it finds.
    """
    rng, found = np.random.default_rng(0), []
    for inputs, outputs, sparsity in shapes:
        layer = SparseLinear(inputs, outputs)
        layer.load_linear_weights(rng.normal(0, 0.1, (outputs, inputs)).astype(np.float32))
        layer.prune_weights(sparsity)
        measured = layer.benchmark_speedup(batch_size, iterations)
        found.append({"in_features": inputs, "out_features": outputs, **measured})
    show(
        f"Dense against compressed rows, batch of {batch_size}",
        ("layer", "zeros", "dense ms", "sparse ms", "fewer operations", "faster"),
        [(f"{each['in_features']}x{each['out_features']}", f"{each['sparsity']:.0%}",
          f"{each['dense_time_ms'] / iterations:.3f}", f"{each['sparse_time_ms'] / iterations:.3f}",
          f"{each['theoretical_speedup']:.1f}x", f"{each['actual_speedup']:.2f}x") for each in found],
        ["Measured here, now, on one core. Below 1x zeros made it slower: processors are made for dense products."],
    )  # fmt: skip
    return found


def operations(model: Layer, x: Array) -> int:
    """Multiplications by weights that are not zero, for one of the inputs x: a convolution's count at each position."""
    total, x = 0, x[:1]
    for layer in walk(model):
        x = layer.compute(x)
        if isinstance(layer, (Linear, Conv2D)):
            total += int(np.count_nonzero(layer.weight.data)) * int(np.prod(x.shape[2:]))
    return total


def _configurations_of(model: Layer, data: Any) -> list[dict[str, Any]]:
    if data is None:
        raise ValueError("a model's configurations are measured: pass data=(x, y) with it")
    x, y = as_arrays(data)
    found = []
    for sparsity in SPARSITIES:
        version = copy.deepcopy(model) if sparsity == 0 else magnitude_prune(copy.deepcopy(model), sparsity)
        found.append(
            {
                "name": f"{sparsity:.0%} Sparse" if sparsity else "Dense Model",
                "size_mb": sum(stored_bytes(p.data) for p in version.parameters()) / MEGABYTE,
                "gflops": 2 * operations(version, x) / 1e9,
                "accuracy": evaluate(version, (x, y)),
            }
        )
    return found


def _fit(configuration: Mapping[str, Any], scenario: Mapping[str, Any]) -> str:
    large = configuration["size_mb"] > scenario["memory_limit_mb"]
    slow = configuration["gflops"] > scenario["compute_limit_gflops"]
    return "neither" if large and slow else "too large" if large else "too slow" if slow else "fits"


def _example_weights() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {"conv1": (128, 64, 3, 3), "conv2": (256, 128, 3, 3), "fc1": (1024, 4096), "fc2": (10, 1024)}
    return {
        name: rng.normal(0, 0.02 if len(shape) == 4 else 0.01, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
