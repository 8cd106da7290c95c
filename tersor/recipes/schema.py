"""From plain data (YAML) to frozen dataclasses, checked by pydantic; errors name the path and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Union

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    create_model,
    model_validator,
)

from tersor.core.errors import InputError, TersorError
from tersor.core.place import Both, ByName, ByType, Either, Everything, Not, Selector

_ONE, _SUM = "one of them", "a list of them"  # how errors of pydantic name the two forms of a field
_UNION_BRANCH = re.compile(r"float|int|str|bool|(mapping|dict)\[.*\]", re.DOTALL)  # pydantic's names of branches


class _Made(BaseModel):
    """Validated fields of one dataclass."""

    model_config = ConfigDict(extra="forbid", strict=False, arbitrary_types_allowed=True)


def _one_or_sum(value: Any) -> str:
    return _SUM if isinstance(value, (list, tuple)) else _ONE


class _Choice(BaseModel):
    """Exactly one of several named dataclasses: ``{distill: {temperature: 4}}``, or just ``distill``."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return _named(value, cls.model_fields)


class _Term(BaseModel):
    """The same with a weight, in a list: ``{distill: {temperature: 4}, weight: 0.7}``."""

    model_config = ConfigDict(extra="forbid")
    weight: float = 1.0

    @model_validator(mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        names = [name for name in cls.model_fields if name != "weight"]
        if not isinstance(value, Mapping) or "weight" not in value:
            return _named(value, names)
        rest = {name: fields for name, fields in value.items() if name != "weight"}
        return {**_named(rest, names), "weight": value["weight"]}


def _named(value: Any, names: Iterable[str]) -> dict[str, Any]:
    """{name: settings} of a name alone, or of one key with its settings."""
    if isinstance(value, str):
        value = {value: {}}
    if isinstance(value, Mapping) and len(value) == 1:
        return {key: ({} if fields is None else fields) for key, fields in value.items()}
    raise ValueError(f"expected one of {', '.join(names)}, as a name or as one key with its settings")


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
    """Names in recipes → dataclasses, grouped by the abstract class that a field asks for.

    ``sums``: of a family, the class of its weighted sums, made from pairs of (weight, member): a field that asks for
    the family is also read from a list of members, each with a weight of 1 unless it says another. ``groups``: of a
    family, the class that several members make, whose one field is a tuple of them: it is read from a list as well.
    """

    def __init__(
        self, families: Mapping[type, Mapping[str, type]], sums: Mapping[type, type] | None = None,
        groups: Mapping[type, type] | None = None,
    ):  # fmt: skip
        self.families, self.sums, self.groups = families, sums or {}, groups or {}
        self._of_model: dict[type[BaseModel], type] = {}
        self.model_for = cache(self._model_for)
        self.choice_for = cache(self._choice_for)
        self.term_for = cache(self._term_for)

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
        if isinstance(value, Mapping):
            return {key: self.settings(inner) for key, inner in value.items()}
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return list(value) if isinstance(value, tuple) else value
        if type(value) in self.sums.values():
            return [{**self.settings(member), "weight": weight} for weight, member in getattr(value, "terms")]  # noqa: B009
        if type(value) in self.groups.values():
            (field,) = dataclasses.fields(value)
            return [self.settings(member) for member in getattr(value, field.name)]
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

    def _choice_for(self, base: type, leaves: bool = False) -> type[BaseModel]:
        return create_model(base.__name__, __base__=_Choice, **self._members(base, leaves))

    def _term_for(self, base: type, leaves: bool = False) -> type[BaseModel]:
        return create_model(base.__name__, __base__=_Term, **self._members(base, leaves))

    def _members(self, base: type, leaves: bool) -> dict[str, Any]:
        kinds = ((n, kind) for n, kind in self.families[base].items() if not (leaves and self._holds(kind, base)))
        return {name: (self.model_for(kind) | None, None) for name, kind in kinds}

    def _holds(self, kind: type, base: type) -> bool:
        """Whether a field of ``kind`` asks for the family of ``base``."""
        return base in typing.get_type_hints(kind).values()

    def _model_for(self, kind: type) -> type[BaseModel]:
        hints = typing.get_type_hints(kind)
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(kind):
            if not field.init:
                continue
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            fields[field.name] = (self._annotation(hints[field.name], kind), ... if required else None)
        model = create_model(kind.__name__, __base__=_Made, **fields)
        self._of_model[model] = kind
        return model

    def _annotation(self, hint: Any, owner: type) -> Any:
        """What pydantic reads for a field of ``owner``; a member of a family may hold those others that hold none."""
        if hint is Selector:
            return Annotated[Any, BeforeValidator(_selector)]
        if hint in self.families:
            leaves = owner in self.families[hint].values()
            choice = self.choice_for(hint, leaves)
            if hint not in self.sums and hint not in self.groups:
                return choice
            member = self.term_for(hint, leaves) if hint in self.sums else choice
            terms = Annotated[list[member], Field(min_length=1)]  # type: ignore[valid-type]
            return Annotated[Annotated[choice, Tag(_ONE)] | Annotated[terms, Tag(_SUM)], Discriminator(_one_or_sum)]
        if inspect.isclass(hint) and dataclasses.is_dataclass(hint):
            return self.model_for(hint)
        if typing.get_origin(hint) in (Union, types.UnionType):
            options = tuple(self._annotation(option, owner) for option in typing.get_args(hint))
            return Union[options]  # noqa: UP007  (built at run time)
        if typing.get_origin(hint) is Mapping:
            key, inner = typing.get_args(hint)
            return Mapping[key, self._annotation(inner, owner)]  # type: ignore[valid-type, misc]
        return hint

    def _object(self, model: Any) -> Any:
        if isinstance(model, _Choice):
            (name,) = model.model_fields_set
            return self._object(getattr(model, name))
        if isinstance(model, _Term):
            (name,) = model.model_fields_set - {"weight"}
            return model.weight, self._object(getattr(model, name))
        if isinstance(model, list) and model and isinstance(model[0], _Term):
            (kind,) = {kind for base, kind in self.sums.items() if base.__name__ == type(model[0]).__name__}
            if not any(term.weight for term in model):
                raise InputError("all weights are zero", where=kind.__name__, expected="a weight above 0")
            return kind(tuple(map(self._object, model)))
        if isinstance(model, list) and model and isinstance(model[0], _Choice):
            (kind,) = {kind for base, kind in self.groups.items() if base.__name__ == type(model[0]).__name__}
            return kind(tuple(map(self._object, model)))
        if isinstance(model, _Made):
            given = {name: self._object(getattr(model, name)) for name in model.model_fields_set}
            return self._of_model[type(model)](**given)
        if isinstance(model, Mapping):
            return {key: self._object(inner) for key, inner in model.items()}
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
    parts = [
        part
        for part in fault["loc"]
        if part not in (_ONE, _SUM) and not _UNION_BRANCH.fullmatch(str(part)) or isinstance(part, int)
    ]
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
        current = next(_models_in(current.model_fields[part].annotation), None)
    return current


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that a field's annotation names, however deep."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for option in typing.get_args(annotation):
        yield from _models_in(option)
