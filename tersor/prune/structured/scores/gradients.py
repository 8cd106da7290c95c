"""Calibration batches through a copy of the model, forward and backward: what scores by gradients share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from tersor.core.device import device_of
from tersor.core.errors import InputError, TrainingError, user_code
from tersor.core.loading import batches_of
from tersor.core.place import TensorPlace, stored_at, tensor_at
from tersor.core.task import Batch, Task
from tersor.graph.group import CoupledAxis, Group
from tersor.prune.structured.scores.coupling import by_unit, combined, members_of


def gate_scores(
    model: nn.Module, groups: Sequence[Group], passes: Iterator[nn.Module], combine: str, normalise: str | None
) -> list[Tensor]:
    """The mean over ``passes`` of (Σ w · ∂L/∂w)² for each unit, over the weights that read it: float64 [units] each.

    A factor ("gate") in front of a unit has this sum as its gradient at one; "gate" therefore adds what all readers
    say before it is squared. Any other ``combine`` squares each reader's own sum, then joins them (see ``combined``).
    """
    axes = [members_of(model, group, "readers") for group in groups]
    rows = [1 if combine == "gate" else len(readers) for readers in axes]
    totals = [torch.zeros(count, group.units, dtype=torch.float64) for count, group in zip(rows, groups, strict=True)]
    seen = 0
    for copied in passes:
        for total, readers, group in zip(totals, axes, groups, strict=True):
            changes = torch.stack([change(copied, axis, group.units) for axis in readers])
            total += (changes.sum(0, keepdim=True) if combine == "gate" else changes).square()
        seen += 1
    how = "first" if combine == "gate" else combine
    return [combined(list(total / seen), how, normalise) for total in totals]


def change(model: nn.Module, axis: CoupledAxis, units: int) -> Tensor:
    """Σ w · ∂L/∂w of each unit's slice of the axis's tensor: float64 [units]."""
    weight = tensor_at(model, axis.place)
    if weight.grad is None:
        return torch.zeros(units, dtype=torch.float64)
    return by_unit(weight.detach() * weight.grad, axis, units)


def mean_of(
    of: Callable[[Tensor, Tensor], Tensor], passes: Iterator[nn.Module], places: Sequence[TensorPlace]
) -> list[Tensor]:
    """The mean over ``passes`` of ``of(weight, its gradient)``, element by element: one tensor for each place.

    In float32 at least. A weight that no gradient reaches has a gradient of zero.
    """
    totals: list[Tensor] = []
    seen = 0
    for model in passes:
        weights = [stored_at(model, place) for place in places]
        if not totals:
            totals = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
        for total, weight in zip(totals, weights, strict=True):
            if weight.grad is not None:
                total += of(weight.detach().to(total.dtype), weight.grad.to(total.dtype))
        seen += 1
    return [total / seen for total in totals]


def after_backward(model: nn.Module, task: Task, batches: int, who: str) -> Iterator[nn.Module]:
    """A copy of ``model`` in eval mode with the gradients of the task's loss on each of ``batches`` calibration ones.

    The loader is read as it is: the caller seeds it. Raises InputError, naming ``who``, where there is no data or the
    loss fails; TrainingError where it is not finite.
    """
    yield from _passes(model, task, _numbered(task, batches, who), who)


def after_backward_of_samples(model: nn.Module, task: Task, samples: int, who: str) -> Iterator[nn.Module]:
    """The same for each of the first ``samples`` calibration samples by itself."""
    yield from _passes(model, task, islice(_one_by_one(_numbered(task, samples, who)), samples), who)


def _numbered(task: Task, batches: int, who: str) -> Iterator[tuple[int, Batch]]:
    if task.calibration is None:
        raise InputError("the task has no calibration data", where=who, do="Pass task.complete()")
    seen = 0
    for batch in islice(batches_of(task.calibration, "task.calibration"), batches):
        yield seen, batch
        seen += 1
    if seen == 0:
        raise InputError("the loader is empty", where="task.calibration", got="no batch")


def _passes(model: nn.Module, task: Task, batches: Iterator[tuple[int, Batch]], who: str) -> Iterator[nn.Module]:
    device = device_of(model)
    model = copy.deepcopy(model).eval().requires_grad_(True)
    for number, batch in batches:
        where = f"{who}, calibration batch {number}"
        model.zero_grad(set_to_none=True)
        with user_code("the loss cannot be computed", where=where), torch.enable_grad():
            loss = task.loss_of(model, send_to_device(batch, device))
            if not bool(torch.isfinite(loss)):
                raise TrainingError("the loss is not finite", where=where, got=loss.item())
            loss.backward()
        yield model


def _one_by_one(batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
    """Every sample of every batch as a batch of one, with its batch's number."""
    for number, batch in batches:
        size = _size(batch)
        if size is None:
            raise InputError(
                "the batch cannot be divided into samples", where=f"task.calibration, batch {number}",
                got=type(batch).__name__, expected="tensors whose first axis is the samples, in tuples, lists or dicts",
                do="Take Taylor, which reads whole batches",
            )  # fmt: skip
        for index in range(size):
            yield number, _sample(batch, index, size)


def _size(batch: Any) -> int | None:
    """How many samples a batch has, by its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((size for item in items if (size := _size(item)) is not None), None)


def _sample(batch: Any, index: int, size: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: _sample(value, index, size) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_sample(item, index, size) for item in batch)
    return batch
