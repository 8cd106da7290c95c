"""A whole model, as a dictionary of arrays: look at it, prune each layer, judge what is left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tersor.tensor.change import change
from tersor.tiny.layers import Array
from tersor.tiny.magnitude import MagnitudePruner, analyze_weight_redundancy, checked
from tersor.tiny.tables import show

RECOMMENDED = {"Conv2D": 0.6, "Linear": 0.8, "Other": 0.5}
LEFT_OUT = 0.7  # the sparsity of a layer that a mapping does not name
SENSITIVITIES = (0.5, 0.7, 0.9)


class ModelCompressor:
    """Analyse, compress, validate. ``original_model``, ``layer_sensitivities``, ``compressed_model`` and
    ``compression_stats`` keep what was found.

    What changed: the classic left the first two, and ``recommendations``, empty; here they are filled. A layer that a
    mapping names and the model does not have is refused. Counts are exact.
    """

    def __init__(self) -> None:
        self.original_model: dict[str, Array] = {}
        self.layer_sensitivities: dict[str, dict[float, float]] = {}
        self.compressed_model: dict[str, dict[str, Any]] = {}
        self.compression_stats: dict[str, Any] = {}

    def analyze_model_for_compression(self, model_weights: Mapping[str, Any]) -> dict[str, Any]:
        """layers (name → type, shape, parameters, natural_sparsity in percent, recommended_sparsity), total_params,
        compressible_params (of Conv2D and Linear), recommendations (name → sparsity, to pass on to ``compress_model``),
        compression_potential (compressible / total).

        Four axes are Conv2D (0.6), two Linear (0.8), anything else Other (0.5). ``layer_sensitivities`` gets, for each
        layer, the share of Σ w² that pruning to 50, 70 and 90 % takes away.
        """
        model = _checked_model(model_weights)
        layers: dict[str, dict[str, Any]] = {}
        for name, w in model.items():
            kind = {4: "Conv2D", 2: "Linear"}.get(w.ndim, "Other")
            layers[name] = {
                "type": kind,
                "shape": w.shape,
                "parameters": w.size,
                "natural_sparsity": analyze_weight_redundancy(w, f"Layer {name}")["natural_sparsity"],
                "recommended_sparsity": RECOMMENDED[kind],
            }
            self.layer_sensitivities[name] = _share_lost(w)
        total = sum(layer["parameters"] for layer in layers.values())
        compressible = sum(layer["parameters"] for layer in layers.values() if layer["type"] != "Other")
        self.original_model = model
        show(
            "What could be compressed",
            ("layer", "type", "parameters", "nearly zero", "recommended"),
            [(name, layer["type"], f"{layer['parameters']:,}", f"{layer['natural_sparsity']:.1f} %",
              f"{layer['recommended_sparsity']:.0%}") for name, layer in layers.items()],
            [f"{compressible / total:.1%} of {total:,} parameters are in convolutions and linear layers"],
        )  # fmt: skip
        return {
            "layers": layers,
            "total_params": total,
            "compressible_params": compressible,
            "recommendations": {name: layer["recommended_sparsity"] for name, layer in layers.items()},
            "compression_potential": compressible / total,
        }

    def compress_model(
        self, model_weights: Mapping[str, Any], layer_sparsities: Mapping[str, float] | None = None
    ) -> dict[str, dict[str, Any]]:
        """name → weights, mask, original_shape, stats (as ``MagnitudePruner.prune``).

        ``layer_sparsities`` by name; a layer left out gets 0.7; without it each gets what is recommended.
        ``compression_stats`` gets total_original_params, total_remaining_params, overall_sparsity, overall_compression,
        layer_sparsities (what each layer was asked for).
        """
        model = _checked_model(model_weights)
        if layer_sparsities is None:
            layer_sparsities = self.analyze_model_for_compression(model)["recommendations"]
        unknown = sorted(set(layer_sparsities) - set(model))
        if unknown:
            raise ValueError(f"layer_sparsities names {unknown}: the model has {sorted(model)}")
        asked = {name: layer_sparsities.get(name, LEFT_OUT) for name in model}
        compressed: dict[str, dict[str, Any]] = {}
        for name, w in model.items():
            weights, mask, stats = MagnitudePruner().prune(w, asked[name], name)
            compressed[name] = {"weights": weights, "mask": mask, "original_shape": w.shape, "stats": stats}
        total = sum(layer["stats"]["original_params"] for layer in compressed.values())
        left = sum(layer["stats"]["remaining_params"] for layer in compressed.values())
        self.original_model, self.compressed_model = model, compressed
        self.compression_stats = {
            "total_original_params": total,
            "total_remaining_params": left,
            "overall_sparsity": 1 - left / total,
            "overall_compression": total / left if left else float("inf"),
            "layer_sparsities": asked,
        }
        show(
            "Compressed, layer by layer",
            ("layer", "asked", "zeros", "remaining", "fewer weights"),
            [(name, f"{asked[name]:.0%}", f"{layer['stats']['actual_sparsity']:.2%}",
              f"{layer['stats']['remaining_params']:,}", f"{layer['stats']['compression_ratio']:.1f}x")
             for name, layer in compressed.items()],
            [f"{left:,} of {total:,} weights remain, {self.compression_stats['overall_compression']:.1f} times fewer"],
        )  # fmt: skip
        return compressed

    def validate_compression_quality(
        self, original_weights: Mapping[str, Any], compressed_model: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """layer_quality (name → mean_error, max_error, norm_preservation, quality_score), overall_quality
        (mean_quality_score, quality_std, min_quality, max_quality), quality_score (the mean), verdict.

        quality_score = norm preservation × (1 − mean error / mean |original|), held to [0, 1]; the verdict is excellent
        above 0.8, acceptable above 0.6, else poor. It judges weights, not accuracy. What changed: layers that are all
        zero are no longer divided by almost nothing; a layer that is missing is named.
        """
        original = _checked_model(original_weights)
        missing = sorted(set(original) - set(compressed_model))
        if missing:
            raise ValueError(f"the compressed model has no {missing}: it has {sorted(compressed_model)}")
        quality = {}
        for name, w in original.items():
            found = change(w, checked(compressed_model[name]["weights"], f"compressed weights of {name}"))
            quality[name] = {
                "mean_error": found.mean_error,
                "max_error": found.max_error,
                "norm_preservation": found.norm_kept,
                "quality_score": found.quality,
            }
        scores = [layer["quality_score"] for layer in quality.values()]
        score = float(np.mean(scores))
        verdict = "excellent" if score > 0.8 else "acceptable" if score > 0.6 else "poor"
        show(
            "What is left of each layer",
            ("layer", "mean error", "norm kept", "quality"),
            [(name, f"{layer['mean_error']:.6f}", f"{layer['norm_preservation']:.3f}", f"{layer['quality_score']:.3f}")
             for name, layer in quality.items()],
            [f"quality {score:.3f}: {verdict}" + ("; ask for less sparsity" if verdict == "poor" else "")],
        )  # fmt: skip
        return {
            "layer_quality": quality,
            "overall_quality": {
                "mean_quality_score": score,
                "quality_std": float(np.std(scores)),
                "min_quality": min(scores),
                "max_quality": max(scores),
            },
            "quality_score": score,
            "verdict": verdict,
        }


def _checked_model(weights: Mapping[str, Any]) -> dict[str, Array]:
    if not weights:
        raise ValueError("the model has no layers: expected a dictionary of names and arrays")
    return {name: checked(w, name) for name, w in weights.items()}


def _share_lost(w: Array) -> dict[float, float]:
    energy = np.sort(np.square(w.astype(np.float64)).ravel())
    lost = np.concatenate([[0.0], np.cumsum(energy)])
    return {s: float(lost[int(s * w.size)] / lost[-1]) if lost[-1] else 0.0 for s in SENSITIVITIES}
