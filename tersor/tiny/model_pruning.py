"""Prune a model's weights by magnitude: all layers against each other, each by itself, or step by step with training.

Weights are parameters of two or more axes; biases are left alone. A model is anything whose ``parameters()`` have a
``data`` array, so the course's own models do, too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tersor.tensor.masks import allocate, count
from tersor.tiny.layers import Layer, walk
from tersor.tiny.losses import cross_entropy
from tersor.tiny.low_rank import factorize
from tersor.tiny.magnitude import MagnitudePruner, checked, prune_array
from tersor.tiny.structured import structured_prune
from tersor.tiny.tables import show
from tersor.tiny.training import as_arrays, evaluate, fit


def weights_of(model: Any) -> list[Any]:
    """The model's parameters of two or more axes."""
    return [p for p in model.parameters() if p.data.ndim > 1]


def calculate_sparsity(layer: Any) -> float:
    """The share of zeros, 0 to 1, among the weights of a layer (or model); 0 where there is no weight."""
    weights = weights_of(layer)
    total = sum(p.data.size for p in weights)
    return sum(int(np.sum(p.data == 0)) for p in weights) / total if total else 0.0


def measure_sparsity(model: Any) -> float:
    """The percentage of zeros, 0 to 100, among the weights of two or more axes.

    What changed: biases, which often start as zeros, do not count (nor in the course's latest version).

    >>> from tersor.tiny import Linear, Sequential
    >>> measure_sparsity(Sequential(Linear(4, 3)))
    0.0
    """
    return 100 * calculate_sparsity(model)


def magnitude_prune(model: Any, sparsity: float = 0.9) -> Any:
    """Zeroes, in place, the ⌊sparsity · n + 1e-9⌋ smallest of all weights together; gives the model back.

    What changed: exact under ties too (of equal weights those of the earlier layer, and earlier in it, go first); a
    layer that loses everything is warned of by its number. It is not refused: one threshold for all may do that.
    """
    weights = _checked_weights(model)
    zeros = count(sparsity, sum(p.data.size for p in weights))
    for i, (p, keep) in enumerate(zip(weights, allocate([np.abs(p.data) for p in weights], zeros), strict=True)):
        if not keep.any():
            warnings.warn(f"weight {i} {list(p.data.shape)} has lost all {p.data.size} numbers", stacklevel=2)
        p.data = np.where(keep, p.data, p.data.dtype.type(0))
    return model


def prune_magnitude(model: Any, sparsity: float = 0.9) -> Any:
    """Zeroes, in place, the ⌊sparsity · n + 1e-9⌋ smallest of each layer's n weights; gives the model back.

    What changed: exact under ties; the classic's strict comparison with a quantile removed every weight of a layer
    whose weights were equal, and it could not run where a layer had none.
    """
    for p in _checked_weights(model):
        p.data = prune_array(p.data, sparsity)[0]
    return model


def prune_weights_by_magnitude(layer: Any, pruning_ratio: float = 0.5) -> tuple[Any, dict[str, Any]]:
    """(the layer, pruned in place, info).

    ``info``: pruning_ratio, threshold, total_weights, weights_removed (those that were not zero before),
    remaining_weights, sparsity, compression_ratio (of counts). What changed: the count is exact; the classic's
    percentile with a strict comparison removes one more, or under ties any number.
    """
    weights = checked(layer.weight, "weights of the layer")
    pruned, _ = prune_array(weights, pruning_ratio)
    zeros = int(np.sum(pruned == 0))
    info = {
        "pruning_ratio": pruning_ratio,
        "threshold": MagnitudePruner().calculate_threshold(weights, pruning_ratio),
        "total_weights": weights.size,
        "weights_removed": zeros - int(np.sum(weights == 0)),
        "remaining_weights": weights.size - zeros,
        "sparsity": zeros / weights.size,
        "compression_ratio": weights.size / (weights.size - zeros) if zeros < weights.size else float("inf"),
    }
    layer.weight.data = pruned
    return layer, info


def prune_model_by_magnitude(model: Layer, pruning_ratio: float = 0.5) -> tuple[Layer, dict[str, Any]]:
    """(the model, each layer pruned in place by ``prune_weights_by_magnitude``, info).

    ``info``: pruning_ratio, layers (layer_i → that layer's info, by its place in ``model.layers``; layers inside layers
    count in the order in which they run, and a weight in two places is named in the first), total_weights,
    weights_removed, remaining_weights, sparsity, compression_ratio.
    """
    _checked_weights(model)  # nothing is changed where anything is refused
    layers, done = {}, set[int]()
    for i, layer in enumerate(walk(model)):
        new = {id(p) for p in weights_of(layer)} - done
        if new:
            layers[f"layer_{i}"] = prune_weights_by_magnitude(layer, pruning_ratio)[1]
            done |= new
    total, removed, left = (
        sum(info[key] for info in layers.values()) for key in ("total_weights", "weights_removed", "remaining_weights")
    )
    return model, {
        "pruning_ratio": pruning_ratio,
        "layers": layers,
        "total_weights": total,
        "weights_removed": removed,
        "remaining_weights": left,
        "sparsity": 1 - left / total,
        "compression_ratio": total / left if left else float("inf"),
    }


def progressive_prune(
    model: Layer, target_sparsity: float = 0.9, data: Any = None, steps: int = 5, epochs: int = 3,
    learning_rate: float = 0.02, batch_size: int = 32, seed: int = 0,
) -> Layer:  # fmt: skip
    """A copy of the model, pruned in ``steps`` with ``epochs`` of training on ``data`` after each; zeros stay zero.

    After step t of n the sparsity is s · (1 − (1 − t / n)³): much at first, little at the end (Zhu and Gupta 2017,
    arXiv 1710.01878, section 3). ``data`` is (x, y) or batches of it. What changed: the classic only named it,
    and its own retraining would have filled the zeros again; here masks hold them. Without data nothing can be
    retrained: that is warned of, and the model pruned all the same.
    """
    if steps < 1:
        raise ValueError(f"steps {steps}: expected at least 1")
    pruned = copy.deepcopy(model)
    count(target_sparsity, 1)  # refuses what is no sparsity
    if data is None:
        warnings.warn("progressive_prune without data cannot retrain between its steps: pass data=(x, y)", stacklevel=2)
        return magnitude_prune(pruned, target_sparsity)
    x, y = as_arrays(data)
    rows = [("0", f"{measure_sparsity(pruned):.1f} %", "–", f"{evaluate(pruned, (x, y)):.1f} %", "")]
    for step in range(1, steps + 1):
        magnitude_prune(pruned, target_sparsity * (1 - (1 - step / steps) ** 3))
        before = evaluate(pruned, (x, y))
        masks = [(p.data != 0).astype(p.data.dtype) if p.ndim > 1 else None for p in pruned.parameters()]
        losses = fit(
            pruned, x, lambda z, rows: cross_entropy(z, y[rows]), epochs=epochs, learning_rate=learning_rate,
            batch_size=batch_size, seed=seed + step, masks=masks,
        )  # fmt: skip
        loss = f"{losses[-1]:.4f}" if losses else "–"
        after = f"{evaluate(pruned, (x, y)):.1f} %"
        rows.append((str(step), f"{measure_sparsity(pruned):.1f} %", loss, f"{before:.1f} %", after))
    show(
        "Pruning step by step", ("step", "zeros", "loss after", "accuracy pruned", "after retraining"), rows,
        ["Accuracy on the data given: keep some aside and call evaluate on those."],
    )  # fmt: skip
    return pruned


def compress_model(model: Layer, compression_config: Mapping[str, float]) -> dict[str, Any]:
    """Compress a model in place: ``{'magnitude_prune': 0.9, 'structured_prune': 0.3}``, and ``'low_rank': ratio``.

    Gives original_params, original_sparsity, applied_techniques, final_params, final_sparsity, sparsity_increase;
    sparsity in percent. The order is low_rank, magnitude_prune, structured_prune, however the mapping is ordered:
    factors made after pruning would have no zeros. What changed: low_rank was listed as applied by the classic without
    doing anything, and now replaces each Linear by two where that holds fewer numbers; an unknown name is refused
    before anything is changed.
    """
    known: dict[str, Callable[[Layer, float], Layer]] = {
        "low_rank": factorize,
        "magnitude_prune": magnitude_prune,
        "structured_prune": structured_prune,
    }
    unknown = sorted(set(compression_config) - set(known))
    if unknown:
        raise ValueError(f"unknown techniques {unknown}: expected some of {sorted(known)}")
    for name, ratio in compression_config.items():
        if not 0 <= ratio < 1 or (name == "low_rank" and ratio == 0):
            raise ValueError(f"{name} {ratio}: expected at least 0 (low_rank: above 0) and below 1")
    _checked_weights(model)
    stats: dict[str, Any] = {
        "original_params": sum(p.size for p in model.parameters()),
        "original_sparsity": measure_sparsity(model),
        "applied_techniques": [],
    }
    for name, apply in known.items():
        if name in compression_config:
            apply(model, compression_config[name])
            stats["applied_techniques"].append(f"{name}_{compression_config[name]}")
    stats["final_params"] = sum(p.size for p in model.parameters())
    stats["final_sparsity"] = measure_sparsity(model)
    stats["sparsity_increase"] = stats["final_sparsity"] - stats["original_sparsity"]
    show(
        "Compressing a model",
        ("", "parameters", "zeros among weights"),
        [("before", f"{stats['original_params']:,}", f"{stats['original_sparsity']:.1f} %"),
         ("after", f"{stats['final_params']:,}", f"{stats['final_sparsity']:.1f} %")],
        ["applied: " + (", ".join(stats["applied_techniques"]) or "nothing")],
    )  # fmt: skip
    return stats


def _checked_weights(model: Any) -> list[Any]:
    weights = weights_of(model)
    if not weights:
        raise ValueError("the model has no weights of two or more axes: nothing to prune")
    for i, p in enumerate(weights):
        checked(p.data, f"weight {i}")
    return weights
