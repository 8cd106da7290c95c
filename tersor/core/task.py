"""What the user brings: a model, its data, its loss and its metric."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersor.core.check_batch import check_inputs
from tersor.core.check_types import check_types
from tersor.core.errors import InputError, type_and_message, user_code
from tersor.core.keyed import plain
from tersor.core.loading import batches_of
from tersor.core.metric import Metric, default_loss, default_metric

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
Batch = Any
Split = Literal["train", "validation", "test"]
Loss = Callable[[nn.Module, Batch], Tensor]
Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Task:
    """A trained model and what is needed to compress it and to judge the result.

    Loaders are ordinary DataLoaders (any re-iterable of batches). A batch is (inputs, targets), (input, …, targets) or
    a dict whose targets stand under one of ``labels, label, targets, target, y``; for anything else pass ``loss``,
    ``inputs_of`` and ``targets_of``.

    Args:
        model: the trained model.
        factory: a function without arguments that builds it, called once, here, where no ``model`` is given.
        train, validation, test, calibration: loaders. Decisions are taken on validation; test is read for the report.
        loss: ``loss(model, batch)`` → scalar; default cross entropy for integer targets, mean squared error for floats.
        metric: default accuracy for integer targets (of tokens or pixels [batch, …] the share of a sample's positions
            that are right, −100 left out), mean squared error for floats.
        example_inputs: positional inputs of ``model`` (a tuple of tensors, batch first); default: taken from a batch.
        reference: the teacher, whose outputs distillation learns from; default: the model given. What was lost is
            always measured against ``model``.
        inputs_of, targets_of: ``batch`` → (args, kwargs) of the model; ``batch`` → targets.
        output_of: what the model returns → the tensor that loss and metric are about (default: the tensor itself,
            ``.logits``, or the first of a tuple). Where it is given, without a ``loss`` of your own, nothing else that
            the model returns counts: pruning may narrow other outputs (an encoder's features beside the logits).
        source: "file.py", "package.module:function" or a built-in name; set by who loads the task.

    Raises InputError where there is neither a model nor a factory, or where the factory fails.
    """

    model: nn.Module = None  # type: ignore[assignment]  # the factory's, once the task is made
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

    def __post_init__(self) -> None:
        if self.model is not None:
            return
        if not callable(self.factory):
            raise InputError(
                "the task has no model", where=f"task {self.name!r}", got=f"model None, factory {self.factory!r}",
                expected="Task(model=…) or Task(factory=…)",
            )  # fmt: skip
        with user_code("the factory fails", where="task.factory", expected="a torch.nn.Module"):
            object.__setattr__(self, "model", self.factory())

    def inputs(self, batch: Batch, model: Any = None) -> Arguments:
        """The (positional, keyword) arguments in a batch, for ``model`` (default: the task's own).

        A dict's entries go to the forward's arguments of the same names: as positional ones where they are its first,
        as keywords elsewhere. A model that has no such names is given them as the task's own model is. A tensor by
        itself, or a tuple of one, is a batch without targets.
        """
        batch = plain(batch)
        if self.inputs_of is not None:
            return self.inputs_of(batch)
        if isinstance(batch, Mapping):
            named = {key: value for key, value in batch.items() if key not in TARGET_KEYS}
            own = by_name(named, model.forward) if isinstance(model, nn.Module) else None
            return own or by_name(named, self.model.forward) or ((), named)
        if isinstance(batch, (tuple, list)) and len(batch) >= 2:
            given = batch[0] if len(batch) == 2 and isinstance(batch[0], (tuple, list)) else batch[:-1]
            return tuple(given), {}
        if isinstance(batch, Tensor):
            return (batch,), {}
        if isinstance(batch, (tuple, list)) and len(batch) == 1 and isinstance(batch[0], Tensor):
            return (batch[0],), {}
        raise _strange_batch(batch)

    def targets(self, batch: Batch) -> Tensor:
        """The targets in a batch."""
        batch = plain(batch)
        if self.targets_of is not None:
            return self.targets_of(batch)
        if isinstance(batch, Mapping):
            found = [batch[key] for key in TARGET_KEYS if key in batch]
            if found:
                return found[0]
        elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
            return batch[-1]
        raise _strange_batch(batch)

    def brings_targets(self, batch: Batch) -> bool:
        """Whether a batch has targets: not so a dict without any of their keys, or inputs by themselves."""
        batch = plain(batch)
        if self.targets_of is not None:
            return True
        if isinstance(batch, Mapping):
            return not batch.keys().isdisjoint(TARGET_KEYS)
        return not isinstance(batch, Tensor) and not (isinstance(batch, (tuple, list)) and len(batch) == 1)

    def outputs(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The tensor that ``model`` (any callable) gives for a batch."""
        args, kwargs = self.inputs(batch, model)
        return self.output(model(*args, **kwargs))

    def output(self, result: Any) -> Tensor:
        """The tensor that matters in what a model returned."""
        if self.output_of is not None:
            return self.output_of(result)
        return output_tensor(result)

    @property
    def sole_output(self) -> Callable[[Any], Tensor] | None:
        """``output_of``, where loss and metric see nothing else of what the model returns."""
        return self.output_of if self.loss is None else None

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task's own loss: a scalar tensor with a gradient."""
        if self.loss is not None:
            return self.loss(model, plain(batch))
        return default_loss(self.outputs(model, batch), self.targets(batch))

    def demand_example(self) -> tuple[Tensor, ...]:
        """The example inputs. Raises InputError on a task that is not completed."""
        if self.example_inputs is None:
            raise self._lacks("example inputs", "Task(example_inputs=…) or what complete() derives")
        return self.example_inputs

    def demand_metric(self) -> Metric:
        """The metric. Raises InputError on a task that is not completed."""
        if self.metric is None:
            raise self._lacks("metric", "Task(metric=…) or what complete() derives")
        return self.metric

    def demand_loader(self, split: Split | Literal["calibration"]) -> Iterable[Batch]:
        """The loader of a split. Raises InputError where there is none."""
        loader: Iterable[Batch] | None = getattr(self, split)
        if loader is None:
            kind = "training" if split == "train" else split
            raise self._lacks(f"{kind} data", f"Task({split}=DataLoader)")
        return loader

    def _lacks(self, what: str, expected: str) -> InputError:
        return InputError(
            f"the task has no {what}", where=f"task {self.name!r}", expected=expected,
            do="Pass task.complete(); run(model, task) completes it by itself",
        )  # fmt: skip

    @property
    def _is_ready(self) -> bool:
        """Whether nothing but a metric is left to derive."""
        found = self.calibration is not None and self.example_inputs is not None
        return found and self.reference is not None and _rests(self.reference)

    def ready(self) -> Task:
        """The task as ``run`` of a step takes it: itself where it is complete or has no data, else completed.

        Nothing is demanded here: what a step needs and the task does not have, the step names. Raises InputError where
        something that is there cannot be used.
        """
        if self._is_ready or (self.calibration is None and self.train is None):
            return self
        held_out: tuple[Split, ...] = ("validation", "test")
        return self._completed([split for split in held_out if getattr(self, split) is not None], strict=False)

    def complete(self, needs: Collection[Split] = ("train", "validation", "test")) -> Task:
        """The task with what was missing derived where that is safe, each derivation named in ``derived``.

        ``needs``: the splits that must be there; ``()`` is enough for steps that calibrate only (``Quantize``), whose
        batches need no targets. Raises InputError where something is missing or cannot be derived.
        """
        return self._completed(needs, strict=True)

    def _completed(self, needs: Collection[Split], *, strict: bool) -> Task:
        """``complete``; unless ``strict``, batches of keyword arguments leave the example inputs None, and batches to
        calibrate on, or to train on by a teacher alone, may have no targets."""
        check_types(self)
        self._demand_data(needs)
        if self._is_ready and (self.metric is not None or not needs):
            return self
        said = list(self.derived)
        calibration, split = self.calibration, "calibration"
        if calibration is None:
            calibration, split = self.train, "train"
            said.append("calibration batches are taken from train")
        if calibration is None:
            raise InputError(
                "the task has no data to calibrate on", where=f"task {self.name!r}",
                expected="Task(calibration=DataLoader), or train=",
            )  # fmt: skip
        first = first_batch(calibration, split)
        labelled = bool(needs) and (strict or self.brings_targets(first))
        check_inputs(self, first, f"task.{split}, batch 0", labelled=labelled)
        example = self.example_inputs
        arguments = self.inputs(first)
        if example is None and (strict or not arguments[1]):
            example = _example_of(arguments)
            said.append("example inputs are the first two samples of a calibration batch")
        metric = self.metric
        if metric is None and needs:
            held_out = next(iter(needs))
            told = first if labelled else first_batch(self.demand_loader(held_out), held_out)
            metric = default_metric(self.targets(told))
            said.append(f"the metric is {metric.name.replace('_', ' ')}, by the type of the targets")
        reference = self.model if self.reference is None else self.reference
        reference = at_rest(reference, copied=self.reference is None)
        return replace(
            self, calibration=calibration, example_inputs=example, metric=metric, reference=reference,
            derived=tuple(said),
        )  # fmt: skip

    def _demand_data(self, needs: Collection[Split]) -> None:
        if "train" in needs and self.train is None:
            raise InputError(
                "the task has no training data", where=f"task {self.name!r}", expected="Task(train=DataLoader)",
                do="For steps that only calibrate: task.complete(needs=())",
            )  # fmt: skip
        missing = [split for split in ("validation", "test") if split in needs and getattr(self, split) is None]
        if missing:
            raise InputError(
                f"the task has no {missing[0]} data", where=f"task {self.name!r}",
                expected="separate validation and test loaders",
                do="Decisions are taken on validation, the test set is read for the report: split what you hold out",
            )  # fmt: skip


def output_tensor(result: Any) -> Tensor:
    """The tensor in what a model returned: itself, ``.logits``, or the first of a tuple. Raises InputError."""
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


def by_name(named: Mapping[str, Any], forward: Callable[..., Any]) -> Arguments | None:
    """Named inputs as ``forward`` takes them; None where it takes no such names."""
    parameters = inspect.signature(forward).parameters.values()
    ordered = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: len(named)]
    if set(ordered) == set(named):
        return tuple(named[name] for name in ordered), {}
    takes = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return ((), named) if takes >= set(named) or any(p.kind is p.VAR_KEYWORD for p in parameters) else None


def _example_of(inputs: Arguments) -> tuple[Tensor, ...]:
    """The first two samples of a batch's inputs. Raises InputError unless they are positional tensors."""
    args, kwargs = inputs
    if kwargs:
        raise InputError(
            "example inputs cannot be derived from batches of keyword arguments", where="task.example_inputs",
            got=sorted(kwargs), expected="a tuple of tensors",
            do="Name the batch's keys as the model's forward names its first arguments, or pass inputs_of",
        )  # fmt: skip
    if not all(isinstance(value, Tensor) and value.ndim > 0 for value in args):
        kinds = [f"{type(value).__name__} {list(getattr(value, 'shape', ()))}" for value in args]
        raise InputError(
            "example inputs cannot be derived from these inputs", where="task.example_inputs", got=", ".join(kinds),
            expected="tensors, batch first", do="Pass example_inputs, or inputs_of that leaves out what is no tensor",
        )  # fmt: skip
    return tuple(value[:2] for value in args)


def _rests(model: nn.Module) -> bool:
    """Whether a model is in eval mode and without gradients."""
    return not any(part.training for part in model.modules()) and not any(
        parameter.requires_grad for parameter in model.parameters()
    )


def at_rest(model: nn.Module, *, copied: bool = False) -> nn.Module:
    """``model`` in eval mode and without gradients: itself where it is so, else (or if ``copied``) a copy.

    The user's own modules stay as they are. Raises InputError where it cannot be copied.
    """
    if _rests(model) and not copied:
        return model
    try:
        return copy.deepcopy(model).eval().requires_grad_(False)
    except (RuntimeError, ValueError) as error:  # torch.nn.utils.weight_norm and prune leave tensors that do not copy
        raise InputError(
            "the model cannot be copied", where="task.model", got=type_and_message(error),
            do="Run a lazy model on an example first; take masks of torch.nn.utils.prune off (prune.remove); use "
            "torch.nn.utils.parametrizations.weight_norm; detach other tensors that the model keeps",
        ) from error  # fmt: skip


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
        for batch in batches_of(loader, f"task.{name}"):
            return batch
    raise InputError("the loader is empty", where=f"task.{name}", got="no batch", expected="at least one batch")
