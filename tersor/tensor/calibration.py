"""Calibration: whether a model that says 80 % is right in 80 % of the cases. Arrays in, plain floats out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tersor.tensor.statistics import Estimate

Array = NDArray[np.float64]
Kind = Literal["width", "mass"]
BINS = 15


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram, one entry for each bin that has samples.

    ``low``, ``high``: the bin's edges; ``count``: its samples; ``confidence`` and ``accuracy``: their means in it;
    ``accuracy_low``, ``accuracy_high``: Wilson's interval of the accuracy. All [bins].
    """

    low: Array
    high: Array
    count: NDArray[np.int64]
    confidence: Array
    accuracy: Array
    accuracy_low: Array
    accuracy_high: Array


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS, kind: Kind = "width") -> Reliability:
    """Mean confidence and accuracy of ``confidence`` [n] in [0, 1] and ``correct`` [n] in {0, 1}, bin by bin.

    ``kind``: bins of equal width, or of equal mass (as many samples in each; Nguyen and O'Connor 2015). Samples of one
    confidence always share a bin. Raises ValueError for other lengths or values.
    """
    raise NotImplementedError


def ece(
    confidence: ArrayLike, correct: ArrayLike, bins: int = BINS, kind: Kind = "width", *, debias: bool = False
) -> float:
    """Expected calibration error Σ_b (n_b / n) · |accuracy_b − confidence_b|, in [0, 1].

    Source: Naeini et al. 2015; Guo et al. 2017 (arXiv:1706.04599), section 2. It is never below zero, so noise alone
    raises it; ``debias`` takes off what noise adds (Kumar et al. 2019, arXiv:1909.10155, and Roelofs et al. 2022,
    arXiv:2012.08668).
    """
    raise NotImplementedError


def ece_interval(
    confidence: ArrayLike,
    correct: ArrayLike,
    bins: int = BINS,
    kind: Kind = "width",
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The debiased calibration error with its interval."""
    raise NotImplementedError


def ece_increase(
    original: tuple[ArrayLike, ArrayLike],
    compressed: tuple[ArrayLike, ArrayLike],
    bins: int = BINS,
    kind: Kind = "width",
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """ECE of ``compressed`` minus that of ``original``, each (confidence, correct) on the same samples; positive is worse."""
    raise NotImplementedError


def mce(
    confidence: ArrayLike, correct: ArrayLike, bins: int = BINS, kind: Kind = "width", level: float = 0.95
) -> Estimate:
    """Maximum calibration error max_b |accuracy_b − confidence_b| with its interval."""
    raise NotImplementedError


def brier(probabilities: ArrayLike, targets: ArrayLike) -> Array:
    """Brier score of each sample, Σ_k (p_k − [k = target])², float64 [n] in [0, 2], of ``probabilities`` [n, classes].

    Its mean is the model's; ``bootstrap_interval`` and ``paired_difference`` give intervals. Source: Brier 1950.
    """
    raise NotImplementedError


def nll(probabilities: ArrayLike, targets: ArrayLike) -> Array:
    """Negative log likelihood −log p_target of each sample in nats, float64 [n], of ``probabilities`` [n, classes]."""
    raise NotImplementedError


def softmax(logits: ArrayLike, temperature: float = 1.0) -> Array:
    """Probabilities softmax(logits / temperature) over the last axis."""
    raise NotImplementedError


def fit_temperature(logits: ArrayLike, targets: ArrayLike) -> float:
    """The temperature T > 0 that minimises the mean NLL of softmax(logits / T), ``logits`` [n, classes].

    Source: Guo et al. 2017 (arXiv:1706.04599), section 4.2.
    """
    raise NotImplementedError


def cross_fitted(logits: ArrayLike, targets: ArrayLike, folds: int = 5, seed: int = 0) -> tuple[Array, float]:
    """(probabilities [n, classes], mean temperature), each sample scaled by a temperature fitted on the other folds.

    For when no validation set is there to fit on: the calibration error afterwards is then still that of unseen samples.
    """
    raise NotImplementedError
