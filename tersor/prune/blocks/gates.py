"""A model whose residual blocks can be switched off without taking them out: what removal is measured against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.intercept import intercept_at
from tersor.core.place import ActivationPlace, module_at
from tersor.prune.blocks.placeholders import Path, at_path, replaced


@dataclass(frozen=True)
class Spot:
    """Where a tensor passes: at an operator call, or (``path``) in what a module gives back."""

    place: ActivationPlace | str
    path: Path = ()

    def __str__(self) -> str:
        return str(self.place)


@dataclass(frozen=True)
class Argument:
    """The argument ``source`` (name, position) of a module."""

    module: str
    source: tuple[str, int]


@dataclass(frozen=True)
class Skipped:
    """A module that gives its argument ``source`` (name, position) back, in its result's place ``path``."""

    module: str
    source: tuple[str, int]
    path: Path


Switch = Spot | Skipped


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares the tensors: nothing but Python objects is copied."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def switched_off(model: nn.Module, switches: Collection[Switch]) -> nn.Module:
    """A sharing copy of ``model`` in which what passes a Spot is zero, and a Skipped module gives its argument back."""
    target = sharing_copy(model)
    for switch in switches:
        if isinstance(switch, Skipped):
            module_at(target, switch.module).register_forward_hook(_Skip(switch), with_kwargs=True)
        else:
            attach(target, switch, torch.zeros_like)
    return target


def attach(model: nn.Module, spot: Spot | Argument, tap: Callable[[Tensor], Tensor]) -> None:
    """Let ``tap`` replace what passes ``spot`` of ``model``; an Argument it only sees."""
    if isinstance(spot, Argument):
        module_at(model, spot.module).register_forward_pre_hook(_See(spot.source, tap), with_kwargs=True)
    elif isinstance(spot.place, ActivationPlace):
        intercept_at(model, spot.place.module).add(spot.place.operator, spot.place.ordinal, _Tap(tap))
    else:
        module_at(model, spot.place).register_forward_hook(_Leave(spot.path, tap))


class _Tap(nn.Module):
    def __init__(self, tap: Callable[[Tensor], Tensor]):
        super().__init__()
        self.tap = tap

    def forward(self, value: Tensor) -> Tensor:
        return self.tap(value)


@dataclass(frozen=True)
class _Leave:
    path: Path
    tap: Callable[[Tensor], Tensor]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return replaced(output, self.path, self.tap(at_path(output, self.path)))


@dataclass(frozen=True)
class _See:
    source: tuple[str, int]
    tap: Callable[[Tensor], Tensor]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tap(_argument(self.source, args, kwargs))


@dataclass(frozen=True)
class _Skip:
    what: Skipped

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return replaced(output, self.what.path, _argument(self.what.source, args, kwargs))


def _argument(source: tuple[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, position = source
    return kwargs[name] if name in kwargs else args[position]


@dataclass(frozen=True)
class Passage:
    """A block's ends. Its output passes ``after``; its input passes ``start``, or is the output less what passes
    ``branch``, or is the argument ``source`` (name, position) of the module ``after``: one of the three is given."""

    after: Spot
    branch: Spot | None = None
    start: Spot | Argument | None = None
    source: tuple[str, int] | None = None


def watched(model: nn.Module, passages: Sequence[Passage], see: Callable[[int, Tensor, Tensor], None]) -> nn.Module:
    """A sharing copy of ``model`` that tells ``see(number, input, output)`` of each passage whenever it is passed."""
    target = sharing_copy(model)
    for number, passage in enumerate(passages):
        if passage.source is not None:
            assert isinstance(passage.after.place, str), "a module"
            module = module_at(target, passage.after.place)
            module.register_forward_hook(_Ends(number, passage.source, passage.after.path, see), with_kwargs=True)
            continue
        ends = _TwoTaps(number, passage.branch is not None, see)
        before = passage.branch or passage.start
        assert before is not None, "a passage has a beginning"
        attach(target, before, ends.keep)
        attach(target, passage.after, ends.tell)
    return target


@dataclass(frozen=True)
class _Ends:
    number: int
    source: tuple[str, int]
    path: Path
    see: Callable[[int, Tensor, Tensor], None]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.see(self.number, _argument(self.source, args, kwargs), at_path(output, self.path))


class _TwoTaps:
    def __init__(self, number: int, is_branch: bool, see: Callable[[int, Tensor, Tensor], None]):
        self.number, self.is_branch, self.see = number, is_branch, see
        self.value = torch.empty(0)

    def keep(self, value: Tensor) -> Tensor:
        """Before the addition, which may be in place."""
        self.value = value.clone()
        return value

    def tell(self, result: Tensor) -> Tensor:
        """After it."""
        value = self.value.view_as(result)
        self.see(self.number, result - value if self.is_branch else value, result)
        return result
