"""Groups of a sensitive attribute: their rates, how far apart they are, and which lose more than others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tersor.core.errors import InputError
from tersor.core.measurement import Measurement
from tersor.measure.behaviour.collect import Answers, Collected
from tersor.measure.behaviour.data import EvaluationData
from tersor.measure.behaviour.quality import metric_of
from tersor.measure.behaviour.schema import Attribute, Group, Skipped
from tersor.tensor.fairness import Fairness, GroupLoss, GroupRates, fairness, group_losses
from tersor.tensor.proportions import largest_difference
from tersor.tensor.statistics import Estimate

_RATES = ("selection", "true_positive", "false_positive")
_GAPS = ("demographic_parity", "disparate_impact", "equalised_odds")
_MOST_GROUPS = 100  # of an attribute that are compared


def groups(found: Collected, data: EvaluationData) -> tuple[tuple[Attribute, ...], tuple[Skipped, ...]]:
    """Each sensitive attribute that the data know, and which were left out, and why."""
    if not found.groups:
        return (), (Skipped(what="groups", why="the data name no sensitive attribute (EvaluationData.groups_of)"),)
    if not data.labelled:
        return (), (Skipped(what="groups", why="the data have no targets"),)
    attributes = tuple(_attribute(name, labels, found, data) for name, labels in found.groups.items())
    skipped = [Skipped(what=f"groups of {each.name}", why=each.note) for each in attributes if each.note]
    if any(each.groups for each in attributes) and (why := _why_no_rates(found, data)) is not None:
        skipped.append(Skipped(what="how often each group is chosen, rightly and wrongly", why=why))
    return attributes, tuple(skipped)


def _favourable(found: Collected, data: EvaluationData) -> int | None:
    return data.positive if data.positive is not None else 1 if found.classes == 2 else None


def _why_no_rates(found: Collected, data: EvaluationData) -> str | None:
    if found.kind != "classes" or found.targets is None:
        return "the models give no classes of samples"
    if _favourable(found, data) is None:
        return f"none of the {found.classes} classes is said to be the favourable one (EvaluationData.positive)"
    return None


def _attribute(name: str, labels: NDArray[np.object_], found: Collected, data: EvaluationData) -> Attribute:
    known = np.array([label is not None for label in labels])
    missing, present = int((~known).sum()), sorted(set(labels[known]))
    if len(present) < 2:
        note = f"one group ({present[0]}): there is nothing to compare it with" if present else "missing everywhere"
        return Attribute(name=name, missing=missing, note=note)
    if len(present) > _MOST_GROUPS:
        note = f"{len(present):,} groups, of at most {_MOST_GROUPS}: put values together, such as ages by decade"
        return Attribute(name=name, missing=missing, note=note)
    losses = {loss.group: loss for loss in group_losses(*_losing(found, data, known), labels[known].astype(str))}
    rates = _fairness(labels, known, found, data)
    rows = tuple(_group(label, labels == label, losses[label], rates, found, data) for label in present)
    right = [_right(answers, [labels == label for label in present], found) for answers in found.both]
    gaps = [_gaps(*each) for each in zip(rates, right, strict=True)]
    return Attribute(name=name, missing=missing, groups=rows, original=gaps[0], compressed=gaps[1])


def _losing(
    found: Collected, data: EvaluationData, known: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both models' metric of each sample, in the order in which the first minus the second is what was lost."""
    metric = data.based.metric
    assert metric is not None and found.original.values is not None and found.compressed.values is not None
    one, other = found.original.values[known], found.compressed.values[known]
    return (one, other) if metric.higher_is_better else (other, one)


def _fairness(
    labels: NDArray[np.object_], known: NDArray[np.bool_], found: Collected, data: EvaluationData
) -> tuple[Fairness | None, Fairness | None]:
    """Of both models; None where no class is the favourable one."""
    positive = _favourable(found, data)
    if found.kind != "classes" or positive is None or found.targets is None:
        return None, None
    if not 0 <= positive < found.classes:
        raise InputError(
            "there is no such class",
            where="EvaluationData.positive",
            got=positive,
            expected=f"0 to {found.classes - 1}",
        )
    actual = (found.targets == positive)[known].astype(np.int64)

    def of(answers: Answers) -> Fairness:
        assert answers.scores is not None
        predicted = (answers.scores.classes == positive)[known].astype(np.int64)
        return fairness(predicted, actual, labels[known].astype(str))

    return of(found.original), of(found.compressed)


def _group(
    label: str, rows: NDArray[np.bool_], loss: GroupLoss, rates: tuple[Fairness | None, Fairness | None],
    found: Collected, data: EvaluationData,
) -> Group:  # fmt: skip
    metric = data.based.metric
    assert metric is not None
    fraction = metric.unit == "fraction"
    unit, scale = ("percentage points", 100.0) if fraction else (metric.unit, 1.0)
    n = int(rows.sum())
    one, other = (
        {"metric": metric_of(_only(answers, rows), data), **_rates(label, each)}
        for answers, each in zip(found.both, rates, strict=True)
    )
    return Group(
        name=label, n=n, original=one, compressed=other, drop=Measurement.of(loss.drop, unit, n, scale=scale),
        excess=Measurement.of(loss.excess, unit, n, scale=scale), p=loss.p, p_adjusted=loss.p_adjusted,
    )  # fmt: skip


def _only(answers: Answers, rows: NDArray[np.bool_]) -> Answers:
    assert answers.values is not None
    return replace(answers, values=answers.values[rows])


def _rates(label: str, found: Fairness | None) -> Mapping[str, Measurement]:
    if found is None:
        return {}
    group: GroupRates = next(each for each in found.groups if each.group == label)
    estimates: dict[str, Estimate | None] = {name: getattr(group, name) for name in _RATES}
    return {name: Measurement.of(each, "fraction", group.n) for name, each in estimates.items() if each is not None}


def _right(answers: Answers, groups: list[NDArray[np.bool_]], found: Collected) -> Estimate | None:
    """The largest difference of how many classes of a group's samples are right; None where there are no such."""
    if found.kind != "classes" or found.targets is None or answers.scores is None:
        return None
    right = answers.scores.classes == found.targets
    return largest_difference([right[group].sum() for group in groups], [group.sum() for group in groups])


def _gaps(found: Fairness | None, accuracy: Estimate | None) -> dict[str, Measurement]:
    gaps = {} if found is None else {name: getattr(found, name) for name in _GAPS}
    estimates: dict[str, Estimate | None] = {**gaps, "accuracy_gap": accuracy}
    unit = {"disparate_impact": "ratio"}
    return {name: Measurement.of(each, unit.get(name, "fraction")) for name, each in estimates.items() if each}
