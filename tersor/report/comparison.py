"""An evaluation of two models in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersor.measure.behaviour.schema import Condition, Evaluation, parse_evaluation
from tersor.report.format import MISSING, bare_of, both_of, human, p_of, shorten, value_of
from tersor.report.table import plain_table

_STYLES = {"passed": "bold green", "failed": "bold red", "not enough data": "bold yellow", "nothing asked": "dim"}
_CLASSES, _FLIPS, _NAME = 8, 5, 30


def comparison_view(data: Mapping[str, Any]) -> RenderableType:
    """What an evaluation says: metric, agreement, flips, calibration, classes, groups, robustness, what was skipped."""
    found = parse_evaluation(data)
    parts: list[RenderableType] = [Text(_heading(found)), _overview(found)]
    tables = (_classes(found), _groups(found), _gaps(found), _robustness(found), _flips(found))
    parts += [table for table in tables if table is not None]
    parts += [Text(f"note: {note}") for note in found.notes]
    parts += [Text(f"left out: {each.what}: {each.why}", style="dim") for each in found.skipped]
    return Group(*parts)


def gate_line(data: Mapping[str, Any]) -> Text:
    """The verdict, coloured."""
    gate = parse_evaluation(data).gate
    return Text(gate.sentence, style=_STYLES[gate.status])


def _heading(found: Evaluation) -> str:
    rows = f", {found.data.rows:,} positions" if found.data.kind == "tokens" else ""
    one, other = (f"{model.name} ({model.backend})" for model in (found.original, found.compressed))
    return (
        f"{other} beside {one}, {found.data.samples:,} samples{rows} of {found.data.name}; 95 % intervals in brackets"
    )


def _overview(found: Evaluation) -> Table:
    table = plain_table("", "original", "compressed", "change")
    if found.quality is not None:
        quality = found.quality
        name = human(found.data.metric or "metric")
        table.add_row(name, both_of(quality.original), both_of(quality.compressed), f"lost {both_of(quality.drop)}")
        for more in ("perplexity", "rmse"):
            if f"original_{more}" in quality.more:
                pair = (quality.more[f"{which}_{more}"] for which in ("original", "compressed"))
                table.add_row(human(more), *map(bare_of, pair), "")
    if found.calibration is not None:
        calibration = found.calibration
        models = calibration.original.measurements, calibration.compressed.measurements
        change = {"ece_debiased": bare_of(calibration.ece_increase)}
        for key, name in (("ece_debiased", "calibration error"), ("brier", "Brier score"), ("nll", "NLL")):
            table.add_row(name, *(bare_of(each[key]) for each in models), change.get(key, ""))
        scaled = [each.scaled.get("ece_debiased") for each in (calibration.original, calibration.compressed)]
        table.add_row("  after temperature scaling", *(bare_of(each) for each in scaled), "")
    for key, measured in found.agreement.items():
        table.add_row(human(key), "", "", bare_of(measured))
    for key, measured in found.flips.measurements.items():
        if key.startswith("turned"):
            table.add_row(human(key), "", "", bare_of(measured))
    for name in ("confidence", "auroc"):
        if f"original_{name}" in found.outside:
            pair = (found.outside[f"{which}_{name}"] for which in ("original", "compressed"))
            table.add_row(f"elsewhere, {human(name)}", *map(bare_of, pair), "")
    return table


def _classes(found: Evaluation) -> Table | None:
    if found.quality is None or not found.quality.per_class:
        return None
    worst = sorted(found.quality.per_class, key=lambda each: -each.drop.value)[:_CLASSES]
    table = plain_table("class", "n", "original", "compressed", "lost", "p, adjusted")
    table.caption = "Recall; the classes that lose most." if len(worst) < len(found.quality.per_class) else "Recall."
    for each in worst:
        cells = (value_of(each.original), value_of(each.compressed), both_of(each.drop), p_of(each.p_adjusted))
        table.add_row(shorten(each.name, _NAME), f"{each.n:,}", *cells)
    return table


def _groups(found: Evaluation) -> Table | None:
    groups = [(attribute.name, group) for attribute in found.fairness for group in attribute.groups]
    if not groups:
        return None
    table = plain_table("group", "n", "original", "compressed", "lost", "more than the others", "p, adjusted")
    for attribute, group in groups:
        table.add_row(
            shorten(f"{attribute}: {group.name}", _NAME), f"{group.n:,}", value_of(group.original["metric"]),
            value_of(group.compressed["metric"]), both_of(group.drop), both_of(group.excess), p_of(group.p_adjusted),
        )  # fmt: skip
    return table


def _gaps(found: Evaluation) -> Table | None:
    known = [attribute for attribute in found.fairness if attribute.original]
    if not known:
        return None
    table = plain_table("gap between groups", "original", "compressed")
    for attribute in known:
        for name, gap in attribute.original.items():
            cells = both_of(gap), both_of(attribute.compressed.get(name))
            table.add_row(shorten(f"{attribute.name}: {human(name)}", _NAME), *cells)
    return table


def _robustness(found: Evaluation) -> Table | None:
    if found.robustness is None:
        return None
    table = plain_table("on the inputs", "original", "compressed", "lost", "agreement")
    table.caption = f"The first {found.robustness.samples:,} samples. {found.robustness.scale}."
    rows: list[tuple[str, Condition]] = [("unchanged", found.robustness.clean)]
    if found.robustness.mean is not None:
        rows.append(("corrupted, mean", found.robustness.mean))
    rows += [(f"{name} {each.severity:g}", each) for name, each in _strongest(found.robustness.corruptions)]
    rows += [(f"{each.name} {each.severity:.3f} by {each.against}", each) for each in found.robustness.attacks]
    for name, each in rows:
        same = value_of(each.agreement) if each.agreement is not None else MISSING
        table.add_row(
            shorten(name, _NAME), value_of(each.original), value_of(each.compressed), both_of(each.drop), same
        )
    return table


def _strongest(conditions: Sequence[Condition]) -> list[tuple[str, Condition]]:
    """Each corruption at its highest severity."""
    found: dict[str, Condition] = {}
    for each in conditions:
        if each.name not in found or each.severity > found[each.name].severity:
            found[each.name] = each
    return [(human(name), each) for name, each in found.items()]


def _flips(found: Evaluation) -> Table | None:
    worst = [flip for flip in found.flips.worst if flip.original is not None and flip.compressed is not None]
    if not worst:
        return None
    table = plain_table("sample", "actual", "original says", "compressed says")
    names = found.data.class_names

    def said(index: int | None, confidence: float | None = None) -> str:
        if index is None:
            return MISSING
        name = names[index] if index < len(names) else str(index)
        return name if confidence is None else f"{name}, {confidence:.0%}"

    for flip in worst[:_FLIPS]:
        assert flip.original is not None and flip.compressed is not None
        table.add_row(
            str(flip.sample), said(flip.actual), said(flip.original.predicted, flip.original.confidence),
            said(flip.compressed.predicted, flip.compressed.confidence),
        )  # fmt: skip
    table.caption = f"The worst of the answers that changed; {len(worst)} are in evaluation.json."
    return table
