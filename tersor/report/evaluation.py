"""An evaluation for people who were not there."""

from __future__ import annotations

from collections.abc import Sequence

from tersor.core.measurement import Measurement
from tersor.measure.behaviour.schema import Evaluation
from tersor.report.behaviour.calibration import calibration_section, outside_section
from tersor.report.behaviour.flips import agreement_section, flips_section
from tersor.report.behaviour.gate import STATUS, gate_section, headline
from tersor.report.behaviour.groups import groups_section
from tersor.report.behaviour.quality import confusion_section, quality_section
from tersor.report.behaviour.robustness import robustness_section
from tersor.report.behaviour.words import capital, counted, metric_of
from tersor.report.format import duration, interval_of, plain, scale_of, shorten, turned, value_of
from tersor.report.page import Document, Figure, Section

NAME = 60


_STATUS = {"passed": "passed", "failed": "failed", "not enough data": "open", "nothing asked": "muted"}
_READING = (
    "The compressed model against the original, on the same inputs. In brackets: the 95 % interval, which holds the "
    "true value nineteen times in twenty."
)


def evaluation_document(found: Evaluation, more: Sequence[Section] = ()) -> Document:
    """The verdict, then every section; ``more``: of other measurements of the two models."""
    one, other = shorten(found.original.name, NAME), shorten(found.compressed.name, NAME)
    title = f"{other} beside {one}"
    return Document(
        title=title,
        kicker=("Tersor evaluation", title, f"{found.data.name}, {counted(found.data.samples, 'sample')}"),
        status=_STATUS[found.gate.status], word=STATUS[found.gate.status], headline=headline(found),
        sections=(*behaviour_sections(found), *more), source="evaluation.json", tersor=found.tersor,
        figures=tuple(figures(found)), reading=_READING, notes=found.notes,
        skipped=tuple((each.what, each.why) for each in found.skipped), facts=tuple(asked(found)),
    )  # fmt: skip


def behaviour_sections(found: Evaluation) -> tuple[Section, ...]:
    """Every section that the numbers at hand allow, the limits first."""
    parts = (
        gate_section(found), quality_section(found), agreement_section(found), flips_section(found),
        confusion_section(found), calibration_section(found), robustness_section(found), groups_section(found),
        outside_section(found),
    )  # fmt: skip
    return tuple(part for part in parts if part is not None)


def figures(found: Evaluation) -> list[Figure]:
    """The large figures at the top."""
    chosen: list[Figure] = []
    if found.quality is not None:
        drop = found.quality.drop
        gained = drop.value < 0
        size = turned(drop) if gained else drop
        unit = scale_of(size.value, size.unit).suffix.strip() or "points"
        better = "better" if gained else "lost"
        chosen.append(Figure(_number(size), f"{unit} of {metric_of(found)} {better}", interval_of(size)))
    for measured, label in (
        (found.agreement.get("top_1"), "same answers"),
        (found.flips.measurements.get("turned_wrong"), "of the answers turned wrong"),
    ):
        if measured is not None:
            chosen.append(Figure(value_of(measured), label, interval_of(measured)))
    if found.calibration is not None:
        rise = found.calibration.ece_increase
        size = turned(rise) if rise.value < 0 else rise
        label = f"{'less' if rise.value < 0 else 'more'} calibration error"
        chosen.append(Figure(_number(size), label, interval_of(size)))
    return chosen


def _number(measured: Measurement) -> str:
    return scale_of(measured.value, measured.unit).bare(measured.value)


def asked(found: Evaluation) -> list[tuple[str, str]]:
    """What was compared, on what, and how it was asked for."""
    data = found.data
    facts = [
        ("original", _model(found.original.name, found.original.source, found.original.backend)),
        ("compressed", _model(found.compressed.name, found.compressed.source, found.compressed.backend)),
        ("data", f"{shorten(data.name, NAME)}{f' ({shorten(data.source, NAME)})' if data.source else ''}"),
        ("samples", f"{data.samples:,}" + (f", {data.rows:,} positions" if data.kind == "tokens" else "")),
    ]
    if data.classes:
        facts.append(("classes", f"{data.classes:,}"))
    facts += [(capital(name), shorten(plain(value), 200)) for name, value in found.settings.items() if value]
    return [
        *facts,
        ("took", duration(found.seconds)),
        *((name, value) for name, value in found.environment.items() if value),
    ]


def _model(name: str, source: str, backend: str) -> str:
    where = f" from {shorten(source, NAME)}" if source and source != name else ""
    return f"{shorten(name, NAME)}{where}, {backend}"
