"""Checks of one batch: what goes in, what comes out, and whether the targets fit. Each error says where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tersor.core.errors import InputError, TersorError, VerificationError, located, user_code
from tersor.core.metric import ACCURACY, ACCURACY_OF_POSITIONS, IGNORED

if TYPE_CHECKING:
    from tersor.core.task import Batch, Task

_ROUNDING = 1e-4  # by which a fraction in half precision may miss [0, 1]


def check_inputs(task: Task, batch: Batch, where: str, *, labelled: bool = True) -> None:
    """Raise InputError unless the batch has inputs and, if ``labelled``, targets as the task says, finite and of one
    length."""
    args, kwargs = _taken(task.inputs, batch, where, "inputs_of")
    named = {**{f"input {number}": value for number, value in enumerate(args)}, **kwargs}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        kinds = {name: type(value).__name__ for name, value in named.items()}
        raise InputError("the inputs hold no tensor", where=where, got=kinds, expected="tensors, batch first")
    for name, value in tensors.items():
        _check_finite(value, f"{where}, {name}")
    if not labelled:
        return
    targets = _taken(task.targets, batch, where, "targets_of")
    if not isinstance(targets, Tensor):
        raise InputError(
            "the targets are no tensor", where=where, got=type(targets).__name__, expected="a tensor, batch first",
            do="Convert them in the dataset or the collate_fn, or pass targets_of= to Task",
        )  # fmt: skip
    _check_finite(targets, f"{where}, targets")
    length = next(iter(tensors.values())).shape[:1]
    if targets.shape[:1] != length:
        raise InputError(
            "inputs and targets differ in length", where=where,
            got=f"inputs {_shapes(tensors)}, targets {list(targets.shape)}",
            expected="the batch as first dimension of both",
        )  # fmt: skip


def _taken(take: Callable[[Batch], Any], batch: Batch, where: str, name: str) -> Any:
    try:
        with user_code(f"task.{name} fails", where=where):
            return take(batch)
    except TersorError as error:
        raise error.at(where) from error.__cause__


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(str(list(value.shape)) for value in tensors.values())


def _check_finite(value: Tensor, where: str) -> None:
    if not (value.is_floating_point() or value.is_complex()):
        return
    wrong = ~torch.isfinite(value)
    if bool(wrong.any()):
        position = wrong.nonzero()[0].tolist()
        raise InputError(
            f"{int(wrong.sum())} of {value.numel()} values are not finite", where=where,
            got=f"{float(value[tuple(position)])} at {position}", expected="finite numbers",
            do="Clean the data: one NaN ruins calibration and training",
        )  # fmt: skip


def check_outputs(outputs: Tensor, length: int, where: str) -> None:
    """Raise VerificationError for outputs that are not finite, InputError where there are not ``length`` rows."""
    if length == 0:
        raise InputError("the batch holds no sample", where=where, do="Leave empty batches out of the loader")
    if outputs.ndim == 0 or outputs.shape[0] != length:
        raise InputError(
            "the model's output is not one row per sample", where=where, got=f"shape {list(outputs.shape)}",
            expected=f"[{length}, …]", do="Pass output_of= to Task if another of the model's results is meant",
        )  # fmt: skip
    finite = torch.isfinite(outputs).reshape(length, -1).all(dim=1)
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten()
        raise VerificationError(
            f"the model's output is not finite for {len(rows)} of {length} samples", where=where,
            got=f"NaN or infinity, first for sample {int(rows[0])}", expected="finite numbers",
            do="Check the model's weights and its input scaling",
        )  # fmt: skip


def predicts_classes(shape: torch.Size, targets: Tensor) -> bool:
    """Whether outputs of ``shape`` can be class scores [batch, …, classes] and targets their indices [batch, …]."""
    integers = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    return integers and len(shape) > 1 and shape[:-1] == targets.shape


def check_targets(task: Task, shape: torch.Size, targets: Tensor, where: str) -> None:
    """Raise InputError where an integer target is no index of the last dimension of outputs of ``shape``.

    Only the default loss and accuracy say that targets are indices; a task with a loss and a metric of its own may
    mean anything. −100 is allowed in sequences: the default loss ignores it.
    """
    if not predicts_classes(shape, targets) or (
        task.loss is not None and task.metric not in (ACCURACY, ACCURACY_OF_POSITIONS)
    ):
        return
    classes = shape[-1]
    wrong = out_of_range(targets, classes)
    if bool(wrong.any()):
        position = wrong.nonzero()[0].tolist()
        raise InputError(
            f"{int(wrong.sum())} targets are out of range", where=where,
            got=f"target {int(targets[tuple(position)])} of sample {position[0]}",
            expected=f"0 to {classes - 1}: the model has {classes} outputs",
            do="Number the classes from 0, or give the model one output per class",
        )  # fmt: skip


def out_of_range(targets: Tensor, classes: int) -> Tensor:
    """Which integer targets are no index of so many classes; −100 is allowed in sequences."""
    wrong = (targets < 0) | (targets >= classes)
    return wrong & (targets != IGNORED) if targets.ndim > 1 else wrong


def repeats_input(given: Tensor | None, targets: Tensor) -> bool:
    """Whether targets repeat the input wherever they count: transformers shifts such labels in its own loss alone."""
    if given is None or given.shape != targets.shape:
        return False
    return bool(((given.to(targets.device) == targets) | (targets == IGNORED)).all())


def metric_values(task: Task, outputs: Tensor, targets: Tensor, where: str) -> Tensor:
    """The metric's value of each sample, float64 [batch] on the CPU. Raises InputError where the metric gives else."""
    metric = task.demand_metric()
    expected = f"it to take outputs {list(outputs.shape)} and targets {list(targets.shape)}"
    where = f"{where}, metric {metric.name}"
    with user_code("the metric cannot be computed", where=where, expected=expected), located(where):
        values: Any = metric.per_sample(outputs, targets)
    got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    if not isinstance(values, Tensor) or values.shape != (len(outputs),):
        raise InputError(
            "the metric must give one value per sample", where=where, got=got,
            expected=f"a tensor of shape [{len(outputs)}]",
            do="For sequences, average over positions: per_sample=lambda outputs, targets: (…).float().mean(dim=1)",
        )  # fmt: skip
    if not bool(torch.isfinite(values).all()):
        raise InputError("the metric gives values that are not finite", where=where)
    found = values.detach().to("cpu", torch.float64)
    if metric.unit == "fraction":
        _expect_fractions(found, metric.name, where)
    return found


def _expect_fractions(values: Tensor, name: str, where: str) -> None:
    wrong = (values < -_ROUNDING) | (values > 1 + _ROUNDING)
    if bool(wrong.any()):
        sample = int(wrong.nonzero()[0])
        raise InputError(
            "the metric's unit is \"fraction\", and its values are none", where=where,
            got=f"{float(values[sample]):.6g} for sample {sample}", expected="values in [0, 1]",
            do=f'Metric("{name}", f, unit="…", higher_is_better=False) for an error in a unit of its own',
        )  # fmt: skip
