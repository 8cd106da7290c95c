"""What the user brings: a model, its data, its loss and its metric."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.errors import InputError

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]


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


@dataclass(frozen=True, eq=False)
class Task:
    """A trained model and what is needed to compress it and to judge the result.

    Loaders are ordinary DataLoaders (any re-iterable of batches). A batch is (inputs, targets), (input, …, targets) or
    a dict whose targets stand under one of ``labels, label, targets, target, y``; for anything else pass ``loss``,
    ``inputs_of`` and ``targets_of``.

    Args:
        model: the trained model; or ``factory`` builds it (an artifact then loads without the original at hand).
        train, validation, test, calibration: loaders. Decisions are taken on validation; test is read for the report.
        loss: ``loss(model, batch)`` → scalar; default cross entropy for integer targets, mean squared error for floats.
        metric: default accuracy for integer targets, mean squared error for floats.
        example_inputs: positional inputs of ``model`` (a tuple of tensors, batch first); default: taken from a batch.
        reference: the model to compare with and to learn from; default: the model given.
        inputs_of, targets_of: ``batch`` → (args, kwargs) of the model; ``batch`` → targets.
        output_of: what the model returns → the tensor that loss and metric are about (default: the tensor itself,
            ``.logits``, or the first of a tuple).
        source: "file.py", "package.module:function" or a built-in name; set by who loads the task.
    """

    model: nn.Module
    train: Iterable[Batch] | None = None
    validation: Iterable[Batch] | None = None
    test: Iterable[Batch] | None = None
    calibration: Iterable[Batch] | None = None
    loss: Loss | None = None
    metric: Metric | None = None
    example_inputs: tuple[Tensor, ...] | None = None
    reference: nn.Module | None = None
    inputs_of: Callable[[Batch], tuple[tuple[Any, ...], Mapping[str, Any]]] | None = None
    targets_of: Callable[[Batch], Tensor] | None = None
    output_of: Callable[[Any], Tensor] | None = None
    factory: Callable[[], nn.Module] | None = None
    name: str = "task"
    source: str = ""
    derived: tuple[str, ...] = field(default=())

    def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The model's (positional, keyword) arguments in a batch."""
        if self.inputs_of is not None:
            return self.inputs_of(batch)
        if isinstance(batch, Mapping):
            return self._in_order({key: value for key, value in batch.items() if key not in TARGET_KEYS})
        if isinstance(batch, (tuple, list)) and len(batch) >= 2:
            given = batch[0] if len(batch) == 2 and isinstance(batch[0], (tuple, list)) else batch[:-1]
            return tuple(given), {}
        raise _strange_batch(batch)

    def _in_order(self, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Named inputs as positional ones where they are the first that the model's forward takes."""
        names = list(inspect.signature(self.model.forward).parameters)[: len(named)]
        return (tuple(named[name] for name in names), {}) if set(names) == set(named) else ((), named)

    def targets(self, batch: Batch) -> Tensor:
        """The targets in a batch."""
        if self.targets_of is not None:
            return self.targets_of(batch)
        if isinstance(batch, Mapping):
            found = [batch[key] for key in TARGET_KEYS if key in batch]
            if found:
                return found[0]
        elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
            return batch[-1]
        raise _strange_batch(batch)

    def outputs(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The tensor that ``model`` (any callable) gives for a batch."""
        args, kwargs = self.inputs(batch)
        return self.output(model(*args, **kwargs))

    def output(self, result: Any) -> Tensor:
        """The tensor that matters in what a model returned."""
        if self.output_of is not None:
            return self.output_of(result)
        if isinstance(result, Tensor):
            return result
        logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
        if isinstance(logits, Tensor):
            return logits
        if isinstance(result, (tuple, list)) and result and isinstance(result[0], Tensor):
            return result[0]
        raise InputError(
            "the model's output holds no tensor that Tersor knows", where="task.output_of", got=type(result).__name__,
            expected="a tensor, an object with .logits, or a tuple that begins with a tensor",
            do="Pass output_of=lambda result: … to Task",
        )  # fmt: skip

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task's own loss: a scalar tensor with a gradient."""
        if self.loss is not None:
            return self.loss(model, batch)
        return default_loss(self.outputs(model, batch), self.targets(batch))

    def complete(self) -> Task:
        """The task with what was missing derived where that is safe, each derivation named in ``derived``.

        Raises InputError where something cannot be derived.
        """
        if not isinstance(self.model, nn.Module):
            got = type(self.model).__name__
            raise InputError("the model is no torch.nn.Module", where="task.model", got=got, expected="torch.nn.Module")
        said = list(self.derived)
        train, validation, test, calibration = self.train, self.validation, self.test, self.calibration
        if train is None:
            raise InputError(
                "the task has no training data", where=f"task {self.name!r}", expected="Task(train=DataLoader)"
            )
        if calibration is None:
            calibration = train
            said.append("calibration batches are taken from train")
        if validation is None or test is None:
            missing = "validation" if validation is None else "test"
            raise InputError(
                f"the task has no {missing} data", where=f"task {self.name!r}",
                expected="separate validation and test loaders",
                do="Decisions are taken on validation, the test set is read for the report: split what you hold out",
            )  # fmt: skip
        first = first_batch(calibration, "calibration")
        try:
            (args, kwargs), targets = self.inputs(first), self.targets(first)
        except InputError as error:
            raise error.at(f"task.{'train' if calibration is train else 'calibration'}, batch 0") from None
        example = self.example_inputs
        if example is None:
            if kwargs:
                raise InputError(
                    "example inputs cannot be derived from batches of keyword arguments", where="task.example_inputs",
                    got=sorted(kwargs), expected="a tuple of tensors",
                    do="Name the batch's keys as the model's forward names its first arguments, or pass inputs_of",
                )  # fmt: skip
            example = tuple(value[:2] for value in args)
            said.append("example inputs are the first two samples of a calibration batch")
        metric = self.metric
        if metric is None:
            metric = MEAN_SQUARED_ERROR if targets.is_floating_point() else ACCURACY
            said.append(f"the metric is {metric.name.replace('_', ' ')}, by the type of the targets")
        reference = self.model if self.reference is None else self.reference
        if self.reference is None or not _at_rest(reference):  # the user's own modules stay as they are
            reference = copy.deepcopy(reference).eval().requires_grad_(False)
        return replace(
            self, calibration=calibration, example_inputs=example, metric=metric, reference=reference,
            derived=tuple(said),
        )  # fmt: skip


def _at_rest(model: nn.Module) -> bool:
    return not any(module.training for module in model.modules()) and not any(
        p.requires_grad for p in model.parameters()
    )


def _strange_batch(batch: Batch) -> InputError:
    got = type(batch).__name__
    if isinstance(batch, Mapping):
        got = f"dict with keys {sorted(map(str, batch))}"
    elif isinstance(batch, (tuple, list)):
        got = f"{got} of {len(batch)}"
    return InputError(
        "a batch has an unknown structure", where="task loader", got=got,
        expected=f"(inputs, targets), or a dict with one of {', '.join(TARGET_KEYS)}",
        do="Or pass inputs_of=, targets_of= and loss= to Task",
    )  # fmt: skip


def first_batch(loader: Iterable[Batch], name: str) -> Batch:
    """The first batch of a loader, without disturbing the random state. Raises InputError where it is empty."""
    with torch.random.fork_rng(devices=[]):
        for batch in loader:
            return batch
    raise InputError("the loader is empty", where=f"task.{name}", got="no batch", expected="at least one batch")
