"""Places aim at one tensor or one activation; selectors say which modules."""

from __future__ import annotations

import difflib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.attached import is_attached
from tersor.core.errors import InputError


@dataclass(frozen=True, order=True)
class TensorPlace:
    """One parameter or buffer: ``TensorPlace("layers.0.conv1", "weight")``."""

    module: str
    tensor: str

    def __str__(self) -> str:
        return f"{self.module}.{self.tensor}" if self.module else self.tensor


@dataclass(frozen=True, order=True)
class ActivationPlace:
    """The result of one operator call made by a module's own forward: the ``ordinal``-th ``operator`` of that module,
    counted over a forward pass of the whole model. ``operator="input"``: the module's ``ordinal``-th positional input.

    Operators bear their ATen base names (``add``, ``relu``, ``conv2d``, ``cat``) whichever way Python spells them.
    """

    module: str
    operator: str
    ordinal: int = 0

    def __str__(self) -> str:
        return f"{self.module or '<model>'}:{self.operator}[{self.ordinal}]"


Place = TensorPlace | ActivationPlace


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The submodule at ``path`` ("" is the model itself). Raises InputError with the nearest names."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules()]
        raise InputError("no such module", where=path or "<model>", do=nearest_names(path, names)) from None


def nearest_names(asked: str, names: Iterable[str]) -> str:
    """What to say where ``asked`` is none of ``names``: the nearest of them."""
    known = [name for name in names if name]
    return f"Nearest names: {', '.join(difflib.get_close_matches(asked, known, n=3, cutoff=0.5) or known[:3])}"


def tensor_at(model: nn.Module, place: TensorPlace) -> Tensor:
    """The parameter or buffer at ``place``; raises InputError where there is none."""
    module = module_at(model, place.module)
    value = getattr(module, place.tensor, None)
    if not isinstance(value, Tensor) or place.tensor not in _stored(module):
        got = "a plain attribute" if isinstance(value, Tensor) else type(value).__name__
        raise InputError("no such tensor", where=str(place), got=got, expected="a parameter or buffer")
    return value


def stored_at(model: nn.Module, place: TensorPlace) -> Tensor:
    """The parameter or buffer at ``place`` as it is stored: under a mask or quantiser, what those start from."""
    tensor_at(model, place)  # raises where there is none
    return _stored(module_at(model, place.module))[place.tensor]


def aliases(model: nn.Module, place: TensorPlace) -> tuple[TensorPlace, ...]:
    """Every place that holds the very same tensor (tied weights), ``place`` included; masked and quantised ones too."""
    stored = stored_at(model, place)
    found = [
        TensorPlace(path, name)
        for path, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, parametrize.ParametrizationList)
        for name, other in _stored(module).items()
        if other is stored
    ]
    return tuple(found) or (place,)


def tied_places(model: nn.Module) -> dict[int, tuple[TensorPlace, ...]]:
    """Identity of each stored parameter or buffer → every place that holds it, a parametrized one's own among them."""
    found: dict[int, tuple[TensorPlace, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                found[id(tensor)] = (*found.get(id(tensor), ()), TensorPlace(path, name))
    return found


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """Name → parameter or buffer as it is stored: of a parametrized one, what its parametrizations start from."""
    found = {k: v for k, v in [*module._parameters.items(), *module._buffers.items()] if v is not None}
    if parametrize.is_parametrized(module):
        for name, entry in cast(nn.ModuleDict, module.parametrizations).items():
            # One that starts from several tensors (weight norm) has them as places of its own.
            found[name] = cast(Tensor, entry.original if entry.is_tensor else getattr(module, name))
    return found


class Selector(ABC):
    """Says which modules; composes with ``&``, ``|`` and ``~``."""

    @abstractmethod
    def matches(self, path: str, module: nn.Module) -> bool:
        """Whether the module at ``path`` is meant."""

    def __and__(self, other: Selector) -> Selector:
        return Both(self, other)

    def __or__(self, other: Selector) -> Selector:
        return Either(self, other)

    def __invert__(self) -> Selector:
        return Not(self)


@dataclass(frozen=True)
class Everything(Selector):
    """Every module."""

    def matches(self, path: str, module: nn.Module) -> bool:
        return True


@dataclass(frozen=True)
class ByName(Selector):
    """Modules whose path matches a shell pattern: ``ByName("layers.*.conv1")``."""

    pattern: str

    def matches(self, path: str, module: nn.Module) -> bool:
        return fnmatchcase(path, self.pattern)


@dataclass(frozen=True)
class ByType(Selector):
    """Modules of a class by name, subclasses included: ``ByType("Conv2d")``."""

    type_name: str

    def matches(self, path: str, module: nn.Module) -> bool:
        return any(base.__name__ == self.type_name for base in type(module).__mro__)


@dataclass(frozen=True)
class Both(Selector):
    """Modules that both selectors mean."""

    first: Selector
    second: Selector

    def matches(self, path: str, module: nn.Module) -> bool:
        return self.first.matches(path, module) and self.second.matches(path, module)


@dataclass(frozen=True)
class Either(Selector):
    """Modules that at least one of the selectors means."""

    first: Selector
    second: Selector

    def matches(self, path: str, module: nn.Module) -> bool:
        return self.first.matches(path, module) or self.second.matches(path, module)


@dataclass(frozen=True)
class Not(Selector):
    """Modules that the selector does not mean."""

    inner: Selector

    def matches(self, path: str, module: nn.Module) -> bool:
        return not self.inner.matches(path, module)


def select(model: nn.Module, where: Selector) -> dict[str, nn.Module]:
    """The modules that ``where`` means, by path; never what only training needs.

    To match nothing is an error; a name within ``where`` that no module has, an excluded one too, is a warning.
    """
    known = {path: module for path, module in model.named_modules() if not is_attached(path)}
    found = {path: module for path, module in known.items() if where.matches(path, module)}
    if not found:
        asked = getattr(where, "pattern", None) or getattr(where, "type_name", "")
        raise InputError("the selector matches no module", where=repr(where), do=nearest_names(str(asked), known))
    for pattern in _patterns(where):
        if not any(fnmatchcase(path, pattern) for path in known):
            warnings.warn(f"where: no module is called {pattern!r}. {nearest_names(pattern, known)}", stacklevel=2)
    return found


def _patterns(where: Selector) -> Iterator[str]:
    """The patterns of names that the selector is made of."""
    match where:
        case ByName(pattern):
            yield pattern
        case Not(inner):
            yield from _patterns(inner)
        case Both(first, second) | Either(first, second):
            yield from _patterns(first)
            yield from _patterns(second)
