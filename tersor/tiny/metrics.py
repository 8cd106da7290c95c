"""How large a model is, and what its weights look like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tersor.tensor.encodings import sizes, smallest
from tersor.tiny.layers import Array, Layer, walk
from tersor.tiny.magnitude import analyze_weight_redundancy, checked

BYTES = {"float64": 8, "float32": 4, "float16": 2, "int8": 1}
MEGABYTE = 1024 * 1024


def count_params(model: Any) -> int:
    """How many parameters are still there: weights that are not zero, and all biases.

    For a model that was never pruned that is every parameter. What changed: the classic named it without writing it,
    in ``count_params(cnn) → count_params(pruned)``, which says something only where pruned weights do not count.
    """
    return sum(int(np.count_nonzero(p.data)) if p.data.ndim > 1 else p.data.size for p in model.parameters())


def stored_bytes(array: Array) -> int:
    """Bytes of the array in whichever encoding is smallest: dense, bitmap and values, CSR, CSC, COO, gaps or N:M."""
    found = sizes(array)
    return found[smallest(found)]


class CompressionMetrics:
    """Counts, sizes and distributions of a model's parameters, layer by layer (``layer_i`` is ``model.layers[i]``)."""

    def count_parameters(self, model: Layer) -> dict[str, int]:
        """layer_i_weights and layer_i_bias of each layer, total_parameters, total_weights, total_bias.

        What changed: layers inside layers are counted, as layer_0, layer_1, … in the order in which they run.
        """
        counts: dict[str, int] = {}
        for name, part, array in _parts(model):
            counts[f"{name}_{part}"] = array.size
        weights, bias = (
            sum(n for name, n in counts.items() if name.endswith(end)) for end in ("_weights", "_bias")
        )  # fmt: skip
        return {**counts, "total_parameters": weights + bias, "total_weights": weights, "total_bias": bias}

    def calculate_model_size(self, model: Layer, dtype: str = "float32") -> dict[str, Any]:
        """total_parameters, bytes_per_parameter, total_bytes, size_kb, size_mb (1024 and 1024²), dtype; stored dense.

        What changed: not rounded (a small model had 0.0 MB, by which the classic divided later); an unknown dtype is
        refused instead of taken for float32.
        """
        if dtype not in BYTES:
            raise ValueError(f"dtype {dtype!r}: expected one of {sorted(BYTES)}")
        total = self.count_parameters(model)["total_parameters"]
        size = total * BYTES[dtype]
        return {
            "total_parameters": total,
            "bytes_per_parameter": BYTES[dtype],
            "total_bytes": size,
            "size_kb": size / 1024,
            "size_mb": size / MEGABYTE,
            "dtype": dtype,
        }

    def analyze_weight_distribution(self, model: Layer) -> dict[str, dict[str, Any]]:
        """layer_i and overall → mean, std, min, max of the weights, sparsity (0 to 1), and ``redundancy``.

        ``redundancy`` is what ``analyze_weight_redundancy`` says and prints. What changed: the classic named it without
        writing it.
        """
        weights = {
            name: checked(array, f"weights of {name}") for name, part, array in _parts(model) if part == "weights"
        }
        if not weights:
            raise ValueError("the model has no layer with weights: nothing to analyse")
        weights["overall"] = np.concatenate([w.ravel() for w in weights.values()])
        return {
            name: {
                "mean": float(w.mean(dtype=np.float64)),
                "std": float(w.std(dtype=np.float64)),
                "min": float(w.min()),
                "max": float(w.max()),
                "sparsity": float(np.mean(w == 0)),
                "redundancy": analyze_weight_redundancy(w, f"Weights of {name}"),
            }
            for name, w in weights.items()
        }


def _parts(model: Layer) -> Iterator[tuple[str, str, Array]]:
    for i, layer in enumerate(walk(model)):
        for parameter in layer.parameters():
            yield f"layer_{i}", "weights" if parameter.ndim > 1 else "bias", parameter.data
