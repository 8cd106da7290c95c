"""The model card: what a compressed model is for, what it was made from and how, its numbers, and their limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tersor.measure.behaviour.schema import Evaluation
from tersor.report.behaviour.gate import STATUS, headline
from tersor.report.behaviour.words import counted
from tersor.report.columns import all_columns, present, rows
from tersor.report.findings import findings
from tersor.report.format import both_of
from tersor.report.markdown import bullets, cell, table_markdown
from tersor.report.page import Section, Table
from tersor.report.schema import Summary
from tersor.report.skips import group_skips

_BEHAVIOUR = ("quality", "agreement", "calibration", "robustness", "groups", "elsewhere")
_INTERVALS = (
    "Intervals (in brackets, 95 %) say what other test samples of the same kind could have shown. They say nothing "
    "of inputs of another kind, nor of another training with another seed."
)


def card(summary: Summary, evaluation: Evaluation | None = None, sections: Sequence[Section] = ()) -> str:
    """A run's model card in Markdown; ``evaluation`` and its ``sections`` where one lies in the run's folder.

    Source: Mitchell et al. 2019, "Model Cards for Model Reporting" (arXiv:1810.03993), whose headings it follows.
    """
    parts = [
        f"# {cell(summary.task.name)}, compressed",
        cell(summary.verdict.sentence),
        "## Intended use",
        bullets(_use(summary, evaluation)),
        "## Data",
        bullets(_data(summary)),
        "## Method",
        _method(summary),
        "## Numbers",
        table_markdown(_numbers(summary)),
        _INTERVALS,
        "## Behaviour against the original",
        _behaviour(evaluation, sections),
        "## Limits",
        bullets(_limits(summary, evaluation)),
        "## How to load it",
        'In Python: `tersor.load("model", model=original)`, the original being the architecture that you began with. '
        "Elsewhere: `model.onnx` with ONNX Runtime.",
        "## How to get the same again",
        bullets(_again(summary)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _use(summary: Summary, evaluation: Evaluation | None) -> Iterable[str]:
    yield (
        f"What the original is used for, on inputs like those of its test data ({summary.task.name}). Compression "
        "adds no use that the original was not fit for."
    )
    if evaluation is not None and evaluation.gate.application:
        yield f"It was held to what is allowed for {evaluation.gate.explanation}."
    yield "Not for inputs of another kind: what was not in the test data was not measured, but for what is said below."


def _data(summary: Summary) -> Iterable[str]:
    task = summary.task
    yield f"{task.name}" + (f", from {task.source}" if task.source and task.source != task.name else "")
    samples = {"training": task.samples.train, "validation": task.samples.validation, "test": task.samples.test}
    for split, n in samples.items():
        if n is not None:
            yield f"{split}: {counted(n, 'sample')}"
    yield from task.notes


def _method(summary: Summary) -> str:
    steps = "\n".join(f"{step.number}. {cell(step.label)}" for step in summary.steps)
    told = f"Recipe `{cell(summary.recipe.name)}`. {cell(summary.recipe.explanation)}".rstrip()
    shipped = summary.final
    last = summary.steps[-1].number if summary.steps else 0
    note = ""
    if shipped is not None and shipped.number != last:
        note = f"What is shipped is the model after step {shipped.number}, {cell(shipped.label)}."
    return "\n\n".join(part for part in (told, steps, note) if part)


def _numbers(summary: Summary) -> Table:
    """The original and what is shipped, measured alike in one run."""
    ends = [row for row in rows(summary) if row.kind in ("baseline", "final")]
    body = tuple(
        (column.title, *(both_of(row.at(column)) for row in ends)) for column in present(all_columns(summary), ends)
    )
    return Table(("", *("Original" if row.kind == "baseline" else "Compressed" for row in ends)), body)


def _behaviour(evaluation: Evaluation | None, sections: Sequence[Section]) -> str:
    if evaluation is None:
        return (
            "Not evaluated beyond the numbers above: calibration, robustness, changed answers and groups of people "
            "are not known. `tersor evaluate` measures them, and writes them here where its `-o` is this run's "
            "folder."
        )
    told = (
        f"{evaluation.compressed.name} ({evaluation.compressed.backend}) beside {evaluation.original.name} "
        f"({evaluation.original.backend}), {counted(evaluation.data.samples, 'sample')} of {evaluation.data.name}. "
        f"{STATUS[evaluation.gate.status]}: {headline(evaluation)}"
    )
    says = [line for section in sections if section.key in _BEHAVIOUR for line in section.says]
    return f"{cell(told)}\n\n{bullets(says)}"


def _limits(summary: Summary, evaluation: Evaluation | None) -> Iterable[str]:
    yield from findings(summary)
    for stage in summary.steps:
        for group in group_skips((skip.place, skip.reason) for skip in stage.skips):
            yield f"“{stage.name}” passed over {counted(len(group.places), 'place')}: {group.reason}"
    if evaluation is None:
        return
    yield from evaluation.notes
    for each in evaluation.skipped:
        yield f"Not measured: {each.what} ({each.why})"


def _again(summary: Summary) -> Iterable[str]:
    if summary.reproduce.command:
        yield f"command: {summary.reproduce.command}"
    if summary.reproduce.seed is not None:
        yield f"seed: {summary.reproduce.seed}"
    if summary.reproduce.base_sha256:
        yield f"original's weights, SHA-256: {summary.reproduce.base_sha256}"
    yield from (f"{name}: {value}" for name, value in summary.environment.items() if value)
    yield f"Tersor {summary.tersor}; every number with its conditions: summary.json and report.html of the run"
