"""What a removed module must take and give, learnt from one run of the model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.edit import Swap
from tersor.core.eval_mode import eval_mode
from tersor.core.place import module_at
from tersor.core.randomness import fixed_randomness
from tersor.core.removed import Plain, Removed

Path = tuple[int | str, ...]


@dataclass(frozen=True)
class Leaf:
    """A tensor among a module's arguments or results."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Seen:
    """One call of a module: ``sources`` are its tensor arguments, (name, position, what), in order; ``output`` what it
    gave, tensors as ``Leaf``; ``unknown``: the type of something in it that no placeholder can give, or ""."""

    sources: tuple[tuple[str, int, Leaf], ...]
    output: Any
    unknown: str

    @property
    def main(self) -> tuple[Path, Leaf] | None:
        """The first floating-point tensor that it gave: its path in the output, and the tensor."""
        found = ((path, leaf) for path, leaf in _leaves(self.output, ()) if leaf.dtype.is_floating_point)
        return next(found, None)

    @property
    def alike(self) -> tuple[tuple[str, int, Leaf], ...]:
        """The arguments of the main result's shape and type."""
        return tuple(source for source in self.sources if self.main is not None and source[2] == self.main[1])


def _leaves(output: Any, path: Path) -> Iterator[tuple[Path, Leaf]]:
    if isinstance(output, Leaf):
        yield path, output
    elif isinstance(output, (tuple, list)):
        for number, item in enumerate(output):
            yield from _leaves(item, (*path, number))
    elif isinstance(output, dict):
        for key, item in output.items():
            yield from _leaves(item, (*path, key))


def observe(model: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, tuple[Seen, ...]]:
    """What every module took and gave when the model ran once on ``example_inputs``, in eval mode.

    Hooks are removed at the end, after an error too.
    """
    found: dict[str, list[Seen]] = {path: [] for path, _ in model.named_modules()}
    hooks = [
        module.register_forward_hook(_recorder(module, found[path]), with_kwargs=True)
        for path, module in model.named_modules()
    ]
    try:
        with eval_mode(model), torch.no_grad(), fixed_randomness(0):
            model(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: tuple(calls) for path, calls in found.items()}


def _recorder(module: nn.Module, found: list[Seen]) -> Callable[..., None]:
    names = [
        parameter.name
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [(names[at] if at < len(names) else "", at, value) for at, value in enumerate(args)]
        given += [(name, names.index(name) if name in names else -1, value) for name, value in kwargs.items()]
        sources = tuple((name, at, _leaf(value)) for name, at, value in given if isinstance(value, Tensor))
        unknown: list[str] = []
        found.append(Seen(sources, _outline(output, unknown), unknown[0] if unknown else ""))

    return record


def _leaf(value: Tensor) -> Leaf:
    return Leaf(tuple(value.shape), value.dtype)


def _outline(output: Any, unknown: list[str]) -> Any:
    if isinstance(output, Tensor):
        return _leaf(output)
    if type(output) in (tuple, list):
        return type(output)(_outline(item, unknown) for item in output)
    if type(output) is dict and all(isinstance(key, str) for key in output):
        return {key: _outline(item, unknown) for key, item in output.items()}
    if not isinstance(output, Plain):
        unknown.append(type(output).__name__)
    return output if isinstance(output, Plain) else None


def placeholder(
    model: nn.Module, path: str, calls: tuple[Seen, ...], *, zeros: bool, loose: bool = False
) -> Swap | None:
    """What may stand at ``path`` once the module there is removed: it gives its input back, or ``zeros``.

    With ``loose`` the result has its input's size, whatever the module's had. None where no placeholder gives what the
    module gave in all its ``calls``.
    """
    made = [_arguments(seen, zeros, loose) for seen in calls]
    if not made or made[0] is None or any(other != made[0] for other in made):
        return None
    attributes = _attributes(module_at(model, path))
    return Swap(path, "Removed", {**made[0], "attributes": attributes} if attributes else made[0])


def _arguments(seen: Seen, zeros: bool, loose: bool) -> dict[str, Any] | None:
    if seen.unknown or seen.main is None:
        return None
    path, main = seen.main
    typed = [source for source in seen.sources if source[2].dtype == main.dtype]
    sources = seen.alike or (typed if zeros or loose else ())
    if not sources:
        return None
    name, position, source = sources[0]

    def give(value: Any, at: Path) -> Any:
        if isinstance(value, Leaf):
            if at == path and not zeros:
                return "input"
            if at == path and loose and len(source.shape) >= len(value.shape):
                return {"zeros": [None] * len(value.shape)}
            return _zeros(value, source) if at == path or value == source else None
        if isinstance(value, dict):
            return {"dict": {key: give(item, (*at, key)) for key, item in value.items()}}
        if isinstance(value, (tuple, list)):
            return {type(value).__name__: [give(item, (*at, number)) for number, item in enumerate(value)]}
        return None if value is None else {"value": value}

    return {"source": [name, position], "output": give(seen.output, ())}


def _zeros(leaf: Leaf, source: Leaf) -> dict[str, list[int | None]]:
    """Zeros of the leaf's shape; sizes that are the source's at the same position follow it."""
    same = [at < len(source.shape) and source.shape[at] == size for at, size in enumerate(leaf.shape)]
    return {"zeros": [None if follows else size for follows, size in zip(same, leaf.shape, strict=True)]}


def _attributes(module: nn.Module) -> dict[str, Plain]:
    """The module's plain attributes, which its parent may ask for."""
    taken = dir(Removed(("", 0), None))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, Plain)
        and not name.startswith("_")
        and name not in taken
        and not (isinstance(value, float) and not math.isfinite(value))
    }


def at_path(output: Any, path: Path) -> Tensor:
    """The tensor at ``path`` of what a module gave."""
    for key in path:
        output = output[key]
    return output


def replaced(output: Any, path: Path, value: Tensor) -> Any:
    """What a module gave, with ``value`` at ``path``."""
    if not path:
        return value
    if isinstance(output, Mapping):
        return {key: replaced(item, path[1:], value) if key == path[0] else item for key, item in output.items()}
    return type(output)(
        replaced(item, path[1:], value) if number == path[0] else item for number, item in enumerate(output)
    )
