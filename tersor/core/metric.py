"""Metrics, one value per sample, and the loss of a task that brings none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Metric:
    """A metric as one value per sample, so that intervals and paired tests can be made of it.

    ``per_sample(outputs, targets)`` → float tensor [batch]; the metric is its mean. ``unit`` "fraction" means values
    in [0, 1] that reports show in percent.
    """

    name: str
    per_sample: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool = True
    unit: str = "fraction"


def _correct(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.shape[:-1] != targets.shape:  # labels instead of scores would otherwise be compared by their position
        raise ValueError("accuracy needs a score for each class, [n, classes], of each target [n]")
    return (outputs.argmax(dim=-1) == targets).float()


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.reshape(targets.shape) - targets).square().reshape(len(targets), -1).mean(dim=1)


def default_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error for float targets; cross entropy for integer ones, outputs [batch, …, classes]."""
    if targets.is_floating_point():
        return F.mse_loss(outputs.float().reshape(targets.shape), targets)
    return F.cross_entropy(outputs.float().flatten(0, -2), targets.flatten())


ACCURACY = Metric("accuracy", _correct)
MEAN_SQUARED_ERROR = Metric("mean_squared_error", _squared_error, higher_is_better=False, unit="squared units")
