"""Several teachers as one: each with its own inputs, output, weight and classes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType, FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError, user_code
from tersor.core.in_type import in_type_of
from tersor.core.task import at_rest, by_name, output_tensor
from tersor.train.teacher import Reference, expect_finite_answer

_SURE = 1e-3  # the least confidence: a teacher that knows nothing does not leave its own classes without a probability


@dataclass(frozen=True, eq=False)
class Teacher:
    """One of several teachers.

    Args:
        model: the trained model.
        weight: how much it counts beside the others, at least 0.
        classes: what each of its outputs means: ``classes[j]`` is the class, among all, of its output j. None: they are
            the classes, in order.
        transform: from the inputs of the task to the model's: returns a tensor, a tuple of positional arguments, or a
            dict of keyword arguments. None: the same inputs (of a dict those that its forward names).
        output: from what the model returns to the tensor that counts. None: the tensor itself, ``.logits``, or the
            first of a tuple.
        name: by which errors and layers name it; None: its position.
    """

    model: nn.Module
    weight: float = 1.0
    classes: tuple[int, ...] | None = None
    transform: Callable[..., Any] | None = None
    output: Callable[[Any], Tensor] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise InputError("no torch.nn.Module", where="Teacher.model", got=type(self.model).__name__)
        check_fields(self)
        if not 0 <= self.weight < math.inf:
            raise InputError("no weight", where="Teacher.weight", got=self.weight, expected="a finite number from 0")
        if self.name is not None and (not self.name or "." in self.name or self.name in dir(nn.ModuleDict)):
            raise InputError(
                "no name for a module", where="Teacher.name", got=repr(self.name),
                expected="letters that are no attribute of torch.nn.Module, without dots",
            )  # fmt: skip
        given = self.classes or ()
        if self.classes is not None and (not given or min(given) < 0 or len(set(given)) < len(given)):
            raise InputError("no classes", where="Teacher.classes", got=given, expected="different numbers from 0")


class _Given(NamedTuple):
    """What a teacher gave to a batch."""

    name: str
    one: Teacher
    z: Tensor


class Teachers(Reference):
    """Any number of teachers as one, for ``Task(reference=Teachers([…]))``. Gives logits, or values, z [batch, …].

    With z_k the output of teacher k, p_k = softmax(z_k), w_k its weight, and sums over the teachers that know a class:

    * ``combine="logits"``: z = Σ w_k z_k / Σ w_k, the geometric mean of their distributions, at every temperature;
      regression too.
    * ``combine="probabilities"``: z = log(Σ w_k p_k / Σ w_k), the arithmetic mean.
    * ``combine="confidence"``: the same with w_k c_k, where c_k = 1 − H(p_k) / log(classes of k), for each sample (and
      position) anew: who is sure counts more. With teachers of different groups of classes, the group whose teacher is
      surer has more of the mass.

    Args:
        teachers: ``Teacher`` or plain models.
        combine: as above.
        axis: the axis of classes.

    The models run in eval mode and without gradients, whatever is done to this module; one that is in training mode or
    has gradients is copied. Floats come to each in the type of its parameters (bfloat16, say). Layers are named by the
    teacher: ``teachers.0.layer3``, or by its name.

    Raises InputError for no teachers, weights that are all 0, names twice, and classes that nobody knows; when it runs,
    where a teacher fails, its output is not finite, or its outputs do not fit its classes or those of the others.

    Sources: You, Xu, Xu, Tao 2017, *Learning from multiple teacher networks*, section 3.1 (the mean of probabilities);
    Kwon et al. 2020, *Adaptive knowledge distillation based on entropy*, section 2.2 (weights from the entropy).
    """

    def __init__(
        self,
        teachers: Sequence[Teacher | nn.Module],
        combine: Literal["logits", "probabilities", "confidence"] = "logits",
        axis: int = -1,
    ):
        super().__init__()
        given = [one if isinstance(one, Teacher) else Teacher(one) for one in teachers]
        if combine not in ("logits", "probabilities", "confidence"):
            raise InputError(
                "unknown", where="Teachers.combine", got=repr(combine), expected="logits, probabilities or confidence"
            )
        if not given or not any(one.weight for one in given):
            got = "none" if not given else f"{len(given)}, all of weight 0"
            raise InputError("no teacher that counts", where="Teachers", got=got, expected="a weight above 0")
        names = [one.name or str(number) for number, one in enumerate(given)]
        if len(set(names)) < len(names):
            raise InputError("a name twice", where="Teachers", got=names, expected="a name for each")
        self.combine, self.axis = combine, axis
        self.settings = dict(zip(names, given, strict=True))
        self.named = _named_classes(given)
        self.teachers = nn.ModuleDict({name: at_rest(one.model) for name, one in self.settings.items()})
        self.train(False)

    def train(self, mode: bool = True) -> Teachers:
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The teachers' common output for the task's inputs."""
        found: list[_Given] = []
        for name, one in self.settings.items():
            if one.weight:
                with user_code("the teacher fails", where=f"teacher {name}"):
                    found.append(_Given(name, one, (one.output or output_tensor)(self._run(name, one, args, kwargs))))
        count = self._fit(found)
        z = self._mean(found, count) if self.combine == "logits" else self._mixture(found, count)
        if z.device.type == "cpu" and not bool(torch.isfinite(z).all()):
            for given in found:
                expect_finite_answer(given.z, f"teacher {given.name}")
        return z

    def _run(self, name: str, one: Teacher, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        model = self.teachers[name]
        if one.transform is None:
            inputs = (by_name(kwargs, model.forward) if kwargs and not args else None) or (args, kwargs)
        else:
            given = one.transform(*args, **kwargs)
            positional = given if isinstance(given, tuple) else (given,)
            inputs = ((), given) if isinstance(given, Mapping) else (positional, {})
        args, kwargs = in_type_of(model, inputs)
        return model(*args, **kwargs)

    def _fit(self, found: Sequence[_Given]) -> int:
        """How many classes there are. Raises InputError where the outputs do not fit each other, or their classes."""
        whole = next((given.z.shape[self.axis] for given in found if given.one.classes is None), None)
        count = self.named if whole is None else whole
        for given in found:
            classes, got = given.one.classes, given.z.shape[self.axis]
            expected = count if classes is None else len(classes)
            if got != expected or max(classes or (0,)) >= count:
                raise InputError(
                    "the teacher's outputs are not its classes", where=f"teacher {given.name}",
                    got=f"{got} outputs, classes {'not given' if classes is None else list(classes)}",
                    expected=f"{expected} outputs, classes below {count}", do="Say which with Teacher(classes=…)",
                )  # fmt: skip
            first = found[0]
            if _without(given.z, self.axis) != _without(first.z, self.axis):
                raise InputError(
                    "the teachers give outputs of different shapes", where=f"teacher {given.name}",
                    got=f"{list(given.z.shape)} beside {list(first.z.shape)} of teacher {first.name}",
                    expected="the same but for the classes", do="Say with Teacher(output=…) how they meet",
                )  # fmt: skip
        return count

    def _mean(self, found: Sequence[_Given], count: int) -> Tensor:
        """Σ w_k z_k / Σ w_k over the teachers that know a class."""
        z = [given.one.weight * self._among_all(given, given.z.float(), 0.0, count) for given in found]
        w = [given.one.weight * self._among_all(given, torch.ones_like(given.z).float(), 0.0, count) for given in found]
        return torch.stack(z).sum(dim=0) / torch.stack(w).sum(dim=0)

    def _mixture(self, found: Sequence[_Given], count: int) -> Tensor:
        """log Σ a_k p_k / Σ a_k, where a class that teacher k does not know has p_k = 0."""
        log_p = [given.z.float().log_softmax(dim=self.axis) for given in found]
        log_a = [self._log_weight(given.one, log) for given, log in zip(found, log_p, strict=True)]
        parts = [
            self._among_all(given, log + weight, -math.inf, count)
            for given, log, weight in zip(found, log_p, log_a, strict=True)
        ]
        return torch.stack(parts).logsumexp(dim=0) - torch.stack(log_a).logsumexp(dim=0)

    def _log_weight(self, one: Teacher, log_p: Tensor) -> Tensor:
        """log a_k, with 1 at the axis of classes."""
        entropy = -(log_p.exp() * log_p).sum(dim=self.axis, keepdim=True)
        if self.combine == "probabilities":
            return torch.full_like(entropy, math.log(one.weight))
        most = math.log(max(2, log_p.shape[self.axis]))
        return (one.weight * (1 - entropy / most).clamp_min(_SURE)).log()

    def _among_all(self, given: _Given, values: Tensor, elsewhere: float, count: int) -> Tensor:
        """A teacher's values at its classes, ``elsewhere`` at the others."""
        if given.one.classes is None:
            return values
        shape = list(values.shape)
        shape[self.axis] = count
        index = torch.tensor(given.one.classes, device=values.device)
        return values.new_full(shape, elsewhere).index_copy(self.axis, index, values)

    def extra_repr(self) -> str:
        lines = [f"combine={self.combine!r}, axis={self.axis}"]
        for name, one in self.settings.items():
            how = f"transform={identity(one.transform)}, output={identity(one.output)}"
            lines.append(f"{name}: weight={one.weight}, classes={one.classes}, {how}")
        return "\n".join(lines)


def _without(z: Tensor, axis: int) -> list[int]:
    shape = list(z.shape)
    del shape[axis]
    return shape


def _named_classes(teachers: Sequence[Teacher]) -> int:
    """How many classes those name that name them. Raises InputError where nobody knows one of them."""
    counted = [one.classes for one in teachers if one.weight]
    known = {number for classes in counted for number in classes or ()}
    count = 1 + max(known, default=-1)
    missing = sorted(set(range(count)) - known)
    if missing and None not in counted:
        raise InputError(
            "classes that no teacher knows",
            where="Teachers",
            got=missing,
            expected=f"each of 0 … {count - 1} somewhere",
        )
    return count


def identity(function: Callable[..., Any] | None) -> str:
    """What tells a function from others, the same in every process: its name and a checksum of its code and constants;
    of what it closes over, numbers and names."""
    if function is None or isinstance(function, type):
        return str(function)
    if isinstance(function, partial):
        return f"partial({identity(function.func)}, {function.args!r}, {function.keywords!r})"
    if isinstance(function, FunctionType):
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        plain = [value if isinstance(value, (int, float, str)) else type(value).__name__ for value in held]
        code = zlib.crc32(f"{_code(function.__code__)} {function.__defaults__!r} {plain}".encode())
        return f"{function.__module__}.{function.__qualname__}:{code:08x}"
    if isinstance(function, nn.Module):
        return str(function)
    kind = type(function)
    return f"{kind.__module__}.{kind.__qualname__}"


def _code(code: CodeType) -> str:
    constants = [_code(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names}"
