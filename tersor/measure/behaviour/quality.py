"""The task's metric of both models on the same samples: paired, by class, and where confusions moved."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tersor.core.measurement import Measurement
from tersor.measure.behaviour.agreement import confusion
from tersor.measure.behaviour.collect import Answers, Collected
from tersor.measure.behaviour.data import EvaluationData
from tersor.measure.behaviour.intervals import by_sample
from tersor.measure.behaviour.schema import ClassQuality, McNemar, Quality, Shift
from tersor.measure.quality import Evaluation, paired_drop
from tersor.measure.quality import quality as measured
from tersor.tensor.statistics import holm, is_binary, mcnemar, paired_difference, wilson

_MOST_CLASSES = 100  # up to which the whole confusion matrices are kept
_SHIFTS = 12
_MOST_NATS = 200.0  # beyond, a perplexity says no more; what its interval squares and cubes stays a number


def quality(found: Collected, data: EvaluationData) -> Quality | None:
    """The metric of both, the paired difference, McNemar's test; classes and confusions; None without targets.

    Of tokens also the perplexity, exp of the mean loss of a position; of numbers the root of the mean squared error.
    """
    if not data.labelled:
        return None
    one, other = found.both
    assert one.values is not None and other.values is not None
    right_or_wrong = is_binary(one.values) and is_binary(other.values)
    by_class = found.kind == "classes" and right_or_wrong
    tables = _tables(found) if found.kind == "classes" else None
    return Quality(
        original=metric_of(one, data), compressed=metric_of(other, data), drop=drop_of(found, data),
        mcnemar=_mcnemar(one.values, other.values) if right_or_wrong else None, more=_more(found),
        per_class=_per_class(found, data) if by_class else (),
        confusion=_plain(tables) if tables is not None and found.classes <= _MOST_CLASSES else {},
        shifts=_shifts(tables) if tables is not None else (),
    )  # fmt: skip


def metric_of(answers: Answers, data: EvaluationData) -> Measurement:
    """The task's metric of one model's answers."""
    return measured(_evaluation(answers), data.based)


def drop_of(found: Collected, data: EvaluationData) -> Measurement:
    """How much worse the compressed model is on the same samples, with the paired interval."""
    return paired_drop(_evaluation(found.original), _evaluation(found.compressed), data.based)


def _evaluation(answers: Answers) -> Evaluation:
    assert answers.values is not None, "there are targets"
    return Evaluation(answers.values, None, len(answers.values), 0.0)


def _mcnemar(one: NDArray[np.float64], other: NDArray[np.float64]) -> McNemar:
    test = mcnemar(one, other)
    return McNemar(turned_wrong=test.only_a, turned_right=test.only_b, p=test.p, p_mid=test.p_mid)


def _per_class(found: Collected, data: EvaluationData) -> tuple[ClassQuality, ...]:
    assert found.targets is not None
    one, other = (answers.values for answers in found.both)
    assert one is not None and other is not None
    present = [int(index) for index in np.unique(found.targets)]
    rows = [found.targets == index for index in present]
    tests = [mcnemar(one[row], other[row]).p_mid for row in rows]
    adjusted = holm(tests)
    return tuple(
        ClassQuality(
            index=index, name=class_name(index, data), n=int(row.sum()), original=_recall(one[row]),
            compressed=_recall(other[row]),
            drop=Measurement.of(
                paired_difference(one[row], other[row]), "percentage points", int(row.sum()), scale=100,
                interval="Newcombe, paired", positive="worse",
            ),
            p=p, p_adjusted=float(corrected),
        )
        for index, row, p, corrected in zip(present, rows, tests, adjusted, strict=True)
    )  # fmt: skip


def class_name(index: int, data: EvaluationData) -> str:
    """A class's name, or its index."""
    return data.classes[index] if index < len(data.classes) else str(index)


def _recall(values: NDArray[np.float64]) -> Measurement:
    right, n = int(values.sum()), len(values)
    return Measurement.of((right / n, *wilson(right, n)), "fraction", n, interval="Wilson")


def _tables(found: Collected) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both confusion matrices, [actual, predicted]."""
    one, other = found.original.scores, found.compressed.scores
    assert one is not None and other is not None and found.targets is not None
    return confusion(one, found.targets, found.classes).T, confusion(other, found.targets, found.classes).T


def _plain(tables: tuple[NDArray[np.int64], NDArray[np.int64]]) -> dict[str, tuple[tuple[int, ...], ...]]:
    names = ("original", "compressed")
    return {name: tuple(map(tuple, table.tolist())) for name, table in zip(names, tables, strict=True)}


def _shifts(tables: tuple[NDArray[np.int64], NDArray[np.int64]]) -> tuple[Shift, ...]:
    one, other = tables
    change = np.abs(other - one) * (1 - np.eye(len(one), dtype=np.int64))
    order = np.argsort(-change, axis=None, kind="stable")[:_SHIFTS]
    cells = [tuple(map(int, np.unravel_index(at, change.shape))) for at in order]
    return tuple(
        Shift(actual=a, predicted=p, original=int(one[a, p]), compressed=int(other[a, p]))
        for a, p in cells
        if change[a, p]
    )


def _exp(nats: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(np.minimum(nats, _MOST_NATS))


def _more(found: Collected) -> dict[str, Measurement]:
    said: dict[str, Measurement] = {}
    for name, answers in (("original", found.original), ("compressed", found.compressed)):
        if found.kind == "tokens" and answers.scores is not None and answers.scores.loss is not None:
            said[f"{name}_perplexity"] = by_sample(answers.scores.loss, found, "perplexity", _exp)
        elif answers.error is not None:
            said[f"{name}_rmse"] = by_sample(answers.error, found, "output units", np.sqrt)
    return said
