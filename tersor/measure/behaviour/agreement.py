"""How alike two models answer, right or wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from tersor.core.measurement import Measurement
from tersor.measure.behaviour.collect import Collected
from tersor.measure.behaviour.intervals import by_sample, mean_of, resampled
from tersor.measure.behaviour.scores import Scores
from tersor.tensor.statistics import paired_difference

_LIKELY_ORDER = 0.2  # by how much agreement must rise at least for another order of the classes to be suspected
_MOST_CLASSES = 2000  # of which an order is looked for


def agreement(found: Collected) -> dict[str, Measurement]:
    """How alike the answers are, name → measurement. Of class scores:

    ``top_1``: rows to which both give the same class; ``top_5`` (of more than five classes): mean share of the five
    that stand among the best five of both; ``divergence``: mean KL(original ‖ compressed) in nats;
    ``confidence_change``: mean of (compressed − original) highest probability. With targets, ``error_correlation``: φ
    of being wrong; ``error_consistency``: Cohen's κ of it (Geirhos et al. 2020, arXiv:2006.16736); ``same_error``: of
    the rows that both get wrong, those with the same class (of more than two).

    Of numbers: ``rms_difference`` between the two outputs, and with targets ``error_correlation``: the cosine of their
    errors, Σ e₁e₂ / √(Σ e₁² Σ e₂²).
    """
    one, other = found.original.scores, found.compressed.scores
    if one is None or other is None:
        return _of_numbers(found)
    k = one.top.shape[1]
    said = {
        "top_1": mean_of(one.classes == other.classes, found),
        "divergence": mean_of(found.divergence, found, "nats"),
        "confidence_change": mean_of(other.confidence - one.confidence, found, "probability"),
    }
    if 2 < k < found.classes:  # of all classes nothing but all would be shared
        shared = (one.top[:, :, None] == other.top[:, None, :]).any(axis=2).mean(axis=1)
        said[f"top_{k}"] = mean_of(shared, found)
    if found.targets is not None:
        said |= _errors(found, one.classes != found.targets, other.classes != found.targets)
    return said


def _errors(found: Collected, one: NDArray[np.bool_], other: NDArray[np.bool_]) -> dict[str, Measurement]:
    table = _tables(found, one, other)  # [samples, 4]: both, only one, only other, neither
    said = {
        "error_correlation": resampled(lambda at: _phi(table[at].sum(axis=-2)), len(table), "correlation", len(one)),
        "error_consistency": resampled(lambda at: _kappa(table[at].sum(axis=-2)), len(table), "kappa", len(one)),
    }
    both = one & other
    if both.any() and found.classes > 2:
        assert found.original.scores is not None and found.compressed.scores is not None
        same = found.original.scores.classes[both] == found.compressed.scores.classes[both]
        said["same_error"] = mean_of(same, _rows(found, both))
    return said


def _rows(found: Collected, chosen: NDArray[np.bool_]) -> Collected:
    return replace(found, sample=found.sample[chosen])


def _tables(found: Collected, one: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.float64]:
    cells = (one & other, one & ~other, ~one & other, ~one & ~other)
    return np.stack([np.bincount(found.sample, cell, minlength=found.n) for cell in cells], axis=1)


def _phi(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """φ of tables [..., 4]; 0 where a margin is empty, 1 where nothing parts them."""
    a, b, c, d = np.moveaxis(table, -1, 0)
    margins = np.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    return np.where(margins > 0, (a * d - b * c) / np.where(margins > 0, margins, 1), np.where(b + c == 0, 1.0, 0.0))


def _kappa(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cohen's κ of tables [..., 4]; 1 where nothing parts them."""
    a, b, c, d = np.moveaxis(table, -1, 0)
    n = a + b + c + d
    expected = ((a + b) * (a + c) + (c + d) * (b + d)) / n**2
    same = (a + d) / n
    return np.where(expected < 1, (same - expected) / np.where(expected < 1, 1 - expected, 1), 1.0)


def _of_numbers(found: Collected) -> dict[str, Measurement]:
    said = {"rms_difference": _root_mean(found.difference, found)}
    one, other = found.original.error, found.compressed.error
    if found.product is not None and one is not None and other is not None:
        sums = np.stack([found.product, one, other], axis=1)

        def cosine(at: NDArray[np.int64]) -> NDArray[np.float64]:
            both, first, second = np.moveaxis(sums[at].sum(axis=-2), -1, 0)
            norm = np.sqrt(first * second)
            return np.where(norm > 0, both / np.where(norm > 0, norm, 1), np.where(first == second, 1.0, 0.0))

        said["error_correlation"] = resampled(cosine, found.n, "cosine")
    return said


def _root_mean(squares: NDArray[np.float64], found: Collected) -> Measurement:
    return by_sample(squares, found, "output units", np.sqrt)


def order_warning(found: Collected) -> str | None:
    """A sentence where the two models seem to number the classes differently: a permutation agrees far better.

    It is looked for in every other row and tried on the rest: some permutation always agrees better on its own rows.
    """
    one, other = found.original.scores, found.compressed.scores
    if one is None or other is None or len(one.classes) < 4 or not 2 < found.classes <= _MOST_CLASSES:
        return None
    table = _counts(one.classes[::2], other.classes[::2], found.classes)
    renamed = linear_sum_assignment(-table)[1]
    said, theirs = one.classes[1::2], other.classes[1::2]
    before, after = said == theirs, renamed[said] == theirs
    if paired_difference(after, before).low < _LIKELY_ORDER or after.mean() < 2 * before.mean():
        return None
    first = np.bincount(said[after & ~before]).argmax()
    return (
        f"the models may number the classes differently: they agree on {before.mean():.1%} of the rows, and on "
        f"{after.mean():.1%} if the classes of {found.compressed.name} are renumbered (its {renamed[first]} for "
        f"{first} …). Compare label maps"
    )


def confusion(scores: Scores, against: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """How often ``scores`` says class i where ``against`` is j, [classes, classes] as [i, j]."""
    return _counts(scores.classes, against, classes)


def _counts(said: NDArray[np.int64], against: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    return np.bincount(said * classes + against, minlength=classes**2).reshape(classes, classes)
