"""Both models on corrupted and attacked inputs: curves over the severity, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil

import matplotlib as mpl
from matplotlib.axes import Axes

from tersor.core.measurement import Measurement
from tersor.measure.behaviour.schema import Condition, Evaluation, Robustness
from tersor.report.behaviour.words import capital, counted, metric_of, moved_or_chance, proven
from tersor.report.format import MISSING, bare_of, both_of, human, scale_of, shorten, value_of
from tersor.report.page import Section, Table
from tersor.report.plots import Plot
from tersor.report.svg import AFTER, BEFORE, inline, new_figure, quiet_axis, settings

_MEANING = (
    "Models meet worse inputs than test data. Both were given the same {n:,} samples, corrupted in the same way at "
    "rising severity{attacked}. What counts is whether the compressed model breaks sooner than the original. {scale}."
)
_ATTACKED = ", and moved on purpose within a small budget, each in the direction that hurts most"
_WORDS = {"fgsm": "FGSM", "pgd": "PGD"}
_PANELS = 14  # that are drawn; the rest is in the table


def robustness_section(found: Evaluation) -> Section | None:
    """Curves and tables of corruptions and attacks; None where none were tried."""
    tried = found.robustness
    if tried is None:
        return None
    meaning = _MEANING.format(n=tried.samples, attacked=_ATTACKED if tried.attacks else "", scale=capital(tried.scale))
    plots = (_corruptions(found, tried), _attacks(found, tried))
    tables = (_table(found, tried, corrupted=True), _table(found, tried, corrupted=False))
    return Section(
        "robustness", "On corrupted and attacked inputs", meaning, tuple(_says(found, tried)),
        tuple(table for table in tables if table is not None), tuple(plot for plot in plots if plot is not None),
    )  # fmt: skip


def strongest(conditions: Sequence[Condition]) -> list[Condition]:
    """Each corruption, or attack by each model, at its highest severity."""
    found: dict[tuple[str, str], Condition] = {}
    for each in conditions:
        key = each.name, each.against
        if key not in found or each.severity > found[key].severity:
            found[key] = each
    return list(found.values())


def attack_of(condition: Condition) -> str:
    """An attack as people write it: "PGD 8/255, made against lenet"."""
    name = _WORDS.get(condition.name, human(condition.name))
    return f"{name} {_budget(condition.severity)}, made against {shorten(condition.against, 24)}"


def _budget(value: float) -> str:
    whole = value * 255
    return f"{round(whole)}/255" if abs(whole - round(whole)) < 1e-6 else f"{value:.3g}"


def _says(found: Evaluation, tried: Robustness) -> Iterable[str]:
    metric, up = metric_of(found), not found.data.higher_is_better
    samples = counted(tried.samples, "sample")
    if tried.mean is not None and tried.mean.drop is not None:
        one, other = value_of(tried.mean.original), value_of(tried.mean.compressed)
        words = moved_or_chance(metric, tried.mean.drop, worse_is_up=up)
        yield f"Over all corruptions of {samples} the original reaches {one} and the compressed model {other}: {words}."
    worst = [each for each in strongest(tried.corruptions) if each.drop is not None and proven(each.drop)]
    worst = sorted((each for each in worst if each.drop and each.drop.value > 0), key=_loss, reverse=True)[:3]
    if worst:
        told = ", ".join(f"{human(each.name)} at severity {each.severity:g}: {bare_of(each.drop)}" for each in worst)
        yield f"The compressed model loses most to {told}."
    for each in strongest(tried.attacks):
        if each.original is not None and each.compressed is not None:
            one, other = value_of(each.original), value_of(each.compressed)
            yield f"{attack_of(each)}, {samples}: the original keeps {one} {metric}, the compressed model {other}."


def _loss(condition: Condition) -> float:
    return 0.0 if condition.drop is None else condition.drop.value


def _table(found: Evaluation, tried: Robustness, *, corrupted: bool) -> Table | None:
    conditions = tried.corruptions if corrupted else tried.attacks
    if not conditions:
        return None
    rows = [_row("Unchanged", tried.clean)]
    if corrupted and tried.mean is not None:
        rows.append(_row("Mean of all", tried.mean))
    for each in conditions:
        rows.append(_row(f"{capital(human(each.name))} {each.severity:g}" if corrupted else attack_of(each), each))
    header = ("Inputs", "Original", "Compressed", f"{capital(metric_of(found))} lost", "Same answers")
    kind = "corruptions" if corrupted else "attacks"
    return Table(header, tuple(rows), folded=f"All {len(conditions)} {kind}")


def _row(name: str, each: Condition) -> tuple[str, ...]:
    same = MISSING if each.agreement is None else value_of(each.agreement)
    return (name, value_of(each.original), value_of(each.compressed), both_of(each.drop), same)


def _corruptions(found: Evaluation, tried: Robustness) -> Plot | None:
    names = list(dict.fromkeys(each.name for each in tried.corruptions))
    panels = [
        (
            shorten(human(name), 20),
            [(0.0, tried.clean), *((e.severity, e) for e in tried.corruptions if e.name == name)],
        )
        for name in names
    ]
    caption = (
        "Severity 0 is the unchanged input, 5 the strongest. Grey: the original; teal: the compressed model; the "
        "shade is the 95 % interval. Where teal falls below grey, compression cost robustness."
    )
    return _curves("corruptions", "Corrupted inputs", caption, "severity", panels, found)


def _attacks(found: Evaluation, tried: Robustness) -> Plot | None:
    kinds = list(dict.fromkeys((each.name, each.against) for each in tried.attacks))
    panels = [
        (
            f"{_WORDS.get(name, name)} by {shorten(against, 13)}",
            [(0.0, tried.clean)]
            + [(255 * e.severity, e) for e in tried.attacks if (e.name, e.against) == (name, against)],
        )
        for name, against in kinds
    ]
    caption = (
        "How far each pixel may be moved, in 255ths. A panel names the attack and whose gradients made the inputs: a "
        "model withstands what was made against another more easily. Grey: the original; teal: the compressed model."
    )
    return _curves("attacks", "Attacked inputs", caption, "budget, 255ths", panels, found)


@mpl.rc_context(settings())
def _curves(
    key: str, title: str, caption: str, unit: str, panels: Sequence[tuple[str, list[tuple[float, Condition]]]],
    found: Evaluation,
) -> Plot | None:  # fmt: skip
    drawn = [(name, points) for name, points in panels if any(each.original or each.agreement for _, each in points)][
        :_PANELS
    ]
    if not drawn:
        return None
    rows = ceil(len(drawn) / 2)
    figure = new_figure(36 + 128 * rows)
    grid = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True).ravel()
    told = []
    for axes, (name, points) in zip(grid, drawn, strict=False):
        axes.set_title(name)
        told.append(f"{name}: {_panel(axes, points)}")
        quiet_axis(axes, grid="y")
    for axes in grid[len(drawn) :]:
        axes.set_visible(False)
    label, suffix = _label(found)
    figure.supxlabel(unit, fontsize=12)
    figure.supylabel(f"{label},{suffix}" if suffix.strip() else label, fontsize=12)
    left_out = len(panels) - len(drawn)
    more = f" {left_out} more are in the table." if left_out > 0 else ""
    return Plot(key, title, caption + more, inline(figure, key, f"{title}. {'. '.join(told)}"))


def _label(found: Evaluation) -> tuple[str, str]:
    if found.quality is None:
        return "same answers", " %"
    scale = scale_of(found.quality.original.value, found.quality.original.unit)
    return metric_of(found), scale.suffix if scale.factor != 1 else ""


def _panel(axes: Axes, points: list[tuple[float, Condition]]) -> str:
    """Lines of both models, or of their agreement where there are no targets; returns what it shows in words."""
    lines: list[tuple[str, str, list[tuple[float, Measurement]]]] = [
        ("original", BEFORE, [(x, each.original) for x, each in points if each.original is not None]),
        ("compressed", AFTER, [(x, each.compressed) for x, each in points if each.compressed is not None]),
    ]
    if not any(line for *_, line in lines):
        lines = [("same answers", AFTER, [(x, each.agreement) for x, each in points if each.agreement is not None])]
    told = []
    for name, colour, line in lines:
        line.sort(key=lambda point: point[0])
        factor = scale_of(line[0][1].value, line[0][1].unit).factor
        x, y = [at for at, _ in line], [factor * m.value for _, m in line]
        low = [factor * (m.value if m.low is None else m.low) for _, m in line]
        high = [factor * (m.value if m.high is None else m.high) for _, m in line]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, y, "o-", color=colour, markersize=3.5, linewidth=1.6, markeredgewidth=0)
        told.append(f"{name} {', '.join(value_of(m) for _, m in line)}")
    return "; ".join(told)
