"""Look a task over before anything long: wrong types, empty loaders, NaN and wrong targets are found in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.check_batch import check_inputs, check_outputs, check_targets, metric_values
from tersor.core.check_types import SPLITS, check_types
from tersor.core.errors import InputError, TersorError, located, user_code
from tersor.core.eval_mode import eval_mode
from tersor.core.finite import expect_finite
from tersor.core.loading import batches_of
from tersor.core.randomness import fixed_randomness, seeded
from tersor.core.task import Batch, Task

BATCHES = 3  # of each loader
SEED = 0
_SHARED = (
    ("validation", "test", "decisions are taken on what the report measures"),
    ("train", "test", "the report measures on what was trained on"),
    ("train", "validation", "decisions are taken on what was trained on"),
)


def check_task(task: Task) -> tuple[str, ...]:
    """Check a completed task on the first batches of each loader; returns notes that the run should show.

    Nothing is changed: the random state, training flags, gradients and statistics stay as they were; a loader's own
    generator is seeded, as before every pass of Tersor's. Raises InputError.
    """
    check_types(task)
    _check_complete(task)
    _check_weights(task.model)
    seen: dict[int, list[Batch]] = {}
    for split in SPLITS:
        loader = getattr(task, split)
        if id(loader) not in seen:
            seen[id(loader)] = _first_batches(loader, split)
            with fixed_randomness(SEED):
                _check_split(task, split, seen[id(loader)])
    _check_example(task)
    _check_dtypes(task)
    train = seen[id(task.train)]
    with fixed_randomness(SEED):
        _check_loss(task, train[0])
    firsts = {split: seen[id(getattr(task, split))][0] for split in ("train", "validation", "test")}
    return (*_notes(task, train), *_shared(task, firsts))


def shared_data(task: Task) -> tuple[str, ...]:
    """What to say where two splits of a task begin with the same samples; a loader that shuffles may hide it.

    The first batch of each split is read; one that cannot be read is not compared.
    """
    firsts = {}
    for split in ("train", "validation", "test"):
        try:
            if getattr(task, split) is not None:
                firsts[split] = _first_batches(getattr(task, split), split, 1)[0]
        except TersorError:
            continue
    return tuple(_shared(task, firsts))


def _shared(task: Task, firsts: Mapping[str, Batch]) -> Iterator[str]:
    for one, other, harm in _SHARED:
        if one not in firsts or other not in firsts:
            continue
        if getattr(task, one) is getattr(task, other):
            yield f"{one} and {other} are the same data: {harm}"
        elif count := _same_samples(_tensors(task, firsts[one]), _tensors(task, firsts[other])):
            yield f"{one} and {other} are the same data, at least their first {count} samples: {harm}"


def _tensors(task: Task, batch: Batch) -> list[Tensor]:
    """The tensors of a batch's inputs and targets, batch first; none where it cannot be read."""
    try:
        with user_code("the batch cannot be read", where="task"):
            args, kwargs = task.inputs(batch)
            values = [*args, *kwargs.values(), task.targets(batch)]
    except TersorError:
        return []
    return [value for value in values if isinstance(value, Tensor) and value.ndim > 0]


def _same_samples(one: list[Tensor], other: list[Tensor]) -> int:
    """With how many of the same samples two batches begin, all that the shorter one has; 0: they differ.

    A single sample, and samples that are all alike, say nothing.
    """
    if not one or len(one) != len(other):
        return 0
    count = min(len(value) for value in (*one, *other))
    cut = [(a[:count], b[:count]) for a, b in zip(one, other, strict=True)]
    varied = any(bool((a != a[:1]).any()) for a, _ in cut)
    return count if varied and all(same(a, b) for a, b in cut) else 0


def _check_complete(task: Task) -> None:
    for name in (*SPLITS, "metric", "example_inputs"):
        if getattr(task, name) is None:
            raise InputError("the task is not completed", where=f"task.{name}", do="Call task.complete() first")


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            expect_finite(parameter, f"task.model, {name}", "the model's weights are not finite")


def _check_dtypes(task: Task) -> None:
    for name, parameter in task.model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise InputError(
                "the model is not in float32", where=f"task.model, {name}", got=parameter.dtype, expected=torch.float32,
                do="ONNX Runtime's CPU kernels need it: pass model.float(), with loaders of float32",
            )  # fmt: skip


def _check_example(task: Task) -> None:
    example = task.demand_example()
    for number, value in enumerate(example):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(
                "example inputs are not finite", where=f"task.example_inputs[{number}]", got="NaN or infinity"
            )
    shape = example[0].shape
    if len(shape) == 0 or shape[0] == 0:
        raise InputError("example inputs need a batch", where="task.example_inputs[0]", got=f"shape {list(shape)}")


def _first_batches(loader: Iterable[Batch], split: str, count: int = BATCHES) -> list[Batch]:
    with seeded(SEED, loader):
        batches = list(islice(batches_of(loader, f"task.{split}"), count))
    if not batches:
        raise InputError(
            "the loader is empty", where=f"task.{split}", got="no batch", expected="at least one batch",
            do="Fewer samples than one batch and drop_last=True give this too",
        )  # fmt: skip
    return batches


def _check_split(task: Task, split: str, batches: list[Batch]) -> None:
    for number, batch in enumerate(batches):
        where = f"task.{split}, batch {number}"
        check_inputs(task, batch, where)
        targets = task.targets(batch)
        if number == 0:
            shape = _check_forward(task, batch, where)
        check_targets(task, shape, targets, where)


def _check_forward(task: Task, batch: Batch, where: str) -> torch.Size:
    do = "Check shapes and dtypes, and that model and batches are on the same device"
    with user_code("the model does not run on this batch", where=where, do=do):
        with torch.no_grad(), eval_mode(task.model) as model:
            outputs = task.outputs(model, batch)
    targets = task.targets(batch)
    check_outputs(outputs, len(targets), where)
    check_targets(task, outputs.shape, targets, where)
    metric_values(task, outputs, targets, where)
    return outputs.shape


def _check_loss(task: Task, batch: Batch) -> None:
    where = "task.loss on batch 0 of task.train"
    with user_code("the loss cannot be computed", where=where), located(where):
        with torch.enable_grad(), eval_mode(task.model) as model:
            loss: Any = task.loss_of(model, batch)
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
    if not same(train_batches[:2], _first_batches(task.demand_loader("train"), "train")[:2]):
        notes.append(
            "the train loader has randomness of its own (with torch, numpy, random and its own generator seeded alike "
            "it gives other batches, as a generator within the dataset does): a resumed run may end with other weights"
        )
    return notes


def same(a: Any, b: Any) -> bool:
    """Whether two batches hold the same tensors and numbers; objects of other kinds are taken as the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b if isinstance(a, (int, float, str)) else True
