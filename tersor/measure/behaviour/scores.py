"""Class scores reduced to a few numbers for each row, so that a model over a large vocabulary fits in memory too."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

TOP = 5  # classes that are kept by rank
_CHUNK = 2**22  # numbers that are in double precision at a time
_PROBABILITY_SUM = 1e-3  # how far a row of probabilities may be from one


@dataclass(frozen=True, eq=False)
class Scores:
    """One model's class scores, row by row. A row is a sample, or a position of one that has a target.

    ``classes`` int64 [rows]: the highest; ``top`` int64 [rows, k]: the k highest, best first; ``confidence`` [rows]:
    the probability of the highest; ``loss`` [rows]: −log of the target's probability; ``brier`` [rows]: Σ (p − onehot)²
    (None where there are no targets). ``logits`` float32 [kept, classes]: of the first rows, as many as asked for.
    """

    classes: NDArray[np.int64]
    top: NDArray[np.int64]
    confidence: NDArray[np.float64]
    loss: NDArray[np.float64] | None
    brier: NDArray[np.float64] | None
    logits: NDArray[np.float32]

    @property
    def likelihood(self) -> NDArray[np.float64]:
        """The target's probability, [rows]."""
        assert self.loss is not None, "there are targets"
        return np.exp(-self.loss)


@dataclass(frozen=True, eq=False)
class Part:
    """Two models' scores for a batch's rows, and KL(original ‖ compressed) in nats, [rows]."""

    original: Scores
    compressed: Scores
    divergence: NDArray[np.float64]


def reduce_scores(
    original: Tensor, compressed: Tensor, targets: Tensor | None, keep: int, probabilities: tuple[bool, bool]
) -> Part:
    """Scores of both models [rows, classes], for targets int64 [rows]; ``keep``: rows whose logits are kept.

    ``probabilities``: which of the two gives probabilities rather than logits.
    """
    rows, count = original.shape
    step = max(1, _CHUNK // count)
    found: tuple[list[Scores], list[Scores]] = ([], [])
    divergence = []
    for start in range(0, max(rows, 1), step):
        part = slice(start, start + step)
        wanted = None if targets is None else targets[part]
        logs = [
            _log_probabilities(scores[part], is_probability)
            for scores, is_probability in zip((original, compressed), probabilities, strict=True)
        ]
        for log, into in zip(logs, found, strict=True):
            into.append(_reduced(log, wanted))
        p = logs[0].exp()
        divergence.append(torch.where(p > 0, p * (logs[0] - logs[1]), 0.0).sum(dim=1).clamp(min=0).numpy())
    kept = [
        _log_probabilities(scores[:keep], True).float() if is_probability else scores[:keep].float()
        for scores, is_probability in zip((original, compressed), probabilities, strict=True)
    ]
    one, other = (replace(joined(parts), logits=logits.numpy()) for parts, logits in zip(found, kept, strict=True))
    return Part(one, other, np.concatenate(divergence))


def are_probabilities(scores: Tensor) -> bool:
    """Whether the rows of scores [rows, classes] are probabilities: none negative, each row's sum one."""
    sums = scores.double().sum(dim=1)
    return bool((scores >= 0).all()) and bool(((sums - 1).abs() <= _PROBABILITY_SUM).all())


def joined(parts: list[Scores]) -> Scores:
    """The scores of several batches, one after another."""
    losses = [part.loss for part in parts if part.loss is not None]
    briers = [part.brier for part in parts if part.brier is not None]
    return Scores(
        np.concatenate([part.classes for part in parts]), np.concatenate([part.top for part in parts]),
        np.concatenate([part.confidence for part in parts]),
        np.concatenate(losses) if len(losses) == len(parts) else None,
        np.concatenate(briers) if len(briers) == len(parts) else None,
        np.concatenate([part.logits for part in parts]),
    )  # fmt: skip


def _log_probabilities(scores: Tensor, is_probability: bool) -> Tensor:
    double = scores.double()
    if not is_probability:
        return F.log_softmax(double, dim=1)
    double = double.clamp(min=torch.finfo(torch.float32).tiny)
    return double.log() - double.sum(dim=1, keepdim=True).log()


def _reduced(log: Tensor, targets: Tensor | None) -> Scores:
    best, top = log.argmax(dim=1), log.topk(min(TOP, log.shape[1]), dim=1).indices
    top = torch.where(top == best[:, None], top[:, :1], top)  # topk breaks ties as it likes, the metric takes the first
    top[:, 0] = best
    p = log.exp()
    confidence = p.gather(1, best[:, None])[:, 0]
    none = np.empty((0, log.shape[1]), np.float32)
    if targets is None:
        return Scores(best.numpy(), top.numpy(), confidence.numpy(), None, None, none)
    loss, true = -log.gather(1, targets[:, None])[:, 0], p.gather(1, targets[:, None])[:, 0]
    brier = p.square().sum(dim=1) - 2 * true + 1
    return Scores(best.numpy(), top.numpy(), confidence.numpy(), loss.numpy(), brier.numpy(), none)
