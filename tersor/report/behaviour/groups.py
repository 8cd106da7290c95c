"""Groups of sensitive attributes: who loses more than others, and how far apart the rates are."""

from __future__ import annotations

from tersor.measure.behaviour.schema import Attribute, Evaluation
from tersor.report.behaviour.words import NAME, capital, metric_of
from tersor.report.forest import forest
from tersor.report.format import bare_of, both_of, human, p_of, shorten, value_of
from tersor.report.page import Section, Table
from tersor.report.plots import Plot

_MEANING = (
    "Whether compression takes more from some people than from others. The excess is what a group loses beyond what "
    "all others lose; with many groups some excess comes by chance alone, so p is corrected for their number (Holm)."
)
_GAPS = {
    "demographic_parity": "Demographic parity: largest difference of how often the favourable answer is given",
    "disparate_impact": "Disparate impact: smallest share of favourable answers over the largest (1: equal)",
    "equalised_odds": "Equalised odds: largest difference of true or false positive rates",
    "accuracy_gap": "Largest difference of accuracy",
}
_RATES = {"selection": "chosen", "true_positive": "found (TPR)", "false_positive": "wrongly chosen (FPR)"}


def groups_section(found: Evaluation) -> Section | None:
    """Losses by group, rates and gaps; None where no attribute was named."""
    if not found.fairness:
        return None
    known = [attribute for attribute in found.fairness if attribute.groups]
    says = [line for attribute in found.fairness for line in _says(attribute)]
    tables = [
        table for attribute in known for table in (_losses(found, attribute), _gaps(attribute), _rates(attribute))
    ]
    plots = [plot for number, attribute in enumerate(known) if (plot := _plot(found, attribute, number)) is not None]
    return Section(
        "groups", "Groups of people", _MEANING, tuple(says), tuple(table for table in tables if table), tuple(plots)
    )


def _says(attribute: Attribute) -> list[str]:
    name = capital(shorten(attribute.name, NAME))
    said = [f"{name}: {attribute.note}."] if attribute.note else []
    if attribute.missing:
        said.append(f"{name}: {attribute.missing:,} samples have no value and are left out.")
    if not attribute.groups:
        return said
    shown = [group for group in attribute.groups if group.p_adjusted < 0.05 and group.excess.value > 0]
    if shown:
        told = ", ".join(f"{shorten(group.name, NAME)} by {bare_of(group.excess)}" for group in shown)
        said.append(f"{name}: these lose more than all others, by more than chance explains: {told}.")
    else:
        said.append(f"{name}: it cannot be said that any group loses more than the others.")
    return said


def _losses(found: Evaluation, attribute: Attribute) -> Table:
    rows = tuple(
        (
            shorten(group.name, NAME), f"{group.n:,}", value_of(group.original.get("metric")),
            value_of(group.compressed.get("metric")), bare_of(group.drop), bare_of(group.excess),
            p_of(group.p_adjusted),
        )
        for group in attribute.groups
    )  # fmt: skip
    name = capital(shorten(attribute.name, NAME))
    header = (name, "Samples", "Original", "Compressed", "Lost", "Excess", "p, corrected")
    return Table(header, rows, f"Original, compressed: {metric_of(found)} within the group.")


def _gaps(attribute: Attribute) -> Table | None:
    rows = tuple(
        (_GAPS.get(name, capital(human(name))), both_of(gap), both_of(attribute.compressed.get(name)))
        for name, gap in attribute.original.items()
    )
    name = shorten(attribute.name, NAME)
    return Table((f"Gaps between groups of {name}", "Original", "Compressed"), rows) if rows else None


def _rates(attribute: Attribute) -> Table | None:
    rows = tuple(
        (f"{shorten(group.name, NAME)}: {word}", both_of(group.original[key]), both_of(group.compressed.get(key)))
        for group in attribute.groups
        for key, word in _RATES.items()
        if key in group.original
    )
    name = shorten(attribute.name, NAME)
    header = (capital(name), "Original", "Compressed")
    caption = (
        "Chosen: how often the favourable answer is given. Found: of those to whom it belongs. Wrongly: of the others."
    )
    return Table(header, rows, caption, f"Rates by {name}") if rows else None


def _plot(found: Evaluation, attribute: Attribute, number: int) -> Plot | None:
    limit = next((check.limit for check in found.gate.checks if check.name == "max_group_gap"), None)
    ordered = sorted(attribute.groups, key=lambda group: -group.excess.value)
    rows = [(f"{group.name} ({group.n:,})", group.excess) for group in ordered]
    name = shorten(attribute.name, NAME)
    caption = (
        "What each group loses beyond what all others lose, with its 95 % interval (not corrected for the number of "
        "groups), and its samples. Left of the line a group fares better than the others."
    )
    caption += " Dashed: the limit." if limit is not None else ""
    return forest(f"groups-{number}", f"Excess loss by {name}", caption, rows, limit=limit)
