"""Quality: the metric of both, the paired difference, classes, and where confusions moved."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.patches import Rectangle

from tersor.measure.behaviour.schema import ClassQuality, Evaluation, Quality
from tersor.report.behaviour.words import (
    NAME,
    capital,
    class_of,
    counted,
    larger,
    metric_of,
    moved,
    proven,
    row_of,
)
from tersor.report.forest import forest
from tersor.report.format import MISSING, bare_of, both_of, human, p_of, shorten, turned, value_of
from tersor.report.page import Section, Table
from tersor.report.plots import Plot
from tersor.report.svg import ACCENT, AFTER, GRID, INK, inline, new_figure, settings

_HEATED = 20  # classes up to which the change of the confusion matrix is drawn
_WRITTEN = 12  # and its counts are written
_MEANING = (
    "Both models answered the very same {rows}, so the loss is measured in pairs: its 95 % interval is that of the "
    "difference itself, which is narrower than the two models' own intervals let one think."
)
_CONFUSION = (
    "Which mistakes became more and which fewer: a row is what it is, a column what was said. A loss that looks small "
    "may all be one pair of classes."
)


def quality_section(found: Evaluation) -> Section | None:
    """The metric, its paired difference, McNemar's test and the classes; None without targets."""
    quality = found.quality
    if quality is None:
        return None
    metric = capital(metric_of(found))
    rows: list[tuple[str, ...]] = [(metric, both_of(quality.original), both_of(quality.compressed), _change(found))]
    for name in ("perplexity", "rmse"):
        if f"original_{name}" in quality.more:
            pair = (both_of(quality.more[f"{which}_{name}"]) for which in ("original", "compressed"))
            rows.append((human(name).upper() if name == "rmse" else capital(name), *pair, MISSING))
    tables = [Table(("", "Original", "Compressed", "Change"), tuple(rows))]
    if quality.per_class:
        tables.append(_classes(found, quality))
    says = tuple(filter(None, (_loss(found), _mcnemar(found, quality), _worst_class(quality))))
    return Section(
        "quality",
        "Quality",
        _MEANING.format(rows=f"{row_of(found)}s"),
        says,
        tuple(tables),
        tuple(_plots(found, quality)),
    )


def confusion_section(found: Evaluation) -> Section | None:
    """The cells of the confusion matrix that changed; None where none did."""
    quality = found.quality
    if quality is None or not quality.shifts:
        return None
    rows = tuple(
        (
            f"{class_of(found, each.actual)} taken for {class_of(found, each.predicted)}",
            f"{each.original:,}", f"{each.compressed:,}", f"{each.compressed - each.original:+,}".replace("-", "−"),
        )
        for each in quality.shifts
    )  # fmt: skip
    table = Table(("Mistake", "Original", "Compressed", "Change"), rows, "Counts; the largest changes first.")
    plot = _heat(found, quality)
    return Section("confusions", "Which mistakes changed", _CONFUSION, (), (table,), (plot,) if plot else ())


def _change(found: Evaluation) -> str:
    """The metric's own change with its sign: what was lost, turned where more is better."""
    assert found.quality is not None
    drop = found.quality.drop
    change = turned(drop) if found.data.higher_is_better else drop
    return f"{'+' if change.value > 0 else ''}{both_of(change)}"


def _loss(found: Evaluation) -> str:
    assert found.quality is not None
    drop = found.quality.drop
    words = capital(moved(metric_of(found), drop, worse_is_up=not found.data.higher_is_better))
    if proven(drop):
        return f"{words}: more than chance explains."
    return (
        f"{words}: the interval holds zero, so no change is shown; a loss of up to {larger(drop)} "
        "is not ruled out either."
    )


def _mcnemar(found: Evaluation, quality: Quality) -> str:
    test = quality.mcnemar
    if test is None:
        return ""
    said = f"{counted(test.turned_wrong, row_of(found))} turned wrong and {test.turned_right:,} turned right"
    if test.turned_wrong + test.turned_right == 0:
        return f"{said}."
    return (
        f"{said}; were both equally likely, a split at least as uneven would come by chance with probability "
        f"{p_of(test.p_mid)} (McNemar's test, mid-p)."
    )


def _sorted(quality: Quality) -> list[ClassQuality]:
    return sorted(quality.per_class, key=lambda each: -each.drop.value)


def _worst_class(quality: Quality) -> str:
    if len(quality.per_class) < 2:
        return ""
    worst = _sorted(quality)[0]
    named = [each for each in _sorted(quality) if each.p_adjusted < 0.05 and each.drop.value > 0]
    if named:
        told = ", ".join(f"{shorten(each.name, NAME)} by {bare_of(each.drop)}" for each in named[:5])
        return f"Classes that lose more than chance explains, corrected for their number: {told}."
    if worst.drop.value <= 0:
        return "No class lost any of its recall."
    return (
        f"No single class can be shown to lose, corrected for their number; the most, {bare_of(worst.drop)}, is lost "
        f"by the class “{shorten(worst.name, NAME)}” ({worst.n:,} samples)."
    )


def _classes(found: Evaluation, quality: Quality) -> Table:
    rows = tuple(
        (
            shorten(each.name, NAME), f"{each.n:,}", value_of(each.original), value_of(each.compressed),
            bare_of(each.drop), p_of(each.p_adjusted),
        )
        for each in _sorted(quality)
    )  # fmt: skip
    header = ("Class", "Samples", "Original", "Compressed", "Lost", "p, corrected")
    caption = (
        "Recall: how many samples of the class are found. p by McNemar's test, corrected for the number of classes "
        "(Holm)."
    )
    return Table(header, rows, caption, f"All {len(rows)} classes")


def _plots(found: Evaluation, quality: Quality) -> list[Plot]:
    limit = next((check.limit for check in found.gate.checks if check.name == "max_drop"), None)
    rows = [(f"{metric_of(found)}, all", quality.drop), *((each.name, each.drop) for each in _sorted(quality))]
    many = "each class by its recall, the heaviest loss first" if quality.per_class else "of all that were compared"
    caption = (
        f"What was lost, {many}. A dot is the measured difference, the bar its 95 % interval: a bar that crosses the "
        "line at zero shows no change. Classes have fewer samples, so their bars are longer."
    )
    if limit is not None:
        caption += f" Dashed: the limit, which is on the loss of {metric_of(found)} over all, not of single classes."
    plot = forest("lost", "What was lost", caption, rows, limit=limit)
    return [plot] if plot is not None and quality.per_class else []


@mpl.rc_context(settings())
def _heat(found: Evaluation, quality: Quality) -> Plot | None:
    """The change of each cell off the diagonal; None for two classes, very many, and where nothing changed."""
    if not quality.confusion or not 2 < found.data.classes <= _HEATED:
        return None
    change = np.asarray(quality.confusion["compressed"]) - np.asarray(quality.confusion["original"])
    np.fill_diagonal(change, 0)
    most = int(np.abs(change).max())
    if most == 0:
        return None
    figure = new_figure(360)
    axes = figure.subplots()
    count = len(change)
    for row in range(count):
        axes.add_patch(Rectangle((row - 0.5, row - 0.5), 1, 1, facecolor=GRID, alpha=0.45, linewidth=0))
    for row, column in zip(*np.nonzero(change), strict=True):
        value = int(change[row, column])
        colour = ACCENT if value > 0 else AFTER
        shade = 0.15 + 0.75 * abs(value) / most
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, alpha=shade, linewidth=0))
        if count <= _WRITTEN:
            text = f"{value:+d}".replace("-", "−")
            axes.text(column, row, text, ha="center", va="center", color=INK)
    names = [shorten(class_of(found, index), 12) for index in range(count)]
    axes.set_xticks(range(count), labels=names, rotation=0 if max(map(len, names)) < 3 else 60, ha="center")
    axes.set_yticks(range(count), labels=names)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set_xlabel("said")
    axes.set_ylabel("is")
    title = "Mistakes gained and lost"
    told = "; ".join(
        f"{class_of(found, int(row))} as {class_of(found, int(column))} {int(change[row, column]):+d}"
        for row, column in zip(*np.nonzero(change), strict=True)
    )
    caption = (
        "How many more (orange, +) or fewer (teal, −) of each mistake the compressed model makes. Grey: the right "
        "answers."
    )
    return Plot("confusions", title, caption, inline(figure, "confusions", f"{title}. {told}"))
