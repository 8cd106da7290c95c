"""Metrics, one value per sample, and the loss of a task that brings none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError


@dataclass(frozen=True)
class Metric:
    """A metric as one value per sample, so that intervals and paired tests can be made of it.

    ``per_sample(outputs, targets)`` → float tensor [batch]; the metric is its mean. ``unit`` "fraction" means values
    in [0, 1] that reports show in percent (others are refused); an error has a unit of its own and False for
    ``higher_is_better``.
    """

    name: str
    per_sample: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool = True
    unit: str = "fraction"

    def __post_init__(self) -> None:
        check_fields(self)


def _correct(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.shape[:-1] != targets.shape:  # labels instead of scores would otherwise be compared by their position
        raise _no_labels(outputs, targets)
    return (outputs.argmax(dim=-1) == targets).float()


def _correct_positions(outputs: Tensor, targets: Tensor) -> Tensor:
    right, counted = _correct(outputs, targets).flatten(1), (targets != IGNORED).flatten(1)
    empty = int((~counted.any(dim=1)).sum())
    if empty:
        raise InputError(
            "samples without any target", got=f"{IGNORED} at every position of {empty} of {len(targets)}",
            do="Leave them out, or pass metric= to Task",
        )  # fmt: skip
    return (right.double() * counted).sum(dim=1) / counted.sum(dim=1)


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    _expect_as_many(outputs, targets)
    return (outputs.reshape(targets.shape) - targets).square().reshape(len(targets), -1).mean(dim=1)


def default_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error for float targets; cross entropy for integer ones, outputs [batch, …, classes].

    Raises InputError for targets that are neither as many numbers as the outputs nor labels of their rows.
    """
    if targets.is_floating_point():
        _expect_as_many(outputs, targets)
        return F.mse_loss(outputs.float().reshape(targets.shape), targets)
    if targets.dtype not in _LABELS or outputs.ndim < 2 or outputs[..., 0].numel() != targets.numel():
        raise _no_labels(outputs, targets)
    return F.cross_entropy(outputs.float().flatten(0, -2), targets.flatten())


def _expect_as_many(outputs: Tensor, targets: Tensor) -> None:
    if outputs.numel() != targets.numel():
        raise _no_labels(outputs, targets)


def _no_labels(outputs: Tensor, targets: Tensor) -> InputError:
    """What is said of targets that are neither class labels of the outputs nor numbers to come near to."""
    rows, shape = list(outputs.shape[:-1]), list(targets.shape)
    if targets.dtype not in _LABELS:
        what, do = "class labels must be whole numbers (torch.int64)", "targets.long()"
    else:
        what, do = "class labels must be whole numbers, with a score for each class of each", ""
    if shape == [*outputs.shape[:1], *outputs.shape[2:]] and outputs.ndim > 2:
        return InputError(
            "class scores come last", got=f"outputs {list(outputs.shape)} for targets {shape}",
            expected=f"outputs {[*shape, outputs.shape[1]]}", do="Task(output_of=lambda output: output.movedim(1, -1))",
        )  # fmt: skip
    if targets.ndim == outputs.ndim and outputs.ndim > 1:
        squeezed = shape[-1] == 1
        do = ("targets.squeeze(-1)" if squeezed else "One-hot labels: targets.argmax(-1)") + (".long()" if do else "")
    expected = f"torch.int64 {rows}" if rows else "outputs [n, classes] for torch.int64 [n]"
    if targets.is_floating_point():
        expected += f" (or, for numbers to come near to, floats {list(outputs.shape)})"
    return InputError(
        what, got=f"{targets.dtype} {shape} for outputs {list(outputs.shape)}", expected=expected,
        do=do and f"{do}, in the dataset or by Task(targets_of=…)",
    )  # fmt: skip


IGNORED = -100  # the target that torch's cross entropy leaves out
_LABELS = (torch.int64, torch.uint8)  # what torch's cross entropy takes for labels
ACCURACY = Metric("accuracy", _correct)
ACCURACY_OF_POSITIONS = Metric("accuracy", _correct_positions)  # tokens, pixels: the share of a sample's positions
MEAN_SQUARED_ERROR = Metric("mean_squared_error", _squared_error, higher_is_better=False, unit="squared units")


def default_metric(targets: Tensor) -> Metric:
    """What is measured where the user says nothing: by the type of the targets, classes of samples or of positions."""
    if targets.is_floating_point():
        return MEAN_SQUARED_ERROR
    return ACCURACY if targets.ndim < 2 else ACCURACY_OF_POSITIONS
