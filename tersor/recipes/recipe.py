"""A recipe: named steps, each of one or more parts, read from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tersor.core.errors import InputError
from tersor.core.step import Pipeline, Step
from tersor.recipes.built_in import BUILT_IN
from tersor.recipes.registry import STEPS
from tersor.recipes.schema import explain
from tersor.run.budgets import Budgets
from tersor.run.engine import NamedStep


class _StepModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")
    title: str = ""
    parts: list[Any] = Field(min_length=1)


class _BudgetModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    max_drop: float | None = Field(default=None, ge=0)
    max_size: float | None = Field(default=None, gt=0)
    max_latency: float | None = Field(default=None, gt=0)


class _RecipeModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1)
    explanation: str = ""
    budgets: _BudgetModel = _BudgetModel()
    steps: list[_StepModel] = Field(min_length=1)


@dataclass(frozen=True)
class Recipe:
    """Named steps with the default budgets that the result is held to."""

    name: str
    explanation: str
    steps: tuple[NamedStep, ...]
    budgets: Budgets

    def to_json(self) -> dict[str, Any]:
        """The recipe with every setting spelled out, as ``run.json`` and ``summary.json`` keep it."""
        return {
            "name": self.name,
            "explanation": self.explanation,
            "steps": [
                {"name": step.name, "kind": _kind(step), "title": step.title, "settings": dict(step.settings)}
                for step in self.steps
            ],
        }


def _kind(step: NamedStep) -> str:
    return " + ".join(next(iter(part)) for part in step.settings["parts"])


def read_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """A built-in recipe by name, a YAML file, or its data.

    Raises InputError that names the path within the recipe and the allowed values.
    """
    if isinstance(source, Mapping):
        return _from_data(dict(source), "recipe")
    text, where = _text_of(source)
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError("the recipe is not YAML", where=where, got=" ".join(str(error).split())) from None
    if not isinstance(data, dict):
        raise InputError("the recipe holds no mapping", where=where, got=type(data).__name__, expected="name, steps, …")
    return _from_data(data, where)


def _text_of(source: str | Path) -> tuple[str, str]:
    name = str(source)
    if name in BUILT_IN:
        return (files("tersor.recipes") / f"{name}.yaml").read_text(), f"recipe {name!r}"
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(
            "unknown recipe", where="--recipe", got=repr(name), expected=f"{', '.join(BUILT_IN)}, or a .yaml file"
        )
    try:
        return path.read_text(), name
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the recipe cannot be read", where=name, got=error) from None


def _from_data(data: dict[str, Any], where: str) -> Recipe:
    try:
        model = _RecipeModel.model_validate(data)
    except ValidationError as error:
        raise explain(error, where, _RecipeModel) from None
    names = [step.name for step in model.steps]
    twice = sorted({name for name in names if names.count(name) > 1} | ({"baseline"} & set(names)))
    if twice:
        raise InputError("a step's name must be its own", where=f"{where}.steps", got=", ".join(twice))
    steps = tuple(_named_step(step, f"{where}.steps[{number}]") for number, step in enumerate(model.steps))
    return Recipe(model.name, " ".join(model.explanation.split()), steps, Budgets(**model.budgets.model_dump()))


def _named_step(model: _StepModel, where: str) -> NamedStep:
    parts = [STEPS.build(Step, part, f"{where}.parts[{number}]") for number, part in enumerate(model.parts)]
    step = parts[0] if len(parts) == 1 else Pipeline(tuple(parts))
    settings = {"parts": [STEPS.settings(part) for part in parts]}
    return NamedStep(model.name, model.title or model.name, step, settings)


def parts_of(step: Step | None) -> tuple[Step, ...]:
    """The parts of a named step; none of the baseline's."""
    if step is None:
        return ()
    return tuple(step.steps) if isinstance(step, Pipeline) else (step,)


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every setting spelled out, as YAML that ``read_recipe`` takes."""
    data = {
        "name": recipe.name,
        "explanation": recipe.explanation,
        "budgets": {name: value for name, value in asdict(recipe.budgets).items() if value is not None},
        "steps": [{"name": step.name, "title": step.title, "parts": step.settings["parts"]} for step in recipe.steps],
    }
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
