"""The tables of the pages that specify a JSON file, made from its schema: ``python -m tersor.report.schema_page FILE``.

docs/summary-schema.md, docs/evaluate.md and docs/benchmark.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from tersor.core.files import write_atomically
from tersor.measure import benchmark_schema as benchmark
from tersor.measure.behaviour import schema as behaviour
from tersor.report import schema

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
Parts = tuple[type[BaseModel], ...]
SUMMARY: Parts = (
    schema.Summary, schema.TaskSummary, schema.Samples, schema.RecipeSummary, schema.RecipeStep, schema.Verdict,
    schema.Budget, schema.StepSummary, schema.FinalSummary, schema.Skipped, schema.Reproduce,
)  # fmt: skip
EVALUATION: Parts = (
    behaviour.Evaluation, behaviour.DataFacts, behaviour.ModelFacts, behaviour.Gate, behaviour.Check, behaviour.Quality,
    behaviour.McNemar, behaviour.ClassQuality, behaviour.Shift, behaviour.Flips, behaviour.Flip, behaviour.Answer,
    behaviour.Shown, behaviour.Calibration, behaviour.ModelCalibration, behaviour.Bins, behaviour.Robustness,
    behaviour.Condition, behaviour.Attribute, behaviour.Group, behaviour.Skipped,
)  # fmt: skip
BENCHMARK: Parts = (
    benchmark.Benchmark, benchmark.BenchmarkModel, benchmark.Timing, benchmark.Outliers, benchmark.Comparison,
    behaviour.Skipped,
)  # fmt: skip
PAGES = {"evaluate.md": EVALUATION, "benchmark.md": BENCHMARK}
_NAMES = {"str": "string", "int": "integer", "float": "number", "bool": "true or false", "NoneType": "null"}


def tables(parts: Parts = SUMMARY) -> str:
    """One Markdown table for each part of a schema: key, type, meaning."""
    return "\n\n".join(_table(part) for part in parts)


def _table(part: type[BaseModel]) -> str:
    inherited = {name for base in part.__bases__ if issubclass(base, BaseModel) for name in base.model_fields}
    title = _title(part)
    lines = [f"### {title}", ""]
    if inherited:
        lines += [f"Everything that a {_title(schema.StepSummary)} has, and:", ""]
    lines += ["| key | type | meaning |", "|---|---|---|"]
    for name, field in part.model_fields.items():
        if name not in inherited:
            lines.append(f"| `{field.alias or name}` | {_type(field.annotation)} | {field.description} |")
    return "\n".join(lines)


def _title(part: type[Any]) -> str:
    words = re.findall(r"[A-Z][a-z]+", part.__name__.removesuffix("Summary") or part.__name__)
    return "-".join(words).lower()


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        return f"list of {_type(inner[0])}"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin is Mapping:
        return f"object: name → {_type(inner[1])}"
    if inner:
        return " or ".join(_type(each) for each in inner)
    name = getattr(annotation, "__name__", str(annotation))
    known = isinstance(annotation, type) and (issubclass(annotation, BaseModel) or name == "Measurement")
    if known:
        title = _title(annotation)
        return f"[{title}](#{title})"
    return _NAMES.get(name, "any JSON value")


def rewrite(page: str, parts: Parts = SUMMARY) -> str:
    """The page with what stands between its markers replaced by the tables of today's schema."""
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n\n{tables(parts)}\n\n{END}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    specified = PAGES.get(target.name, SUMMARY)
    write_atomically(target, rewrite(target.read_text(encoding="utf-8"), specified).encode())
