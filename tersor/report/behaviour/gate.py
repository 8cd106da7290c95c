"""The gate's verdict: the sentence at the top, and the table of limits."""

from __future__ import annotations

from tersor.measure.behaviour.gate import samples_to_tell
from tersor.measure.behaviour.schema import Check, Evaluation
from tersor.report.behaviour.words import agreement_words, capital, loss_words, metric_of, moved_or_chance
from tersor.report.format import MISSING, bare_of, scale_of, shorten
from tersor.report.page import Section, Table

STATUS = {
    "passed": "Passed",
    "failed": "Failed",
    "not enough data": "Not enough data to tell",
    "nothing asked": "No limit was asked",
}
OUTCOME = {"passed": "kept", "failed": "broken", "not enough data": "open"}
_MEANING = (
    "What the compressed model was held to. A limit is kept where the whole 95 % interval keeps it, broken where the "
    "whole interval breaks it, and open where the data cannot tell."
)


def headline(found: Evaluation) -> str:
    """The verdict in one sentence, for somebody who was not there."""
    checks = found.gate.checks
    if not checks:
        return f"{capital('; '.join(filter(None, (agreement_words(found), loss_words(found)))))}."
    decisive = [each for each in checks if each.status == found.gate.status]
    told = "; ".join(_clause(found, each) for each in decisive)
    return f"{capital(told)}."


def gate_section(found: Evaluation) -> Section | None:
    """The limits, what was measured, and how each ended; None where none was asked for."""
    gate = found.gate
    if not gate.checks:
        return None
    rows = tuple(
        (capital(_subject(found, each)), _limit(each), bare_of(each.measured), OUTCOME[each.status])
        for each in gate.checks
    )
    says = [_more(found, each) for each in gate.checks if each.status == "not enough data"]
    if gate.explanation:
        says.append(f"The limit on the loss is that of {gate.explanation}. Presets are a start for a talk, not a rule.")
    table = Table(("Limit", "Asked", "Measured", "Outcome"), rows)
    return Section("gate", "The limits", _MEANING, tuple(filter(None, says)), (table,))


def _clause(found: Evaluation, check: Check) -> str:
    measured = check.measured
    if check.name == "max_drop":
        said = loss_words(found)
    elif check.name == "min_agreement":
        said = agreement_words(found)
    elif check.name == "max_ece_increase":
        said = moved_or_chance("the calibration error", measured, worse_is_up=True)
    else:
        said = f"{_group(check)} loses {bare_of(measured)} more than all others"
    limit = f"{_limit(check)} {'asked' if check.name == 'min_agreement' else 'allowed'}"
    needed = samples_to_tell(check.measured, check.limit) if check.status == "not enough data" else None
    more = "" if needed is None else f": about {needed:,} samples would tell, there are {check.measured.n:,}"
    return f"{said}; {limit}{more}"


def _subject(found: Evaluation, check: Check) -> str:
    return {
        "max_drop": f"loss of {metric_of(found)}",
        "min_agreement": "same answers",
        "max_ece_increase": "rise of the calibration error",
        "max_group_gap": f"excess loss of {_group(check)}",
    }.get(check.name, check.name)


def _group(check: Check) -> str:
    return shorten(str(check.measured.conditions.get("group", "a group")), 40)


def _limit(check: Check) -> str:
    scale = scale_of(check.limit, check.measured.unit)
    text = scale.bare(check.limit) if check.measured.unit == "probability" else scale.full(check.limit)
    return f"{'at least' if check.name.startswith('min') else 'at most'} {text}"


def _more(found: Evaluation, check: Check) -> str:
    needed = samples_to_tell(check.measured, check.limit)
    if needed is None:
        return f"{capital(_subject(found, check))}: no number of samples can be named that would tell."
    there = MISSING if check.measured.n is None else f"{check.measured.n:,}"
    return f"{capital(_subject(found, check))}: about {needed:,} samples would tell; there are {there}."
