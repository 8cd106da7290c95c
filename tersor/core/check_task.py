"""Look a task over before anything long: wrong types, empty loaders, NaN and wrong targets are found in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.check_batch import check_inputs, check_outputs, check_targets, metric_values
from tersor.core.errors import InputError, TersorError
from tersor.core.eval_mode import eval_mode
from tersor.core.randomness import fixed_randomness
from tersor.core.task import Batch, Task

BATCHES = 3  # of each loader
SEED = 0
SPLITS = ("train", "validation", "test", "calibration")


def check_task(task: Task) -> tuple[str, ...]:
    """Check a completed task on the first batches of each loader; returns notes that the run should show.

    Nothing is changed: the random state, training flags, gradients and statistics stay as they were. Raises InputError.
    """
    _check_types(task)
    seen: dict[int, list[Batch]] = {}
    for split in SPLITS:
        loader = getattr(task, split)
        if id(loader) not in seen:
            seen[id(loader)] = _first_batches(loader, split)
            with fixed_randomness(SEED):
                _check_split(task, split, seen[id(loader)])
    _check_example(task)
    train = seen[id(task.train)]
    with fixed_randomness(SEED):
        _check_loss(task, train[0])
    return tuple(_notes(task, train))


def _check_types(task: Task) -> None:
    if not isinstance(task.model, nn.Module):
        got = type(task.model).__name__
        raise InputError("the model is no torch.nn.Module", where="task.model", got=got, expected="torch.nn.Module")
    for split in SPLITS:
        _check_loader(getattr(task, split), f"task.{split}")
    for name, parameter in task.model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise InputError(
                "the model's weights are not finite", where=f"task.model, {name}", got="NaN or infinity",
                do="Start from a checkpoint whose training did not diverge",
            )  # fmt: skip


def _check_example(task: Task) -> None:
    example = task.example_inputs
    if not isinstance(example, tuple) or not example or not all(isinstance(value, Tensor) for value in example):
        kinds = (
            [type(value).__name__ for value in example]
            if isinstance(example, (tuple, list))
            else type(example).__name__
        )
        raise InputError(
            "example inputs must be a tuple of tensors", where="task.example_inputs", got=kinds,
            expected="a tuple such as (images,), batch first", do="A single tensor x is written (x,)",
        )  # fmt: skip
    for number, value in enumerate(example):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(
                "example inputs are not finite", where=f"task.example_inputs[{number}]", got="NaN or infinity"
            )
    if example[0].ndim == 0 or example[0].shape[0] == 0:
        raise InputError(
            "example inputs need a batch", where="task.example_inputs[0]", got=f"shape {list(example[0].shape)}"
        )


def _check_loader(loader: Any, where: str) -> None:
    if isinstance(loader, Iterator):
        raise InputError(
            "the loader can be read only once", where=where, got=type(loader).__name__,
            expected="a re-iterable, such as a DataLoader",
            do="Pass the DataLoader itself (or a list of batches), not iter(loader) or a generator",
        )  # fmt: skip
    if not isinstance(loader, Iterable):
        got = type(loader).__name__
        raise InputError(
            "the loader cannot be iterated over", where=where, got=got, expected="a DataLoader or a list of batches"
        )


def _first_batches(loader: Iterable[Batch] | None, split: str) -> list[Batch]:
    assert loader is not None, "a completed task has every loader"
    try:
        with fixed_randomness(SEED):
            batches = list(islice(loader, BATCHES))
    except TersorError:
        raise
    except Exception as error:  # datasets raise whatever they like
        raise InputError(
            "the loader fails", where=f"task.{split}", got=f"{type(error).__name__}: {error}", expected="batches",
        ) from error  # fmt: skip
    if not batches:
        raise InputError(
            "the loader is empty", where=f"task.{split}", got="no batch", expected="at least one batch",
            do="Fewer samples than one batch and drop_last=True give this too",
        )  # fmt: skip
    return batches


def _check_split(task: Task, split: str, batches: list[Batch]) -> None:
    for number, batch in enumerate(batches):
        where = f"task.{split}, batch {number}"
        try:
            check_inputs(task, batch, where)
            targets = task.targets(batch)
        except InputError as error:
            raise error.at(where if error.where == "task loader" else error.where) from None
        if number == 0:
            shape = _check_forward(task, batch, where)
        check_targets(task, shape, targets, where)


def _check_forward(task: Task, batch: Batch, where: str) -> torch.Size:
    try:
        with torch.no_grad(), eval_mode(task.model) as model:
            outputs = task.outputs(model, batch)
    except TersorError:
        raise
    except Exception as error:  # the user's forward
        raise InputError(
            "the model does not run on this batch", where=where, got=f"{type(error).__name__}: {error}",
            do="Check shapes and dtypes, and that model and batches are on the same device",
        ) from error  # fmt: skip
    targets = task.targets(batch)
    check_outputs(outputs, len(targets), where)
    check_targets(task, outputs.shape, targets, where)
    metric_values(task, outputs, targets, where)
    return outputs.shape


def _check_loss(task: Task, batch: Batch) -> None:
    where = "task.loss on batch 0 of task.train"
    try:
        with torch.enable_grad(), eval_mode(task.model) as model:
            loss: Any = task.loss_of(model, batch)
    except TersorError:
        raise
    except Exception as error:  # the user's loss
        raise InputError("the loss cannot be computed", where=where, got=f"{type(error).__name__}: {error}") from error
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError("the loss is no scalar tensor", where=where, got=got, expected="a tensor of shape []")
    if not bool(torch.isfinite(loss)):
        raise InputError("the loss is not finite", where=where, got=float(loss.detach()), expected="a finite number")
    if not loss.requires_grad:
        trainable = sum(parameter.requires_grad for parameter in task.model.parameters())
        raise InputError(
            "the loss has no gradient", where=where, got=f"{trainable} parameters with requires_grad",
            do="Unfreeze what training may change, and compute the loss without detach, item or no_grad",
        )  # fmt: skip


def _notes(task: Task, train_batches: list[Batch]) -> list[str]:
    notes = []
    if not _same(train_batches[:2], _first_batches(task.train, "train")[:2]):
        notes.append(
            "the train loader has randomness of its own (under the same torch, numpy and random seed it gives other "
            "batches, as a loader with its own generator does): a resumed run may end with other weights"
        )
    if task.test is task.validation:
        notes.append("validation and test are the same data: decisions are taken on what the report measures")
    return notes


def _same(a: Any, b: Any) -> bool:
    """Whether two batches hold the same tensors and numbers; objects of other kinds are taken as the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b if isinstance(a, (int, float, str)) else True
