"""Whole filters and neurons go: what is left is smaller, and dense, so that every computer is faster at it."""

from __future__ import annotations

import copy
import math
from numbers import Integral
from typing import Any

import numpy as np

from tersor.tensor.masks import count, keep_largest
from tersor.tiny.layers import Array, Conv2D, Layer, Linear, Tensor, walk, weighted
from tersor.tiny.magnitude import MagnitudePruner, checked
from tersor.tiny.tables import show


def prune_conv_filters(conv_weights: Any, sparsity: float = 0.5) -> tuple[Array, list[int], dict[str, Any]]:
    """(pruned [kept, in, h, w], kept indices, stats): the filters of ``conv_weights`` [out, in, h, w] with the largest
    L2 norms, in their original order; max(1, ⌊out · (1 − sparsity) + 1e-9⌋) stay.

    ``stats``: original_filters, remaining_filters, pruned_filters, target_sparsity, actual_sparsity, compression_ratio,
    filter_norms, kept_filter_indices. What changed: norms in one call instead of a Python loop; of equal norms the
    earlier filter goes, always (the classic's unstable sort left it open); int(10 · (1 − 0.9)) = 0 is counted as 1.
    """
    w = checked(conv_weights, "conv_weights")
    if w.ndim != 4:
        raise ValueError(f"conv_weights {list(w.shape)}: expected four axes, [out, in, h, w]")
    count(sparsity, len(w))  # refuses what is no sparsity
    norms = _norms(w, 0)
    keep = _strongest(norms, max(1, math.floor(len(w) * (1 - sparsity) + 1e-9)))
    stats = {
        "original_filters": len(w),
        "remaining_filters": len(keep),
        "pruned_filters": len(w) - len(keep),
        "target_sparsity": sparsity,
        "actual_sparsity": 1 - len(keep) / len(w),
        "compression_ratio": len(w) / len(keep),
        "filter_norms": norms,
        "kept_filter_indices": keep.tolist(),
    }
    return w[keep], keep.tolist(), stats


def compare_structured_vs_unstructured(
    conv_weights: Any, sparsity: float = 0.5
) -> dict[str, tuple[Array, dict[str, Any]]]:
    """{'unstructured': (weights, stats), 'structured': (weights, stats)} of one layer, and a table of both.

    What changed: the table also has the share of the weights' norm that each keeps, which is what whole filters cost.
    """
    w = checked(conv_weights, "conv_weights")
    norm = float(np.linalg.norm(w)) or 1.0
    loose, _, loose_stats = MagnitudePruner().prune(w, sparsity)
    whole, _, whole_stats = prune_conv_filters(w, sparsity)
    rows = [
        (name, list(pruned.shape), f"{int(np.sum(pruned == 0)):,}", f"{stats['actual_sparsity']:.1%}",
         f"{stats['compression_ratio']:.1f}x", f"{float(np.linalg.norm(pruned)) / norm:.3f}")
        for name, pruned, stats in (("unstructured", loose, loose_stats), ("structured", whole, whole_stats))
    ]  # fmt: skip
    show(
        f"Structured and unstructured pruning of {list(w.shape)}",
        ("pruning", "shape", "zeros", "removed", "fewer weights", "norm kept"), rows,
        ["Unstructured keeps more of the norm; its zeros take space and time until a format or kernel skips them.",
         "Structured keeps less; its array is smaller and runs faster on anything."],
    )  # fmt: skip
    return {"unstructured": (loose, loose_stats), "structured": (whole, whole_stats)}


def structured_prune(model: Layer, prune_ratio: float = 0.5) -> Layer:
    """Zeroes, in place, the ⌊n · prune_ratio + 1e-9⌋ output channels of each layer with the smallest L2 norms, and
    their biases; gives the model back. The last layer is left alone: its outputs are the classes.

    A model of one layer has that pruned. What changed: convolutions too (the classic knew Linear only), and a zero
    that floating point lost (⌊0.29 · 100⌋ = 28) is counted. Shapes stay; ``prune_layer_neurons`` makes them smaller.
    """
    layers = weighted(model)
    if not layers:
        raise ValueError("the model has no layer with weights: nothing to prune")
    for i, layer in enumerate(layers[:-1] or layers):
        w, axis = checked(layer.weight, f"weights of layer {i}"), _output_axis(layer)
        zeros = count(prune_ratio, w.shape[axis])
        gone = ~keep_largest(_norms(w, axis), zeros)
        layer.weight.data[(slice(None),) * axis + (gone,)] = 0
        if layer.bias is not None:
            layer.bias.data[gone] = 0
    return model


def prune_structured(conv_layer: Conv2D, num_filters_to_remove: int, next_layer: Layer | None = None) -> Conv2D:
    """Removes, in place, the filters of a Conv2D with the smallest L2 norms, with their biases; gives the layer back.

    ``next_layer``, the Conv2D or Linear that reads it, loses those inputs in place. What changed: the classic's sketch
    (it used a variable that was never set, and left bias and next layer as they were) runs. At least one filter stays.
    """
    w = checked(conv_layer.weight, "weights of the convolution")
    if not isinstance(num_filters_to_remove, Integral) or not 0 <= num_filters_to_remove < len(w):
        raise ValueError(f"{num_filters_to_remove!r} of {len(w)} filters: expected a number from 0 to {len(w) - 1}")
    keep = _strongest(_norms(w, 0), len(w) - num_filters_to_remove)
    if next_layer is not None:
        _keep_inputs(next_layer, keep, len(w))
    _keep_outputs(conv_layer, keep)
    return conv_layer


def compute_neuron_importance(layer: Linear, method: str = "weight_magnitude", seed: int = 0) -> Array:
    """A score for each output neuron of a Linear (each column of ``weight`` [in, out]); higher matters more.

    ``method``: weight_magnitude (Σ |w|), weight_variance, or random, the baseline. What changed: random is the same
    each time, by ``seed``.
    """
    w = checked(layer.weight, "weights of the layer").astype(np.float64)
    if method == "weight_magnitude":
        return np.asarray(np.sum(np.abs(w), axis=0))
    if method == "weight_variance":
        return np.asarray(np.var(w, axis=0))
    if method == "random":
        return np.asarray(np.random.default_rng(seed).random(w.shape[1]))
    raise ValueError(f"method {method!r}: expected weight_magnitude, weight_variance or random")


def prune_layer_neurons(
    layer: Linear, keep_ratio: float = 0.7, importance_method: str = "weight_magnitude", next_layer: Layer | None = None
) -> tuple[Linear, dict[str, Any]]:
    """(a new Linear with the max(1, ⌊n · keep_ratio + 1e-9⌋) most important neurons, info); ``layer`` is not changed.

    ``info``: keep_ratio, importance_method, original_neurons, remaining_neurons, neurons_removed, compression_ratio,
    original_params, new_params, param_reduction, keep_indices, and next_layer. What changed: the classic left the next
    layer as wide as it was, so that the model no longer ran; a ``next_layer`` given here loses those inputs, in place.
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio {keep_ratio}: expected above 0 and at most 1")
    scores = compute_neuron_importance(layer, importance_method)
    keep = _strongest(scores, max(1, math.floor(len(scores) * keep_ratio + 1e-9)))
    if next_layer is not None:
        _keep_inputs(next_layer, keep, len(scores))
    pruned = copy.deepcopy(layer)
    _keep_outputs(pruned, keep)
    before, after = (sum(p.size for p in each.parameters()) for each in (layer, pruned))
    return pruned, {
        "keep_ratio": keep_ratio,
        "importance_method": importance_method,
        "original_neurons": len(scores),
        "remaining_neurons": len(keep),
        "neurons_removed": len(scores) - len(keep),
        "compression_ratio": len(scores) / len(keep),
        "original_params": before,
        "new_params": after,
        "param_reduction": (before - after) / before,
        "keep_indices": keep.tolist(),
        "next_layer": next_layer,
    }


def shrink(model: Layer, prune_ratio: float) -> Layer:
    """A copy of the model in which every layer but the last has lost its weakest outputs by L2 norm, and the layer
    behind it those inputs: ⌊n · prune_ratio + 1e-9⌋ of n. It is really smaller.
    """
    small = copy.deepcopy(model)
    layers = weighted(small)
    for layer, following in zip(layers, layers[1:], strict=False):
        norms = _norms(checked(layer.weight), _output_axis(layer))
        keep = _strongest(norms, max(1, len(norms) - count(prune_ratio, len(norms))))
        _keep_inputs(following, keep, len(norms))
        _keep_outputs(layer, keep)
    return small


def _output_axis(layer: Linear | Conv2D) -> int:
    return 0 if isinstance(layer, Conv2D) else 1


def _norms(w: Array, axis: int) -> Array:
    others = tuple(i for i in range(w.ndim) if i != axis)
    return np.sqrt(np.sum(w.astype(np.float64) ** 2, axis=others))


def _strongest(scores: Array, kept: int) -> Array:
    return np.flatnonzero(keep_largest(scores, len(scores) - kept))


def _keep_outputs(layer: Linear | Conv2D, keep: Array) -> None:
    layer.weight = Tensor(np.take(layer.weight.data, keep, axis=_output_axis(layer)))
    if layer.bias is not None:
        layer.bias = Tensor(layer.bias.data[keep])
    if isinstance(layer, Linear):
        layer.out_features = len(keep)
    else:
        layer.out_channels = len(keep)


def _keep_inputs(layer: Layer, keep: Array, before: int) -> None:
    """The reader of ``before`` outputs keeps those it still gets; a Linear behind Flatten has a run of inputs each."""
    readers = [each for each in walk(layer) if isinstance(each, (Linear, Conv2D))]
    if not readers:
        raise ValueError(f"the next layer is {type(layer).__name__}: expected the Linear or Conv2D that reads them")
    reader = readers[0]
    axis = 1 - _output_axis(reader)
    inputs = reader.weight.shape[axis]
    each, rest = divmod(inputs, before)
    if rest or (isinstance(reader, Conv2D) and each != 1):
        raise ValueError(f"the next layer reads {inputs} inputs, which {before} outputs cannot fill evenly")
    rows = (keep[:, None] * each + np.arange(each)).ravel()
    reader.weight = Tensor(np.take(reader.weight.data, rows, axis=axis))
    if isinstance(reader, Linear):
        reader.in_features = len(rows)
    else:
        reader.in_channels = len(rows)
