"""What training makes small: objectives, and the weighted sums of them."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Real
from typing import Any, final
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tersor.core.check_batch import repeats_input
from tersor.core.errors import InputError, TersorError, user_code
from tersor.core.keyed import Keyed, plain
from tersor.core.metric import IGNORED
from tersor.core.task import TARGET_KEYS, Batch, Task, default_loss
from tersor.train.companion import Companion
from tersor.train.layers import LayerPair, Reading, resolve
from tersor.train.taps import Tap, sole, tapped
from tersor.train.teacher import Answer, run_teacher

_LOOKED_AT: WeakSet[Task] = WeakSet()


class Forward:
    """One batch's way through the model, and through the reference: each runs at most once, when it is first asked for.

    Objectives that are summed share it. Where the task has a loss of its own, that loss runs the model; the outputs are
    then what it saw, provided that it called the model with the batch's own inputs (and labels, where it gives
    ``.logits``). For a batch without labels, which may be missing where nothing asks for the loss, it is left alone.
    """

    def __init__(self, model: nn.Module, batch: Batch, task: Task, reads: Sequence[Reading] = ()):
        self.model, self.batch, self.task = model, plain(batch), task
        self.keyed = batch if isinstance(batch, Keyed) else None
        self.reads = tuple(reads)
        self._calls: list[_Call] = []

    @property
    def student(self) -> nn.Module:
        """The model, free of what wraps it where several processes train."""
        model = self.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    @property
    def targets(self) -> Tensor:
        """The batch's targets. Raises InputError where it has none."""
        if self.labels is None:
            keys = sorted(map(str, self.batch)) if isinstance(self.batch, Mapping) else None
            got = "inputs by themselves, or None for targets" if keys is None else f"a dict with keys {keys}"
            raise InputError(
                "the batch has no labels", where="task.targets_of", got=got, expected="targets, which this loss needs",
                do="Learn from the teacher alone (SoftTargets(), Distill(alpha=1)), or bring labels",
            )  # fmt: skip
        return self.labels

    @cached_property
    def labels(self) -> Tensor | None:
        """The batch's targets; None where it has none."""
        return self.task.targets(self.batch) if self.task.brings_targets(self.batch) else None

    @property
    def outputs(self) -> Tensor:
        """The model's output tensor, with its gradient."""
        return self._pass[0]

    @cached_property
    def _pass(self) -> tuple[Tensor, dict[Tap, list[Tensor]]]:
        """The model's output, and what passed its taps on the way."""
        if self.task.loss is not None and self.labels is not None:
            _ = self.task_loss
            meant = self._bound(*self.task.inputs(self.batch, self.model))
            for call in self._calls:
                if self._is(call, meant):
                    return self.task.output(call.result), call.seen
        with tapped(self.student, self._taps[0]) as seen:
            return self.task.outputs(self.model, self.batch), seen.take()

    def _is(self, call: _Call, meant: Mapping[str, Any]) -> bool:
        """Whether a call of the model was with the inputs ``meant``. Labels beside them count for nothing where the
        result says which of it are logits: so transformers' models compute both in one pass."""
        if _same_objects(self._bound(call.args, call.kwargs), meant):
            return True
        given = call.result.get("logits") if isinstance(call.result, Mapping) else None
        others = {name: value for name, value in call.kwargs.items() if name not in TARGET_KEYS}
        return isinstance(given, Tensor) and _same_objects(self._bound(call.args, others), meant)

    def expect_labels_of_their_own(self) -> None:
        """Raise InputError where each position's label is the token that stands there in the input: a model would learn
        to copy. Looked at in a task's first batch of more than one label alone: labels that are all the same may be a
        mask among the inputs, or the one masked token, which is left as it was now and then."""
        if self.task in _LOOKED_AT:
            return
        counted = self.targets[self.targets != IGNORED]
        if not bool((counted[1:] != counted[:1]).any()):
            return
        args, kwargs = self.task.inputs(self.batch, self.model)
        tokens = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1]
        if any(repeats_input(given, self.targets) for given in tokens if not given.is_floating_point()):
            raise InputError(
                "each position's label is the token that stands there in the input", where="task.targets_of",
                got=f"labels {list(self.targets.shape)} that repeat the input", expected="what the model is to say",
                do="For the next token: targets_of=lambda batch: F.pad(batch['labels'][:, 1:], (0, 1), value=-100); "
                "a model that is to copy, as an autoencoder, takes a loss of its own, Task(loss=), and SoftTargets()",
            )  # fmt: skip
        _LOOKED_AT.add(self.task)

    @cached_property
    def task_loss(self) -> Tensor:
        """The task's own loss: []."""
        if self.task.loss is None:
            self.expect_labels_of_their_own()
            return default_loss(self.outputs, self.targets)
        with tapped(self.student, self._taps[0]) as seen:

            def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
                self._calls.append(_Call(args, kwargs, result, seen.take()))

            hook = self.model.register_forward_hook(remember, with_kwargs=True)
            try:
                return self.task.loss(self.model, self.batch)
            finally:
                hook.remove()

    @cached_property
    def _pairs(self) -> dict[Reading, tuple[tuple[Tap, Tap], ...]]:
        return {reading: resolve(reading, self.student, self._reference) for reading in self.reads}

    @cached_property
    def _taps(self) -> tuple[tuple[Tap, ...], tuple[Tap, ...]]:
        """The student's and the teacher's, each once."""
        pairs = [pair for found in self._pairs.values() for pair in found] if self.reads else []
        return tuple(dict.fromkeys(ours for ours, _ in pairs)), tuple(dict.fromkeys(theirs for _, theirs in pairs))

    def pairs(self, reading: Reading) -> list[LayerPair]:
        """What the pairs of layers that ``reading`` means gave. Raises InputError where it was not said beforehand."""
        if reading not in self.reads:
            raise InputError(
                "the forward pass was not told which layers are read", where=str(reading.pairs),
                do="Call the objective, or make Forward(model, batch, task, objective.reads())",
            )  # fmt: skip
        ours, theirs = self._ours, self._answer.layers
        return [LayerPair((s.path, t.path), ours[s], theirs[str(t)]) for s, t in self._pairs[reading]]

    @cached_property
    def _ours(self) -> dict[Tap, Tensor]:
        return sole(self._pass[1], "student")

    @cached_property
    def attention_mask(self) -> Tensor | None:
        """bool [batch, length], False at padding: the input ``attention_mask``, where the model has one."""
        args, kwargs = self.task.inputs(self.batch, self.model)
        mask = self._bound(args, kwargs).get("attention_mask", kwargs.get("attention_mask"))
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def counted(self, positions: torch.Size, layer: str = "") -> Tensor | None:
        """bool ``positions`` [batch, length], False at padding; None where nothing says what is padding.

        Where a model has encoder and decoder, the mask is the encoder's: it counts for layers named so alone.
        """
        two = "decoder_input_ids" in inspect.signature(self.task.model.forward).parameters
        mask = None if two and "encoder" not in layer.split(".") else self.attention_mask
        return mask if mask is not None and mask.shape == positions else None

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Arguments by the names that the task's model has for them, however they were passed."""
        try:
            return inspect.signature(self.task.model.forward).bind(*args, **kwargs).arguments
        except TypeError:  # a model with other arguments
            return {"args": args, "kwargs": kwargs}

    @cached_property
    def reference_outputs(self) -> Tensor:
        """What ``task.reference`` gives for the batch, in eval mode and without a gradient."""
        return self._answer.outputs

    @cached_property
    def _answer(self) -> Answer:
        """The teacher's answer to the batch: from where a keyed batch says, else by a forward pass.

        Raises InputError where there is no reference, or where its output is not finite.
        """
        reference = self._reference
        ask = partial(run_teacher, reference, output=self.task.output, taps=self._taps[1])
        inputs = self.task.inputs(self.batch, reference)
        if self.keyed is not None and self.keyed.answers is not None:
            return self.keyed.answers.answer(self.keyed, inputs, tuple(map(str, self._taps[1])), ask)
        return ask(inputs)

    @property
    def _reference(self) -> nn.Module:
        if self.task.reference is None:
            raise InputError(
                "there is no teacher", where="task.reference", got="None", expected="a model",
                do="Pass reference= to Task, or call task.complete(): it takes the model given",
            )  # fmt: skip
        return self.task.reference


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of the model: what went in, what came out, and what passed its taps."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    seen: dict[Tap, list[Tensor]]


def _same_objects(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same_objects, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same_objects(a[key], b[key]) for key in a)
    return a is b


class Objective(ABC):
    """(model, batch, task) → a scalar to make small. Subclasses are frozen dataclasses that write ``of``.

    ``0.3 * TaskLoss() + 0.7 * SoftTargets()`` is an objective too; its parts share one forward pass.
    """

    @final
    def __call__(self, model: nn.Module, batch: Batch, task: Task) -> Tensor:
        """The objective of one batch: a tensor of shape [] with a gradient."""
        return self.of(Forward(model, batch, task, self.reads()))

    @abstractmethod
    def of(self, forward: Forward) -> Tensor:
        """The objective, read off one forward pass: []."""

    def reads(self) -> tuple[Reading, ...]:
        """The pairs of layers that it reads beside the outputs; none unless a subclass says so."""
        return ()

    def companions(self) -> tuple[Companion, ...]:
        """What goes along with the training: it puts on the model what the objective needs there; none by default."""
        return ()

    def weights(self, model: nn.Module) -> Mapping[str, float]:
        """Weights that training changes, by name, as they stand on ``model``; none by default."""
        return {}

    def review(self, model: nn.Module, task: Task, history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """What a finished training shows of known failures: JSON values, ``warnings`` among them; {} by default."""
        return {}

    def __mul__(self, weight: float) -> Sum:
        if not isinstance(weight, Real):
            return NotImplemented
        return Sum(tuple((weight * w, part) for w, part in terms_of(self)))

    __rmul__ = __mul__

    def __add__(self, other: Objective) -> Sum:
        if not isinstance(other, Objective):
            return NotImplemented
        return Sum(terms_of(self) + terms_of(other))

    def __radd__(self, other: int) -> Objective:
        return self if other == 0 else NotImplemented  # so that sum([…]) works


@final
@dataclass(frozen=True)
class TaskLoss(Objective):
    """The task's own loss."""

    def of(self, forward: Forward) -> Tensor:
        """The loss of one forward pass: []."""
        return forward.task_loss


@final
@dataclass(frozen=True)
class Sum(Objective):
    """Σ weight · objective over ``terms``, pairs of (weight, objective); a term of weight 0 is not computed.

    Raises InputError for a weight that is negative or infinite, and, when it is used, where all of them are zero.
    """

    terms: tuple[tuple[float, Objective], ...]

    def __post_init__(self) -> None:
        for weight, part in self.terms:
            if not 0 <= weight < math.inf:
                raise InputError("a weight must be finite, and 0 or more", where=f"{weight} * {part}", got=weight)
        if not self.terms:
            raise InputError("a sum needs at least one objective", where="Sum")

    def of(self, forward: Forward) -> Tensor:
        """The weighted sum for one forward pass: []."""
        first, *rest = (weight * part.of(forward) for weight, part in self.counting)
        return sum(rest, start=first)

    def reads(self) -> tuple[Reading, ...]:
        """What its terms read, each once."""
        return tuple(dict.fromkeys(reading for _, part in self.counting for reading in part.reads()))

    def companions(self) -> tuple[Companion, ...]:
        """Its terms', each once."""
        found: list[Companion] = []
        for _, part in self.counting:
            found += [companion for companion in part.companions() if companion not in found]
        return tuple(found)

    def weights(self, model: nn.Module) -> Mapping[str, float]:
        """Its terms'."""
        return {name: value for _, part in self.counting for name, value in part.weights(model).items()}

    def review(self, model: nn.Module, task: Task, history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """That of the first term that has one."""
        reviews = (part.review(model, task, history) for _, part in self.counting)
        return next(filter(None, reviews), {})

    @property
    def counting(self) -> tuple[tuple[float, Objective], ...]:
        """The terms whose weight is not 0. Raises InputError where there is none."""
        found = tuple((weight, part) for weight, part in self.terms if weight > 0)
        if not found:
            raise InputError(
                "all weights are zero", where=" + ".join(f"{weight} * {part}" for weight, part in self.terms),
                expected="a weight above 0",
            )  # fmt: skip
        return found


def review_of(
    objective: Objective, model: nn.Module, task: Task, history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What ``objective.review`` says; where it fails, a warning that says so: the training that it is about is done."""
    try:
        with user_code("the review fails", where="review"):
            return dict(objective.review(model, task, history))
    except TersorError as error:
        return {"warnings": [f"What this training shows of known failures could not be found out: {error}"]}


def terms_of(objective: Objective) -> tuple[tuple[float, Objective], ...]:
    """The terms of a sum; of any other objective itself, with weight 1."""
    return objective.terms if isinstance(objective, Sum) else ((1.0, objective),)


def term_names(terms: Sequence[tuple[float, Objective]]) -> list[str]:
    """Each term by its class, numbered where there are several of one."""
    names: list[str] = []
    for _, part in terms:
        kind = type(part).__name__
        again = sum(name.split(" ")[0] == kind for name in names)
        names.append(f"{kind} {again + 1}" if again else kind)
    return names
