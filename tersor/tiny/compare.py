"""Every technique, and every combination of them, side by side on one model."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from threadpoolctl import threadpool_limits

from tersor.tiny.layers import Array, Layer, Linear, Sequential, as_array, walk, weighted
from tersor.tiny.losses import imitation
from tersor.tiny.low_rank import factorize, saves_numbers
from tersor.tiny.metrics import MEGABYTE, stored_bytes
from tersor.tiny.model_pruning import magnitude_prune, measure_sparsity
from tersor.tiny.quantization import quantize_layer_weights
from tersor.tiny.structured import shrink
from tersor.tiny.tables import show
from tersor.tiny.training import as_arrays, evaluate, fit

TECHNIQUES = ("distill", "structured", "low_rank", "magnitude", "int8")  # in the order in which they are applied
TIMED = 256  # inputs in the batch that is timed
SCALE_AND_OFFSET = 8  # bytes, for each array of integers

Forward = Callable[[Array], Array]


def compare_techniques(
    model: Layer, data: Any = None, sparsity: float = 0.8, prune_ratio: float = 0.3, rank_ratio: float = 0.25,
    techniques: Sequence[str] = TECHNIQUES, epochs: int = 5, learning_rate: float = 0.01, repeats: int = 20,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Each technique and each combination on copies of ``model``: name, such as 'magnitude + int8', → techniques,
    parameters, size_bytes, size_mb, compression_ratio, sparsity (percent), error, accuracy (percent, or None), time_ms,
    kernel, speedup.

    ``distill`` trains a copy without half its neurons to answer as the model does, for ``epochs``, without labels;
    ``structured`` removes ``prune_ratio`` of the neurons and filters; ``low_rank`` factorises to ``rank_ratio``;
    ``magnitude`` zeroes ``sparsity`` of the weights; ``int8`` rounds them to 8 bits. ``data`` is (x, y), or inputs x,
    or None: 256 random inputs. The error is ‖y′ − y‖ / ‖y‖ of the outputs. The size is that of each array's smallest
    encoding. The time is the fastest of ``repeats`` passes of up to 256 inputs on one core, all versions taking
    turns, by the faster of NumPy's dense and (where pruned by magnitude) SciPy's compressed-row product: ``kernel``.

    What changed: the classic (compare_compression_techniques) compared sizes that were dense, so that magnitude pruning
    saved nothing, or assumed; tried one combination, in which the layers no longer fitted each other; and measured
    neither error nor time.
    """
    unknown = sorted(set(techniques) - set(TECHNIQUES))
    if unknown:
        raise ValueError(f"unknown techniques {unknown}: expected some of {list(TECHNIQUES)}")
    x, y = _inputs_and_labels(model, data, seed)
    answers = model.compute(x)

    def student(version: Layer) -> Layer:
        small = shrink(version, 0.5)
        fit(
            small, x, lambda z, rows: imitation(z, answers[rows], 3.0),
            epochs=epochs, learning_rate=learning_rate, seed=seed,
        )  # fmt: skip
        return small

    steps: dict[str, Callable[[Layer], Layer]] = {
        "distill": student,
        "structured": lambda version: shrink(version, prune_ratio),
        "low_rank": lambda version: factorize(version, rank_ratio),
        "magnitude": lambda version: magnitude_prune(version, sparsity),
        "int8": _round_to_integers,
    }
    cannot = _impossible(model, rank_ratio)
    chosen = [name for name in TECHNIQUES if name in techniques and name not in cannot]
    versions: dict[tuple[str, ...], Layer] = {(): copy.deepcopy(model)}
    for length in range(1, len(chosen) + 1):
        for names in itertools.combinations(chosen, length):
            versions[names] = steps[names[-1]](copy.deepcopy(versions[names[:-1]]))
    times = _times(versions, x[:TIMED], repeats)
    found = {
        " + ".join(names) or "original": _row(names, version, x, y, answers, times)
        for names, version in versions.items()
    }
    for row in found.values():
        row["compression_ratio"] = found["original"]["size_bytes"] / row["size_bytes"]
        row["speedup"] = found["original"]["time_ms"] / row["time_ms"]
    _print(found, [f"{name} left out: {why}" for name, why in cannot.items() if name in techniques])
    return found


def _row(
    names: tuple[str, ...], version: Layer, x: Array, y: Array | None, answers: Array,
    times: dict[tuple[str, ...], dict[str, float]],
) -> dict[str, Any]:  # fmt: skip
    kernel, seconds = min(times[names].items(), key=lambda pair: pair[1])
    size = _size(version, integers="int8" in names)
    away, norm = float(np.linalg.norm(version.compute(x) - answers)), float(np.linalg.norm(answers))
    return {
        "techniques": names,
        "parameters": sum(p.size for p in version.parameters()),
        "size_bytes": size,
        "size_mb": size / MEGABYTE,
        "sparsity": measure_sparsity(version),
        "error": away / norm if norm else away,
        "accuracy": None if y is None else evaluate(version, (x, y)),
        "time_ms": seconds * 1000,
        "kernel": kernel,
    }


def _inputs_and_labels(model: Layer, data: Any, seed: int) -> tuple[Array, Array | None]:
    if data is not None and not isinstance(data, tuple | list):
        return as_array(data), None
    if data is not None:
        return as_arrays(data)
    first = weighted(model)[:1]
    if not first or not isinstance(first[0], Linear):
        raise ValueError("without a Linear in front, the shape of the inputs is not known: pass data=x or data=(x, y)")
    return np.random.default_rng(seed).standard_normal((TIMED, first[0].weight.shape[0])).astype(np.float32), None


def _impossible(model: Layer, rank_ratio: float) -> dict[str, str]:
    """Technique → why this model cannot have it."""
    layers, found = weighted(model), {}
    if len(layers) < 2:
        found = dict.fromkeys(("distill", "structured"), "the model has one layer with weights, so no hidden neurons")
    saves = any(saves_numbers(layer, rank_ratio) for layer in layers)
    if not isinstance(model, Sequential) or not saves:
        found["low_rank"] = "no Linear of a Sequential would hold fewer numbers"
    return found


def _round_to_integers(version: Layer) -> Layer:
    for layer in weighted(version):
        quantize_layer_weights(layer, bits=8)
    return version


def _size(version: Layer, *, integers: bool) -> int:
    """Bytes of every array in its smallest encoding; rounded weights take one byte each, as zero stays zero in them."""
    total = 0
    for p in version.parameters():
        if integers and p.ndim > 1:
            total += SCALE_AND_OFFSET + stored_bytes((p.data != 0).astype(np.int8))
        else:
            total += stored_bytes(p.data)
    return total


def _times(versions: dict[tuple[str, ...], Layer], x: Array, repeats: int) -> dict[tuple[str, ...], dict[str, float]]:
    """Seconds of the fastest pass of each version's kernels; they take turns, after a round that does not count."""
    runners: dict[tuple[tuple[str, ...], str], Forward] = {}
    for names, version in versions.items():
        runners[names, "dense"] = version.compute
        if "magnitude" in names:
            runners[names, "CSR"] = _with_compressed_rows(version)
    seconds: dict[tuple[tuple[str, ...], str], list[float]] = {key: [] for key in runners}
    with threadpool_limits(1):
        for turn in range(repeats + 1):
            for key, forward in runners.items():
                start = time.perf_counter()
                forward(x)
                if turn:
                    seconds[key].append(time.perf_counter() - start)
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for (names, kernel), values in seconds.items():
        found.setdefault(names, {})[kernel] = min(values)
    return found


def _with_compressed_rows(version: Layer) -> Forward:
    """The forward pass with each Linear's weights as compressed rows; convolutions stay dense."""
    rows = {id(layer): csr_array(layer.weight.data.T) for layer in weighted(version) if isinstance(layer, Linear)}

    def forward(x: Array) -> Array:
        for layer in walk(version):
            if isinstance(layer, Linear):
                x = (rows[id(layer)] @ x.T).T
                x = x if layer.bias is None else x + layer.bias.data
            else:
                x = layer.compute(x)
        return x

    return forward


def _print(found: dict[str, dict[str, Any]], notes: list[str]) -> None:
    rows = [
        (" ".join(name[0].upper() if name in row["techniques"] else "·" for name in TECHNIQUES),
         f"{row['size_bytes'] / 1024:.1f}", f"{row['compression_ratio']:.1f}x", f"{row['sparsity']:.1f}",
         f"{row['error']:.3f}", "–" if row["accuracy"] is None else f"{row['accuracy']:.1f}", f"{row['time_ms']:.3f}",
         row["kernel"])
        for row in found.values()
    ]  # fmt: skip
    show(
        "Techniques and their combinations, side by side",
        ("applied", "KB", "smaller", "zeros %", "error", "accuracy %", "ms", "kernel"), rows,
        ["D distill, S structured, L low_rank, M magnitude, I int8; the first line is the original.", *notes,
         "Nothing but distill was retrained: progressive_prune and train mend the rest.",
         "int8 is stored in a quarter of the bytes and computed in float here: NumPy has no fast integer product."],
    )  # fmt: skip
