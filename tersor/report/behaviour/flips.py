"""How alike the two answer, which answers changed, and the samples where that hurt most, drawn."""

from __future__ import annotations

import matplotlib as mpl

from tersor.core.measurement import Measurement
from tersor.measure.behaviour.schema import Answer, Evaluation, Flip
from tersor.report.behaviour.words import agreement_words, capital, class_of, counted, row_of
from tersor.report.format import bare_of, both_of, human, value_of
from tersor.report.page import Sample, Section, Table
from tersor.report.picture import numbers_text, picture_uri
from tersor.report.plots import Plot
from tersor.report.svg import ACCENT, AFTER, BEFORE, INK, MUTED, inline, new_figure, settings

_MEANING = (
    "Accuracy hides changes: a model may lose as many right answers as it gains, and answer differently all the same. "
    "Here each {row} is compared with itself."
)
_WORST = {
    "classes": "The samples on which the right class lost most probability, the worst first: what the original got "
    "right and the compressed model gets wrong. The name is what it is, “was” the original's answer, “now” the "
    "compressed model's. Look for what they share.",
    "tokens": "The samples whose loss rose most, the worst first.",
    "numbers": "The samples whose error rose most, the worst first.",
}
_UNLABELLED = "The samples on which the two models part most, the worst first; which of them is right is not known."
_NAMES = {
    "top_1": "Same answer",
    "divergence": "Divergence (KL): how far apart the probabilities are",
    "confidence_change": "Change of confidence",
    "error_correlation": "Correlation of errors (1: the same samples go wrong)",
    "error_consistency": "Consistency of errors (κ; 0: as by chance)",
    "same_error": "Where both are wrong: the same wrong answer",
    "rms_difference": "Distance of the outputs (root mean square)",
}
_PARTS = (
    ("both_right", "both right", BEFORE),
    ("turned_wrong", "turned wrong", ACCENT),
    ("turned_right", "turned right", AFTER),
    ("both_wrong", "both wrong", MUTED),
)


def agreement_section(found: Evaluation) -> Section:
    """How alike the answers are, and how many turned wrong or right."""
    rows = [(_name(key), bare_of(measured)) for key, measured in found.agreement.items()]
    told = {key: measured for key, measured in found.flips.measurements.items() if key != "changed"}
    rows += [(capital(human(key)), both_of(measured)) for key, measured in told.items()]
    plot = _bars(found)
    return Section(
        "agreement", "Same answers, changed answers", _MEANING.format(row=row_of(found)),
        (f"{capital(agreement_words(found))}.",), (Table(("", "Measured"), tuple(rows)),), (plot,) if plot else (),
    )  # fmt: skip


def flips_section(found: Evaluation) -> Section | None:
    """The worst samples with their inputs; None where no answer changed for the worse."""
    worst = found.flips.worst
    if not worst:
        return None
    meaning = _WORST[found.data.kind] if found.data.labelled else _UNLABELLED
    return Section("flips", "Where it hurts most", meaning, samples=tuple(_sample(found, each) for each in worst))


def _name(key: str) -> str:
    if key.startswith("top_") and key != "top_1":
        return f"Shared among the best {key.removeprefix('top_')}"
    return _NAMES.get(key, capital(human(key)))


def _sample(found: Evaluation, flip: Flip) -> Sample:
    lines = [_said("was", found, flip.original), _said("now", found, flip.compressed)]
    if flip.original is None:
        lines.append(f"{'loss' if found.data.kind == 'tokens' else 'squared error'} up by {flip.severity:.3g}")
    picture = ""
    if flip.input is not None:
        picture = picture_uri(flip.input)
        if not picture:
            lines.append(numbers_text(flip.input))
    number = f"sample {flip.sample:,}"
    if flip.actual is None:
        return Sample(capital(number), tuple(filter(None, lines)), picture)
    return Sample(class_of(found, flip.actual), tuple(filter(None, [*lines, number])), picture)


def _said(which: str, found: Evaluation, answer: Answer | None) -> str:
    if answer is None:
        return ""
    return f"{which}: {class_of(found, answer.predicted)}, {answer.confidence:.0%}".replace("%", " %")


@mpl.rc_context(settings())
def _bars(found: Evaluation) -> Plot | None:
    """The four outcomes as bars on one scale; None without targets."""
    measured = found.flips.measurements
    parts = [(name, measured[key], colour) for key, name, colour in _PARTS if key in measured]
    if len(parts) < 2:
        return None
    figure = new_figure(40 + 25 * len(parts))
    axes = figure.subplots()
    for row, (_, each, colour) in enumerate(parts):
        axes.barh(row, 100 * each.value, height=0.62, color=colour, zorder=2)
        axes.text(100 * each.value + 1.5, row, _told(each, found), va="center", color=INK)
    axes.set_yticks(range(len(parts)), labels=[name for name, *_ in parts])
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set_xlim(0, 150)
    axes.set_xticks([])
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    title = "What became of the answers"
    told = "; ".join(f"{name} {both_of(each)}" for name, each, _ in parts)
    caption = (
        f"Every one of the {counted(found.data.rows, row_of(found))} is in one of the bars. Turned wrong: right "
        "before, wrong after compression; turned right: the other way round."
    )
    return Plot("outcomes", title, caption, inline(figure, "outcomes", f"{title}. {told}"))


def _told(each: Measurement, found: Evaluation) -> str:
    count = f"{round(each.value * found.data.rows):,}"
    return f"{count}, {value_of(each)}"
