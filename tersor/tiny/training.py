"""Train a tiny model by gradient descent with momentum, and measure it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tersor.tiny.layers import Array, Layer, as_array
from tersor.tiny.losses import cross_entropy

Loss = Callable[[Array, Array], tuple[float, Array]]  # (outputs, which rows of the data) → (value, gradient)


def as_arrays(data: Any) -> tuple[Array, Array]:
    """(x, y) from a pair of arrays, or from batches of pairs, as a loader gives them."""
    if isinstance(data, tuple) and len(data) == 2:
        x, y = as_array(data[0]), as_array(data[1])
    elif isinstance(data, Iterable):
        batches = [(as_array(a), as_array(b)) for a, b in data]
        if not batches:
            raise ValueError("the data has no batch: expected (x, y) or batches of (x, y)")
        x, y = (np.concatenate(part) for part in zip(*batches, strict=True))
    else:
        raise ValueError(f"data of type {type(data).__name__}: expected (x, y) or batches of (x, y)")
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"{len(x)} inputs and {len(y)} labels: expected as many of each, and at least one")
    return x, y


def fit(
    model: Layer, x: Array, loss: Loss, *, epochs: int, learning_rate: float, batch_size: int = 32,
    momentum: float = 0.9, seed: int = 0, masks: Sequence[Array | None] | None = None,
) -> list[float]:  # fmt: skip
    """Minimise ``loss`` in place: v ← momentum · v − learning_rate · gradient, w ← w + v. Gives each epoch's mean loss.

    ``masks``: for each parameter an array of zeros and ones by which it is multiplied after every step, so that pruned
    weights stay zero, or None. Raises ValueError where the loss stops being finite.
    """
    rng = np.random.default_rng(seed)
    parameters = model.parameters()
    velocity = [np.zeros_like(p.data) for p in parameters]
    history = []
    for epoch in range(epochs):
        order, total = rng.permutation(len(x)), 0.0
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            value, gradient = loss(model.compute(x[rows]), rows)
            if not math.isfinite(value):
                raise ValueError(f"the loss is {value} in epoch {epoch + 1}: use a smaller learning_rate")
            model.backward(gradient)
            for i, p in enumerate(parameters):
                assert p.grad is not None  # backward has set it
                velocity[i] *= momentum
                velocity[i] -= learning_rate * p.grad
                p.data += velocity[i]
                if masks is not None and masks[i] is not None:
                    p.data *= masks[i]
            total += value * len(rows)
        history.append(total / len(x))
    return history


def train(
    model: Layer, data: Any, epochs: int = 10, learning_rate: float = 0.05, batch_size: int = 32, seed: int = 0
) -> list[float]:
    """Train a classifier in place on ``data``, (x, y) or batches of it; gives each epoch's mean loss."""
    x, y = as_arrays(data)
    return fit(
        model, x, lambda z, rows: cross_entropy(z, y[rows]),
        epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, seed=seed,
    )  # fmt: skip


def evaluate(model: Layer, data: Any) -> float:
    """Accuracy in percent on ``data``, (x, y) or batches of it; y class numbers [n] or probabilities [n, classes].

    What changed: the classic named it without writing it.
    """
    x, y = as_arrays(data)
    truth = y if y.ndim == 1 else y.argmax(axis=1)
    return float(np.mean(model.compute(x).argmax(axis=1) == truth) * 100)
