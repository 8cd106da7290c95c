"""Both models over the data once: what each answers to each sample, in order; everything else is a function of that."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.core.check_batch import (
    check_outputs,
    check_targets,
    metric_values,
    out_of_range,
    predicts_classes,
    repeats_input,
)
from tersor.core.errors import InputError, located, user_code
from tersor.core.loading import batches_of
from tersor.core.metric import IGNORED
from tersor.core.progress import Progress
from tersor.core.randomness import seeded
from tersor.core.task import Arguments, Batch, Split
from tersor.measure.behaviour.data import EvaluationData, Groups
from tersor.measure.behaviour.inputs import Change, Reach, Worst, first_input
from tersor.measure.behaviour.scores import Part, Scores, are_probabilities, joined, reduce_scores
from tersor.measure.runnable import Runnable

Kind = Literal["classes", "tokens", "numbers"]
Floats = NDArray[np.float64]
_KEPT = 2**25  # logits that are kept of each model, for what needs them all (temperature scaling)
SEED = 0


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model answered: the metric of each sample [n] (None: no targets), and its class scores.

    Of models that predict numbers there are no scores; ``error`` is each sample's mean squared error then, [n].
    """

    name: str
    values: Floats | None
    scores: Scores | None
    error: Floats | None = None


@dataclass(frozen=True, eq=False)
class Collected:
    """Both models' answers to the same samples in the same order.

    ``kind``: class scores of samples, of positions in them (tokens), or numbers. ``targets`` int64 [rows]: of class
    scores; ``sample`` int64 [rows]: which sample each row belongs to; ``groups``: attribute → [n], None where missing.
    ``divergence`` [rows]: KL(original ‖ compressed). Of numbers: ``difference`` [n], mean squared between the models,
    and ``product`` [n], mean product of their errors. ``reach``: what the first input spans; ``worst``: the samples
    that changed most, with their inputs. ``seconds``: how long it took.
    """

    kind: Kind
    original: Answers
    compressed: Answers
    n: int
    classes: int = 0
    targets: NDArray[np.int64] | None = None
    sample: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    groups: Groups = field(default_factory=dict)
    divergence: Floats = field(default_factory=lambda: np.empty(0))
    difference: Floats = field(default_factory=lambda: np.empty(0))
    product: Floats | None = None
    reach: Reach | None = None
    worst: Worst = field(default_factory=lambda: Worst(0))
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def both(self) -> tuple[Answers, Answers]:
        """The original's and the compressed model's answers."""
        return self.original, self.compressed


def collect(
    original: Runnable,
    compressed: Runnable,
    data: EvaluationData,
    *,
    split: Split = "test",
    change: Change | None = None,
    limit: int | None = None,
    shown: int = 0,
    progress: Progress | None = None,
) -> Collected:
    """Run both models over a split of the data: each batch is read once and given to both.

    ``change``: the inputs are changed first, for both alike. ``limit``: only so many samples. ``shown``: so many of the
    samples that changed most are kept with their inputs. Raises InputError for data that cannot be read or run, outputs
    of different shapes and targets out of range; VerificationError for outputs that are not finite.
    """
    loader = data.loader(split)
    start = time.perf_counter()
    reader = _Reader(original, compressed, data, change, shown)
    batches = batches_of(loader, f"task.{split}")
    total = len(loader) if isinstance(loader, Sized) else None
    with seeded(SEED, loader), original.at_work(), compressed.at_work():
        for number, batch in enumerate((progress or Progress()).track(batches, _said(split, change), total)):
            left = None if limit is None else limit - reader.n
            reader.read(batch, number, f"task.{split}, batch {number}", left)
            if reader.n == limit:
                break
    if reader.n == 0:
        raise InputError(
            "there is nothing to evaluate", where=f"task.{split}", got="no sample", expected="at least one sample"
        )
    return reader.collected(time.perf_counter() - start)


def _said(split: str, change: Change | None) -> str:
    return f"both models on {split}" + ("" if change is None else f", {change}")


class _Reader:
    """What has been read so far."""

    def __init__(
        self, original: Runnable, compressed: Runnable, data: EvaluationData, change: Change | None, shown: int
    ):
        self._models, self._data, self._change = (original, compressed), data, change
        self._kind: Kind | None = None
        self._classes = 0
        self._probabilities = (False, False)
        self._parts: list[Part] = []
        self._arrays: dict[str, list[NDArray[Any]]] = {}
        self._groups: dict[str, list[NDArray[np.object_]]] = {}
        self._reach: Reach | None = None
        self._worst = Worst(shown)
        self._kept = 0
        self._notes: list[str] = []
        self._echoed = True
        self.n = 0

    def read(self, batch: Batch, number: int, where: str, left: int | None) -> None:
        data = self._data
        task = data.based
        targets = self._targets(batch, where)
        with user_code("the inputs cannot be read", where=where):
            given = first_input(*task.inputs(batch))
        outputs = [self._outputs(model, batch, targets, number, where) for model in self._models]
        length = len(outputs[0])
        for model, output in zip(self._models, outputs, strict=True):
            with located(model.name):
                check_outputs(output, length if targets is None else len(targets), where)
        self._expect_alike(outputs, where)
        if targets is not None:
            check_targets(task, outputs[0].shape, targets, where)
            self._echoed &= repeats_input(given, targets)
        keep = length if left is None else min(length, left)
        groups = data.groups(batch, length, where)
        self._put_groups({name: values[:keep] for name, values in groups.items()}, where)
        if targets is not None:
            for name, output in zip(("original", "compressed"), outputs, strict=True):
                self._put(f"values {name}", metric_values(task, output, targets, where)[:keep].numpy())
        cut = None if targets is None else targets[:keep]
        severity = self._reduce(outputs[0][:keep], outputs[1][:keep], cut, where)
        if given is not None:
            self._reach = Reach.of(given).joined(self._reach)
            self._worst.offer(severity, self.n, given[:keep])
        self.n += keep

    def _targets(self, batch: Batch, where: str) -> Tensor | None:
        if not self._data.labelled:
            return None
        with user_code("the targets cannot be read", where=where):
            return self._data.based.targets(batch).cpu()

    def _outputs(self, model: Runnable, batch: Batch, targets: Tensor | None, number: int, where: str) -> Tensor:
        change = self._change

        def changed(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
            return (args, kwargs) if change is None else change.of(args, kwargs, targets, number)

        with user_code("the model does not run on this batch", where=f"{where}, {model.name}"):
            return model.outputs(self._data.based, batch, changed).detach()

    def _expect_alike(self, outputs: list[Tensor], where: str) -> None:
        one, other = (list(output.shape) for output in outputs)
        if one != other:
            names = [model.name for model in self._models]
            raise InputError(
                "the models' outputs differ in shape", where=where, got=f"{names[1]} gives {other}",
                expected=f"{one}, as {names[0]} gives", do="Compare models of the same classes and the same inputs",
            )  # fmt: skip

    def _reduce(self, one: Tensor, other: Tensor, targets: Tensor | None, where: str) -> Floats:
        """Keep what the batch says; how much each of its samples changed, −∞ where it shall not be shown."""
        if self._kind is None:
            self._begin(one, other, targets)
        if self._kind == "numbers":
            return self._reduce_numbers(one, other, targets)
        return self._reduce_scores(one, other, targets, where)

    def _begin(self, one: Tensor, other: Tensor, targets: Tensor | None) -> None:
        self._kind = kind_of(one, targets)
        if self._kind == "numbers":
            return
        self._classes = one.shape[-1]
        flat = (one.flatten(0, -2), other.flatten(0, -2))
        self._probabilities = are_probabilities(flat[0]), are_probabilities(flat[1])
        for model, found in zip(self._models, self._probabilities, strict=True):
            if found:
                self._notes.append(f"{model.name} gives probabilities: their logarithms are taken for logits")
        if targets is None:
            self._notes.append("the data have no targets: the outputs are read as class scores")

    def _reduce_scores(self, one: Tensor, other: Tensor, targets: Tensor | None, where: str) -> Floats:
        n, count = len(one), one.shape[-1]
        sample = torch.arange(n)[:, None].expand(n, one[..., 0].numel() // n).flatten()
        rows = [scores.reshape(-1, count) for scores in (one, other)]
        wanted = None if targets is None else targets.reshape(-1).long()
        if wanted is not None and self._kind == "tokens":
            real = wanted != IGNORED
            rows, sample, wanted = [scores[real] for scores in rows], sample[real], wanted[real]
        if wanted is not None and bool(out_of_range(wanted, count).any()):
            raise InputError(
                "the targets are no class indices, and in batches before they were", where=where,
                got=f"{int(wanted.min())} to {int(wanted.max())}", expected=f"0 to {count - 1}",
            )  # fmt: skip
        part = reduce_scores(rows[0], rows[1], wanted, max(0, _KEPT // count - self._kept), self._probabilities)
        self._kept += len(part.original.logits)
        self._parts.append(part)
        self._put("sample", sample.numpy() + self.n)
        if wanted is not None:
            self._put("targets", wanted.numpy())
        return _severity(part, sample.numpy(), n, None if wanted is None else wanted.numpy(), self._kind == "tokens")

    def _reduce_numbers(self, one: Tensor, other: Tensor, targets: Tensor | None) -> Floats:
        first, second = (value.double().reshape(len(one), -1) for value in (one, other))
        difference = (first - second).square().mean(dim=1).numpy()
        self._put("difference", difference)
        if targets is None:
            return difference
        wanted = targets.double().reshape(len(one), -1)
        if wanted.shape != first.shape:  # a metric of the user's own makes something of them
            return difference
        errors = first - wanted, second - wanted
        squares = [error.square().mean(dim=1).numpy() for error in errors]
        self._put("error original", squares[0])
        self._put("error compressed", squares[1])
        self._put("product", (errors[0] * errors[1]).mean(dim=1).numpy())
        return squares[1] - squares[0]

    def _put(self, name: str, array: NDArray[Any]) -> None:
        self._arrays.setdefault(name, []).append(array)

    def _put_groups(self, groups: Mapping[str, NDArray[np.object_]], where: str) -> None:
        if self.n and set(groups) != set(self._groups):
            raise InputError(
                "groups_of gives other attributes than before", where=where, got=sorted(groups),
                expected=sorted(self._groups),
            )  # fmt: skip
        for name, values in groups.items():
            self._groups.setdefault(name, []).append(values)

    def collected(self, seconds: float) -> Collected:
        """All of it, joined."""
        assert self._kind is not None
        if self._parts and not any(len(part.divergence) for part in self._parts):
            raise InputError(
                "there is nothing to evaluate", where="targets", got=f"{IGNORED} at every position of {self.n} samples",
                expected="at least one position with a target",
            )  # fmt: skip
        if self._kind == "tokens" and self._data.labelled and self._echoed:
            self._notes.append(_ECHO)
        arrays = {name: np.concatenate(parts) for name, parts in self._arrays.items()}
        return Collected(
            self._kind, self._answers("original", arrays), self._answers("compressed", arrays), self.n, self._classes,
            arrays.get("targets"), arrays.get("sample", np.arange(self.n)),
            {name: np.concatenate(parts) for name, parts in self._groups.items()},
            np.concatenate([part.divergence for part in self._parts]) if self._parts else np.empty(0),
            arrays.get("difference", np.empty(0)), arrays.get("product"), self._reach, self._worst, seconds,
            tuple(self._notes),
        )  # fmt: skip

    def _answers(self, which: Literal["original", "compressed"], arrays: Mapping[str, NDArray[Any]]) -> Answers:
        own = [part.original if which == "original" else part.compressed for part in self._parts]
        name = self._models[0 if which == "original" else 1].name
        scores = joined(own) if own else None
        return Answers(name, arrays.get(f"values {which}"), scores, arrays.get(f"error {which}"))


_ECHO = (
    "each position's target is the token that stands there in the input: of a model that predicts the next token shift "
    "the targets by one (Task(targets_of=…)), or its accuracy and perplexity say nothing"
)


def kind_of(outputs: Tensor, targets: Tensor | None) -> Kind:
    """What outputs are about: class scores of samples [n, classes], of positions [n, …, classes], or numbers."""
    scores = outputs.ndim > 1 and outputs.shape[-1] > 1
    if targets is None:
        return ("classes" if outputs.ndim == 2 else "tokens") if scores else "numbers"
    if not (scores and predicts_classes(outputs.shape, targets)):
        return "numbers"
    if bool(out_of_range(targets, outputs.shape[-1]).any()):
        return "numbers"  # a metric of the user's own makes something of them
    return "classes" if targets.ndim == 1 else "tokens"


def _severity(
    part: Part, sample: NDArray[np.int64], n: int, targets: NDArray[np.int64] | None, positions: bool
) -> Floats:
    """How much worse each sample became: the target's lost probability where right turned wrong, else −∞.

    Of positions the mean rise of the loss; without targets the divergence where the classes differ.
    """
    one, other = part.original, part.compressed
    if positions:
        rise = part.divergence if one.loss is None or other.loss is None else other.loss - one.loss
        counted = np.bincount(sample, minlength=n)
        mean = np.bincount(sample, rise, minlength=n) / np.maximum(counted, 1)
        return np.where(counted > 0, mean, -np.inf)
    if targets is None:
        return np.where(one.classes != other.classes, part.divergence, -np.inf)
    turned = (one.classes == targets) & (other.classes != targets)
    return np.where(turned, one.likelihood - other.likelihood, -np.inf)
