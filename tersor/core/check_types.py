"""Whether a task holds what its fields say: looked at before anything is read, run or derived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.metric import Metric

if TYPE_CHECKING:
    from tersor.core.task import Task

SPLITS = ("train", "validation", "test", "calibration")
FUNCTIONS = {
    "loss": "a function: loss(model, batch) → scalar tensor",
    "inputs_of": "a function: inputs_of(batch) → (args, kwargs)",
    "targets_of": "a function: targets_of(batch) → tensor",
    "output_of": "a function: output_of(what the model returns) → tensor",
}


def check_types(task: Task) -> None:
    """Raise InputError where a field of a task is of a wrong type; what is None may still be derived."""
    _expect(isinstance(task.model, nn.Module), "the model is no torch.nn.Module", "task.model", task.model)
    for split in SPLITS:
        if getattr(task, split) is not None:
            _check_loader(getattr(task, split), f"task.{split}")
    for name, expected in FUNCTIONS.items():
        value = getattr(task, name)
        _expect(value is None or callable(value), f"{name} cannot be called", f"task.{name}", value, expected)
    _check_metric(task.metric)
    fits = task.reference is None or isinstance(task.reference, nn.Module)
    _expect(fits, "the reference is no torch.nn.Module", "task.reference", task.reference)
    if task.example_inputs is not None:
        _check_example(task.example_inputs)


def _expect(fits: bool, what: str, where: str, value: Any, expected: str = "torch.nn.Module", do: str = "") -> None:
    if not fits:
        got = type(value).__name__ + (f" {value!r}" if isinstance(value, (str, int, float)) else "")
        raise InputError(what, where=where, got=got, expected=expected, do=do)


def _check_loader(loader: Any, where: str) -> None:
    _expect(
        not isinstance(loader, Iterator), "the loader can be read only once", where, loader,
        "a re-iterable, such as a DataLoader",
        "Pass the DataLoader itself (or a list of batches), not iter(loader) or a generator",
    )  # fmt: skip
    fits = isinstance(loader, Iterable)
    _expect(fits, "the loader cannot be iterated over", where, loader, "a DataLoader or a list of batches")


def _check_metric(metric: Any) -> None:
    expected = "tersor.Metric(name, per_sample)"
    do = "Accuracy and mean squared error need not be given: they are the defaults"
    fits = metric is None or isinstance(metric, Metric)
    _expect(fits, "the metric is no Metric", "task.metric", metric, expected, do)


def _check_example(example: Any) -> None:
    if isinstance(example, tuple) and example and all(isinstance(value, Tensor) for value in example):
        return
    listed = isinstance(example, (tuple, list))
    kinds = [type(value).__name__ for value in example] if listed else type(example).__name__
    raise InputError(
        "example inputs must be a tuple of tensors", where="task.example_inputs", got=kinds,
        expected="a tuple such as (images,), batch first", do="A single tensor x is written (x,)",
    )  # fmt: skip
