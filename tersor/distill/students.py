"""Students out of the teacher: every k-th of its layers, with their weights."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError, user_code
from tersor.core.eval_mode import eval_mode
from tersor.core.place import module_at
from tersor.core.task import output_tensor

_OF_DEPTH = re.compile(r"layer|block|depth")  # in the name of a configuration's field that counts layers


def drop_layers(
    teacher: nn.Module,
    example_inputs: tuple[Any, ...],
    every: int = 2,
    *,
    keep: Sequence[int] | None = None,
    layers: str | None = None,
) -> nn.Module:
    """A student with the layers 0, k, 2k, … of each of the teacher's stacks, k = ``every``, and with their weights.

    A stack is a ModuleList or Sequential of at least two modules of one class. A layer that gives another shape than it
    takes always stays, and is counted from as 0. Of stacks inside each other the outermost is meant from which layers
    can be dropped: where each stage changes the shape, the blocks in the stages. What lies outside (embeddings, the
    head) is copied too; the teacher is not changed, and nothing is shared with it.

    Args:
        teacher: the trained model.
        example_inputs: positional inputs of it, on which the student must run and give outputs of the same shape.
        every: take each k-th layer.
        keep: the numbers of the layers to take, instead of each k-th: (0, 2, 4, 7, 9, 11) of twelve, for DistilBERT.
        layers: a shell pattern of the stacks that are meant ("encoder.layer", "stages.*.blocks"); None: all.

    A model of transformers is built by its own class from a configuration with fewer layers, which is searched for and
    proved by the names and shapes of its weights, so that ``save_pretrained`` works. Raises InputError where there is
    no such stack or configuration, where nothing is dropped, where numbers are out of range, and where the student does
    not run.

    Source: Sanh et al. 2019, *DistilBERT* (arXiv 1910.01108), section 3: one layer out of two.

    >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))), nn.Linear(8, 2))
    >>> student = drop_layers(teacher, (torch.zeros(1, 4),), every=3)
    >>> len(student[1]), torch.equal(student[1][1].weight, teacher[1][3].weight)
    (2, True)
    """
    if every < 2 and keep is None:
        raise InputError("nothing is dropped", where="drop_layers.every", got=every, expected="2 or more")
    stacks = _stacks(teacher, layers)
    changing = _changing(teacher, list(stacks), example_inputs)
    chosen = _chosen(stacks, changing, every, keep)
    student = copy.deepcopy(teacher)
    for path, numbers in chosen.items():
        _thin(module_at(student, path), numbers)
    config = getattr(teacher, "config", None)
    if callable(getattr(config, "to_dict", None)):
        student = _configured(teacher, student, chosen)
    _check(teacher, student, example_inputs)
    return student


def _stacks(model: nn.Module, pattern: str | None) -> dict[str, int]:
    """Path of each stack that is meant → how many layers it has, the outer first. Raises InputError without any."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if path and isinstance(module, (nn.ModuleList, nn.Sequential)):
            kinds = {type(child) for child in module.children()}
            if len(module) > 1 and len(kinds) == 1:
                found[path] = len(module)
    meant = {path: count for path, count in found.items() if pattern is None or fnmatchcase(path, pattern)}
    if not meant:
        near = difflib.get_close_matches(pattern or "", found, n=3, cutoff=0.3) or list(found)[:3]
        raise InputError(
            "no stack of layers is meant" if found else "the model has no stack of layers", where="drop_layers.layers",
            got=repr(pattern), expected="a ModuleList or Sequential of at least two modules of one class",
            do=f"Nearest names: {', '.join(near)}" if near else "Scale its factory: scaled(factory, depth=0.5)",
        )  # fmt: skip
    return meant


def _changing(model: nn.Module, stacks: Sequence[str], inputs: tuple[Any, ...]) -> dict[str, set[int]]:
    """The numbers of the layers that give another shape than they take, in each stack."""
    found: dict[str, set[int]] = {path: set() for path in stacks}
    with ExitStack() as stack, torch.no_grad(), eval_mode(model):

        def note(numbers: set[int], number: int, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            taken = next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)
            given = result[0] if isinstance(result, (tuple, list)) and result else result
            if isinstance(taken, Tensor) and isinstance(given, Tensor) and taken.shape != given.shape:
                numbers.add(number)

        for path, numbers in found.items():
            for number, layer in enumerate(module_at(model, path).children()):
                hook = layer.register_forward_hook(partial(note, numbers, number), with_kwargs=True)
                stack.callback(hook.remove)
        with user_code("the teacher does not run", where="drop_layers.example_inputs"):
            model(*copy.deepcopy(inputs))
    return found


def _chosen(
    stacks: Mapping[str, int], changing: Mapping[str, set[int]], every: int, keep: Sequence[int] | None
) -> dict[str, list[int]]:
    """The numbers of the layers that stay, of each stack that becomes shorter and lies in no other one that does."""
    chosen: dict[str, list[int]] = {}
    for path, count in stacks.items():
        if not any(path.startswith(f"{outer}.") for outer in chosen):
            numbers = _kept(path, count, every, keep, changing[path])
            if len(numbers) < count:
                chosen[path] = numbers
    if not chosen:
        raise InputError(
            "nothing is dropped", where="drop_layers",
            got=", ".join(f"{path}: {count} layers" for path, count in stacks.items()),
            expected="layers that are not kept and give the shape that they take",
        )  # fmt: skip
    return chosen


def _kept(path: str, count: int, every: int, keep: Sequence[int] | None, changing: set[int]) -> list[int]:
    if keep is None:
        first = [max((start for start in changing if start <= number), default=0) for number in range(count)]
        return [number for number in range(count) if (number - first[number]) % every == 0]
    numbers = sorted(set(keep))
    if not numbers or numbers[0] < 0 or numbers[-1] >= count or len(numbers) != len(keep):
        raise InputError(
            "so many layers are not there", where=f"drop_layers.keep, {path}", got=list(keep),
            expected=f"different numbers from 0 to {count - 1}",
        )  # fmt: skip
    return numbers


def _thin(stack: nn.Module, numbers: Sequence[int]) -> None:
    """Leave these layers in a stack. Names that are numbers are counted anew."""
    names = list(stack._modules)
    kept = [(names[number], stack._modules[names[number]]) for number in numbers]
    stack._modules.clear()
    for new, (name, module) in enumerate(kept):
        stack._modules[str(new) if name.isdigit() else name] = module


def _check(teacher: nn.Module, student: nn.Module, inputs: tuple[Any, ...]) -> None:
    do = "Name the stacks whose layers take what they give, with layers=, or choose others with keep="
    with torch.no_grad(), eval_mode(teacher), eval_mode(student):
        expected = output_tensor(teacher(*copy.deepcopy(inputs)))
        with user_code("the student does not run without these layers", where="drop_layers", do=do):
            got = output_tensor(student(*copy.deepcopy(inputs)))
    if got.shape != expected.shape:
        raise InputError(
            "the student's output has another shape", where="drop_layers", got=list(got.shape),
            expected=list(expected.shape), do=do,
        )  # fmt: skip


def _configured(teacher: nn.Module, student: nn.Module, chosen: Mapping[str, Sequence[int]]) -> nn.Module:
    """The student as its class builds it from a configuration, with its weights. Raises InputError."""
    wanted = _shapes(student)
    kind: Any = type(teacher)
    settings: Any = type(teacher.config)
    for fields in _shorter(teacher.config, _counts(teacher, chosen)):
        try:
            config = settings.from_dict(fields)
            with torch.device("meta"):
                built = kind(copy.deepcopy(config))
        except Exception:  # a configuration that builds nothing is not the one
            continue
        if _shapes(built) == wanted:
            whole = kind(copy.deepcopy(config)).to(next(teacher.parameters()))
            whole.load_state_dict(student.state_dict())
            trained = dict(student.named_parameters())
            for name, parameter in whole.named_parameters():
                parameter.requires_grad_(trained[name].requires_grad)
            return whole.train(teacher.training)
    raise InputError(
        "no configuration was found that builds the model with fewer layers", where="drop_layers",
        got=type(teacher).__name__, do="Keep as many layers in each stack, or name one stack with layers=",
    )  # fmt: skip


def _counts(teacher: nn.Module, chosen: Mapping[str, Sequence[int]]) -> dict[int, Sequence[int]]:
    """How many layers a stack had → which are kept."""
    return {len(list(module_at(teacher, path).children())): numbers for path, numbers in chosen.items()}


def _shorter(config: Any, counts: Mapping[int, Sequence[int]]) -> Iterator[dict[str, Any]]:
    """A configuration's fields for fewer layers: each that may count them changed, then fewer of them."""
    fields = {name: value for name, value in config.to_dict().items() if _OF_DEPTH.search(name)}
    numbers = {
        name: len(counts[value])
        for name, value in fields.items()
        if isinstance(value, int) and not isinstance(value, bool) and value in counts
    }
    lists = {
        name: [value[number] for number in counts[len(value)]]
        for name, value in fields.items()
        if isinstance(value, (list, tuple)) and len(value) in counts
    }
    stages = {
        name: [len(counts.get(count, range(count))) for count in value]
        for name, value in fields.items()
        if isinstance(value, (list, tuple)) and all(isinstance(count, int) for count in value)
    }
    if stages:  # "depths", of the blocks in each stage
        yield {**config.to_dict(), **stages}
    for size in range(len(numbers), 0, -1):
        for names in combinations(numbers, size):
            yield {**config.to_dict(), **lists, **{name: numbers[name] for name in names}}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in tensors}
