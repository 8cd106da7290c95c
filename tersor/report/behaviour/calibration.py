"""How far confidence can be believed: reliability diagrams before and after temperature scaling, and other data."""

from __future__ import annotations

import matplotlib as mpl
from matplotlib.axes import Axes

from tersor.core.measurement import Measurement
from tersor.measure.behaviour.schema import Bins, Evaluation, ModelCalibration
from tersor.report.behaviour.words import capital, moved, proven
from tersor.report.format import MISSING, bare_of, value_of
from tersor.report.page import Section, Table
from tersor.report.plots import Plot
from tersor.report.svg import AFTER, BEFORE, MUTED, inline, new_figure, quiet_axis, settings

_MEANING = (
    "A model that says 80 % should be right in 80 % of such cases. Where it is right less often it is too sure of "
    "itself, which compression may bring about while accuracy stays. Temperature scaling divides the scores by one "
    "number, fitted on other samples, and changes no answer."
)
_NAMES = {
    "ece_debiased": "Calibration error (ECE, debiased)",
    "ece": "ECE, bins of equal width",
    "ece_equal_mass": "ECE, bins of equal numbers",
    "mce": "Largest error of a bin (MCE)",
    "brier": "Brier score",
    "nll": "Loss (negative log-likelihood)",
    "confidence": "Mean confidence",
}
_OUTSIDE = (
    "Inputs from another data set, to which no answer is right. A model that can be trusted is less sure there than at "
    "home. AUROC says how well confidence tells the two apart: 1 always, 0.5 no better than chance."
)


def calibration_section(found: Evaluation) -> Section | None:
    """Reliability diagrams and errors of both models; None without class scores and targets."""
    calibration = found.calibration
    if calibration is None:
        return None
    pair = calibration.original, calibration.compressed
    rows = [
        (name, *(bare_of(each.measurements.get(key)) for each in pair))
        for key, name in _NAMES.items()
        if key in pair[0].measurements
    ]
    scaled = [each.scaled.get("ece_debiased") for each in pair]
    if any(scaled):
        rows.insert(1, ("The same, after temperature scaling", *map(bare_of, scaled)))
    if any(each.temperature is not None for each in pair):
        rows.append(("Temperature", *(_temperature(each) for each in pair)))
    increase = calibration.ece_increase
    verdict = "more than chance explains" if proven(increase) else "the interval holds zero, so no change is shown"
    says = [f"{capital(moved('the calibration error', increase, worse_is_up=True))}: {verdict}."]
    says += [f"{name}: {_sure(each)}." for name, each in zip(("Original", "Compressed"), pair, strict=True)]
    fitted = next((each.fitted_on for each in pair if each.fitted_on), "")
    caption = f"Temperatures were fitted on {fitted}." if fitted else ""
    plots = [_diagram("reliability", "Reliability, as the models are", [each.bins for each in pair])]
    after = [each.scaled_bins for each in pair]
    if after[0] is not None and after[1] is not None:
        plots.append(_diagram("scaled", "Reliability, after temperature scaling", [after[0], after[1]]))
    table = Table(("", "Original", "Compressed"), tuple(rows), caption)
    return Section("calibration", "Whether confidence can be believed", _MEANING, tuple(says), (table,), tuple(plots))


def outside_section(found: Evaluation) -> Section | None:
    """What both say of data from elsewhere; None where there were none."""
    outside = found.outside
    if not outside:
        return None

    def both(name: str) -> list[str]:
        return [bare_of(outside.get(f"{which}_{name}")) for which in ("original", "compressed")]

    rows = (
        ("Confidence at home", *both("confidence_inside")),
        ("Confidence elsewhere", *both("confidence")),
        ("AUROC of telling them apart", *both("auroc")),
    )
    says = []
    if (drop := outside.get("auroc_drop")) is not None:
        verdict = "more than chance explains" if proven(drop) else "the interval holds zero, so no change is shown"
        says.append(f"{capital(moved('AUROC of telling them apart', drop))}: {verdict}.")
    if (same := outside.get("agreement")) is not None:
        says.append(f"Elsewhere the two give the same answer for {bare_of(same)} of {same.n:,} samples.")
    table = Table(("", "Original", "Compressed"), rows)
    return Section("elsewhere", "On data from elsewhere", _OUTSIDE, tuple(says), (table,))


def _temperature(model: ModelCalibration) -> str:
    return MISSING if model.temperature is None else f"{model.temperature:.2f}"


def _sure(model: ModelCalibration) -> str:
    """Whether the model is too sure of itself, by what the temperature and the confidence say."""
    bins = model.bins
    n = sum(bins.count)
    confidence = sum(c * m for c, m in zip(bins.count, bins.confidence, strict=True)) / n
    accuracy = sum(c * a for c, a in zip(bins.count, bins.accuracy, strict=True)) / n
    gap = Measurement(100 * (confidence - accuracy), "points")
    told = f"{confidence:.1%} sure on average and {accuracy:.1%} right".replace("%", " %")
    if abs(gap.value) < 0.05:
        return told
    size = value_of(Measurement(abs(gap.value), "points"))
    return f"{told}: {size} too {'sure' if gap.value > 0 else 'cautious'}"


@mpl.rc_context(settings())
def _diagram(key: str, title: str, models: list[Bins]) -> Plot:
    figure = new_figure(290)
    grid = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[4, 1])
    told = []
    for column, (name, bins, colour) in enumerate(
        zip(("original", "compressed"), models, (BEFORE, AFTER), strict=True)
    ):
        _reliability(grid[0, column], bins, colour)
        grid[0, column].set_title(name)
        _histogram(grid[1, column], bins, colour)
        each = ", ".join(f"{c:.2f} sure {a:.2f} right" for c, a in zip(bins.confidence, bins.accuracy, strict=True))
        told.append(f"{name}: {each}")
    grid[0, 0].set_ylabel("right, %")
    grid[1, 0].set_ylabel("share")
    figure.supxlabel("confidence, %", fontsize=12, color=MUTED)
    caption = (
        "Each dot is a bin of answers: how sure the model was, and how many of them were right, with the 95 % "
        "interval. On the dashed line confidence is honest; below it the model is too sure. The bars say where its "
        "answers lie."
    )
    return Plot(key, title, caption, inline(figure, key, f"{title}. {'. '.join(told)}"))


def _reliability(axes: Axes, bins: Bins, colour: str) -> None:
    x, y = ([100 * value for value in values] for values in (bins.confidence, bins.accuracy))
    low = [max(0.0, 100 * (a - b)) for a, b in zip(bins.accuracy, bins.accuracy_low, strict=True)]
    high = [max(0.0, 100 * (b - a)) for a, b in zip(bins.accuracy, bins.accuracy_high, strict=True)]
    axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.errorbar(x, y, yerr=[low, high], fmt="none", ecolor=colour, elinewidth=1.1, capsize=2, alpha=0.8, zorder=2)
    axes.plot(x, y, "o-", color=colour, markersize=5, linewidth=1, markeredgewidth=0, zorder=3)
    axes.set_xlim(0, 100)
    axes.set_ylim(-3, 104)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_yticks([0, 25, 50, 75, 100])
    quiet_axis(axes, grid="y")


def _histogram(axes: Axes, bins: Bins, colour: str) -> None:
    n = sum(bins.count)
    starts = [100 * low for low in bins.low]
    widths = [0.9 * 100 * (high - low) for low, high in zip(bins.low, bins.high, strict=True)]
    axes.bar(starts, [100 * c / n for c in bins.count], width=widths, align="edge", color=colour)
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 100], labels=["0", "100 %"])
    quiet_axis(axes, grid="y")
