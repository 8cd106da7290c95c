"""Whether a dataclass of settings holds what its annotations say: before any of it is used."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from numbers import Real
from typing import Any

from tersor.core.errors import InputError
from tersor.core.place import Selector

_PLAIN: dict[Any, type] = {int: int, float: Real, bool: bool, str: str}


def check_fields(settings: Any) -> None:
    """Raise InputError, naming the field, where a value is not of the type that its annotation names.

    Looked at are plain types (a bool is no number here), classes, functions, unions of these, mappings and sequences of
    them; other annotations are left alone. For a dataclass's ``__post_init__``.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Steps:
    ...     many: int = 3
    ...     def __post_init__(self):
    ...         check_fields(self)
    >>> Steps("4")
    Traceback (most recent call last):
    tersor.core.errors.InputError: Steps.many: wrong type. Got str '4'; expected int.
    """
    kind: Any = type(settings)
    for name, hint in _hints(kind).items():
        _check(getattr(settings, name), hint, f"{kind.__name__}.{name}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _check(value: Any, hint: Any, where: str) -> None:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if any(_fits(value, option) for option in options):
        mappings = [option for option in options if typing.get_origin(option) is Mapping]
        if isinstance(value, Mapping) and mappings:
            for key, item in value.items():
                _check(item, typing.get_args(mappings[0])[1], f"{where}[{key!r}]")
        for option in options:
            _check_items(value, option, where)
        return
    expected, do = " or ".join(_name(option) for option in options), ""
    if isinstance(value, type):
        do = f"Write {value.__name__}(…), an object of the class"
    elif isinstance(value, str) and Selector in options:
        do = f"Write ByName({value!r})"
    got = repr(value) if isinstance(value, type) else f"{type(value).__name__} {value!r}"
    raise InputError("wrong type", where=where, got=got[:200], expected=expected, do=do)


def _check_items(value: Any, option: Any, where: str) -> None:
    """The items of a sequence of plain values or of objects, such as ``tuple[int, ...]``."""
    inside = [each for each in typing.get_args(option) if each is not ...]
    if _is_sequence(option) and len(inside) == 1 and isinstance(inside[0], type) and _fits(value, option):
        for number, item in enumerate(value):
            _check(item, inside[0], f"{where}[{number}]")


def _is_sequence(option: Any) -> bool:
    return typing.get_origin(option) in (tuple, Sequence)


def _fits(value: Any, option: Any) -> bool:
    if option in _PLAIN:
        return isinstance(value, _PLAIN[option]) and (option is bool or not isinstance(value, bool))
    origin = typing.get_origin(option)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if origin is Callable:
        return callable(value)
    if _is_sequence(option):
        return isinstance(value, Sequence) and not isinstance(value, str)
    return isinstance(value, option) if isinstance(option, type) else True


def _name(option: Any) -> str:
    origin, inside = typing.get_origin(option), [each for each in typing.get_args(option) if each is not ...]
    if origin is Mapping:
        parts = typing.get_args(inside[1]) or (inside[1],)
        return f"a mapping from {_name(inside[0])} to {' or '.join(map(_name, parts))}"
    if origin in (tuple, Sequence):
        return f"a tuple of {', '.join(map(_name, inside))}"
    if origin is Callable:
        return "a function"
    if option is type(None):
        return "None"
    if inspect.isabstract(option):
        kinds = sorted(kind.__name__ for kind in option.__subclasses__() if not kind.__name__.startswith("_"))
        return f"a {option.__name__} ({', '.join(kinds)})"
    return option.__name__ if isinstance(option, type) else str(option)
