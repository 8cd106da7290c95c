"""From plain data (YAML) to frozen dataclasses, checked by pydantic; errors name the path and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model, model_validator

from tersor.core.errors import InputError, TersorError
from tersor.core.place import Both, ByName, ByType, Either, Everything, Not, Selector

_UNION_BRANCH = re.compile(r"float|int|str|bool|(mapping|dict)\[.*\]", re.DOTALL)  # pydantic's names of branches


class _Made(BaseModel):
    """Validated fields of one dataclass."""

    model_config = ConfigDict(extra="forbid", strict=False, arbitrary_types_allowed=True)


class _Choice(BaseModel):
    """Exactly one of several named dataclasses: ``{distill: {temperature: 4}}``, or just ``distill``."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {value: {}}
        if isinstance(value, Mapping) and len(value) == 1:
            return {key: ({} if fields is None else fields) for key, fields in value.items()}
        raise ValueError(f"expected one of {', '.join(cls.model_fields)}, as a name or as one key with its settings")


def _selector(value: Any) -> Selector:
    """A pattern of names ("layers.*", "~fc"), ``{by_type: Conv2d}``, or a Selector."""
    if isinstance(value, Selector):
        return value
    if isinstance(value, str):
        inner: Selector = Everything() if value.lstrip("~") == "*" else ByName(value.lstrip("~"))
        return Not(inner) if value.startswith("~") else inner
    if isinstance(value, Mapping) and len(value) == 1:
        ((kind, inside),) = value.items()
        if kind == "by_type" and isinstance(inside, str):
            return ByType(inside)
        if kind == "not":
            return Not(_selector(inside))
        if kind in ("both", "either") and isinstance(inside, (list, tuple)) and len(inside) == 2:
            first, second = map(_selector, inside)
            return Both(first, second) if kind == "both" else Either(first, second)
    raise ValueError(
        'expected a pattern of module names such as "layers.*" (with ~ in front: all others), '
        "{by_type: Conv2d}, {not: …}, {both: [… , …]} or {either: [… , …]}"
    )


class Registry:
    """Names in recipes → dataclasses, grouped by the abstract class that a field asks for."""

    def __init__(self, families: Mapping[type, Mapping[str, type]]):
        self.families = families
        self._of_model: dict[type[BaseModel], type] = {}
        self.model_for = cache(self._model_for)
        self.choice_for = cache(self._choice_for)

    def build(self, base: type, value: Any, path: str) -> Any:
        """The object of family ``base`` that ``value`` describes; InputError says ``path`` and what is allowed."""
        try:
            return self._object(self.choice_for(base).model_validate(value))
        except ValidationError as error:
            raise explain(error, path, self.choice_for(base)) from None
        except InputError as error:  # the dataclass itself refused a value
            raise error.at(f"{path}: {error.where}") from None

    def settings(self, value: Any) -> Any:
        """A dataclass as the plain data that ``build`` reads."""
        if isinstance(value, Selector):
            return _selector_text(value)
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return list(value) if isinstance(value, tuple) else value
        names = (name for known in self.families.values() for name, kind in known.items() if type(value) is kind)
        name = next(names, None)
        return self._fields(value) if name is None else {name: self._fields(value)}

    def _fields(self, value: Any) -> dict[str, Any]:
        found = {}
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            if field.init:
                inner, hint = getattr(value, field.name), hints[field.name]
                # A field that asks for this very class is read without its name.
                found[field.name] = (
                    self._fields(inner)
                    if hint is type(inner) and dataclasses.is_dataclass(hint) and not issubclass(hint, Selector)
                    else self.settings(inner)
                )
        return found

    def _choice_for(self, base: type) -> type[BaseModel]:
        fields: dict[str, Any] = {
            name: (self.model_for(kind) | None, None) for name, kind in self.families[base].items()
        }
        return create_model(base.__name__, __base__=_Choice, **fields)

    def _model_for(self, kind: type) -> type[BaseModel]:
        hints = typing.get_type_hints(kind)
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(kind):
            if not field.init:
                continue
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            fields[field.name] = (self._annotation(hints[field.name]), ... if required else None)
        model = create_model(kind.__name__, __base__=_Made, **fields)
        self._of_model[model] = kind
        return model

    def _annotation(self, hint: Any) -> Any:
        if hint is Selector:
            return Annotated[Any, BeforeValidator(_selector)]
        if hint in self.families:
            return self.choice_for(hint)
        if inspect.isclass(hint) and dataclasses.is_dataclass(hint):
            return self.model_for(hint)
        if typing.get_origin(hint) in (Union, types.UnionType):
            options = tuple(self._annotation(option) for option in typing.get_args(hint))
            return Union[options]  # noqa: UP007  (built at run time)
        return hint

    def _object(self, model: Any) -> Any:
        if isinstance(model, _Choice):
            (name,) = model.model_fields_set
            return self._object(getattr(model, name))
        if isinstance(model, _Made):
            given = {name: self._object(getattr(model, name)) for name in model.model_fields_set}
            return self._of_model[type(model)](**given)
        return model


def _selector_text(value: Selector) -> Any:
    match value:
        case Everything():
            return "*"
        case ByName(pattern):
            return pattern
        case ByType(name):
            return {"by_type": name}
        case Not(inner):
            return {"not": _selector_text(inner)}
        case Both(first, second):
            return {"both": [_selector_text(first), _selector_text(second)]}
        case Either(first, second):
            return {"either": [_selector_text(first), _selector_text(second)]}
    raise InputError("a selector of one's own cannot be saved in a recipe", where=repr(value))


def explain(error: ValidationError, path: str, model: type[BaseModel]) -> TersorError:
    """The first fault of a pydantic error as an InputError: path, what was got, what is allowed."""
    fault = _deepest(error)
    parts = [part for part in fault["loc"] if not _UNION_BRANCH.fullmatch(str(part)) or isinstance(part, int)]
    where = path + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    if fault["type"] == "extra_forbidden":
        parent = _field_model(model, fault["loc"][:-1])
        allowed = list(parent.model_fields) if parent is not None else []
        near = difflib.get_close_matches(str(fault["loc"][-1]), allowed, n=1)
        do = f"Did you mean {near[0]!r}?" if near else ""
        return InputError(
            "unknown name", where=where, got=repr(fault["loc"][-1]), expected=f"one of {', '.join(allowed)}", do=do
        )
    message = fault["msg"].removeprefix("Value error, ")
    return InputError(message[:1].lower() + message[1:], where=where, got=reprlib.repr(fault["input"]))


def _deepest(error: ValidationError) -> Any:
    """The first fault, or where the value may be of several types, that of the type which fits the furthest."""
    first, *others = error.errors()
    beside = [fault for fault in others if fault["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
    branch = _UNION_BRANCH.fullmatch(str(first["loc"][-1])) if first["loc"] else None
    return max([first, *beside], key=lambda fault: len(fault["loc"])) if branch else first


def _field_model(model: type[BaseModel], loc: tuple[Any, ...]) -> type[BaseModel] | None:
    """The pydantic model at a path of field names."""
    current: type[BaseModel] | None = model
    for part in loc:
        if current is None or part not in current.model_fields:
            continue  # list positions and union branches are no fields
        options = [current.model_fields[part].annotation, *typing.get_args(current.model_fields[part].annotation)]
        found = [option for option in options if inspect.isclass(option) and issubclass(option, BaseModel)]
        current = found[0] if found else None
    return current
