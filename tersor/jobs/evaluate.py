"""How a compressed model behaves beside its original: run both, compare, hold to limits, write evaluation.json."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import nn

from tersor.core.check_task import shared_data
from tersor.core.errors import InputError, located
from tersor.core.measurement import Measurement
from tersor.core.progress import Progress
from tersor.jobs.documents import expect_folder, leave
from tersor.jobs.find_data import Data, find_data
from tersor.jobs.find_model import find_model
from tersor.measure.behaviour.agreement import agreement, order_warning
from tersor.measure.behaviour.collect import Collected, collect
from tersor.measure.behaviour.confidence import VALIDATION, calibration, outside
from tersor.measure.behaviour.data import EvaluationData
from tersor.measure.behaviour.flips import flips
from tersor.measure.behaviour.gate import Limits, gate
from tersor.measure.behaviour.groups import groups
from tersor.measure.behaviour.quality import quality
from tersor.measure.behaviour.robustness import Stress, robustness
from tersor.measure.behaviour.schema import DataFacts, Evaluation, ModelFacts, Robustness, Skipped
from tersor.measure.runnable import Runnable
from tersor.report.write import expect_formats
from tersor.run.environment import environment

FEW = 100  # samples below which the result says that it rests on few
Model = str | Path | nn.Module | Runnable


def evaluate(
    original: Model,
    compressed: Model,
    data: Data,
    out: str | Path | None = None,
    *,
    limits: Limits = Limits(),
    stress: Stress | None = Stress(),
    shown: int = 16,
    limit: int | None = None,
    threads: int | None = None,
    formats: Sequence[str] = ("html",),
    progress: Progress | None = None,
) -> Evaluation:
    """Compare two models on the same data, and hold the compressed one to ``limits``.

    ``original``, ``compressed``: a module, an ONNX file, the folder of a run or an artifact, a function's name, or
    "task", the data's own model. ``data``: an EvaluationData, a Task, a loader, or the name of what gives one.
    ``stress``: how they are corrupted and attacked (None: not at all). ``shown``: worst samples kept with their inputs.
    ``limit``: only so many test samples. ``threads``: of ONNX files; default: the physical cores. ``out``: a folder for
    evaluation.json and its report in ``formats`` (html, md, csv; json: the numbers alone); of a run's folder the report
    and the model card are written again, with the evaluation in them.

    Raises InputError for unusable input, outputs of different shapes, and limits on what the data do not tell;
    ArtifactError for damaged files; VerificationError for outputs that are not finite.
    """
    start, progress = time.perf_counter(), progress or Progress()
    expect_formats(formats)
    if out is not None:
        expect_folder(Path(out))
    known = find_data(data, progress)
    one, other = (find_model(each, known.based, threads=threads) for each in (original, compressed))
    models = _told_apart(one, other)
    known = _labelled(known, *models)
    found = collect(*models, known, limit=limit, shown=shown, progress=progress)
    attributes, skipped = groups(found, known)
    told = quality(found, known)
    alike = agreement(found)
    calibrated = calibration(found, _validation(models, known, found, progress))
    verdict = gate(limits, quality=told, agreement=alike.get("top_1"), calibration=calibrated, attributes=attributes)
    stressed, more = _stressed(models, known, found, stress, progress)
    elsewhere = _outside(models, known, found, limit, progress)
    result = Evaluation(
        tersor=version("tersor"), data=_facts(found, known), original=_model(models[0]), compressed=_model(models[1]),
        gate=verdict, quality=told, agreement=alike, flips=flips(found, known), calibration=calibrated,
        robustness=stressed, fairness=attributes, outside=elsewhere,
        skipped=(*skipped, *more, *_unsaid(found, known)), notes=(*_notes(found), *shared_data(known.based)),
        settings=_settings(limits, stress, limit, shown, threads),
        environment=environment(), seconds=time.perf_counter() - start,
    )  # fmt: skip
    if out is not None:
        leave(result.to_json(), Path(out), "evaluation", formats)
    return result


def _told_apart(original: Runnable, compressed: Runnable) -> tuple[Runnable, Runnable]:
    if original.name != compressed.name:
        return original, compressed
    return (
        dataclasses.replace(original, name=f"{original.name} (original)"),
        dataclasses.replace(compressed, name=f"{compressed.name} (compressed)"),
    )


def _labelled(data: EvaluationData, original: Runnable, compressed: Runnable) -> EvaluationData:
    """The data with the models' own names of classes where they have none. Raises InputError where the two differ."""
    one, other = original.labels, compressed.labels
    if one is not None and other is not None and one != other:
        first = next(at for at, (a, b) in enumerate(zip_longest(one, other)) if a != b)
        said, expected = (names[first] if first < len(names) else "nothing" for names in (other, one))
        raise InputError(
            "the models' label maps differ", where=f"class {first}", got=f"{said!r} ({compressed.name})",
            expected=f"{expected!r} ({original.name})", do="Compare models of the same classes in the same order",
        )  # fmt: skip
    names = one or other
    return dataclasses.replace(data, classes=names) if names and not data.classes else data


def _validation(
    models: tuple[Runnable, Runnable], data: EvaluationData, found: Collected, progress: Progress
) -> Collected | None:
    """Answers to other samples, to fit temperatures on; None where there are none, or no classes."""
    task = data.based
    if found.kind == "numbers" or not data.labelled or task.validation is None or task.validation is task.test:
        return None
    alone = dataclasses.replace(data, groups_of=None)
    return collect(*models, alone, split="validation", limit=VALIDATION, progress=progress)


def _stressed(
    models: tuple[Runnable, Runnable], data: EvaluationData, found: Collected, stress: Stress | None, progress: Progress
) -> tuple[Robustness | None, tuple[Skipped, ...]]:
    if stress is None:
        return None, (Skipped(what="robustness", why="not asked for"),)
    return robustness(*models, data, found, stress, progress)


def _outside(
    models: tuple[Runnable, Runnable], data: EvaluationData, found: Collected, limit: int | None, progress: Progress
) -> dict[str, Measurement]:
    if data.outside is None or found.kind == "numbers":
        return {}
    with located("EvaluationData.outside"):
        elsewhere = collect(*models, data.elsewhere(), limit=limit, progress=progress)
    return outside(found, elsewhere)


def _facts(found: Collected, data: EvaluationData) -> DataFacts:
    task, metric = data.based, data.based.metric
    rows = found.n if found.kind == "numbers" else len(found.sample)
    return DataFacts(
        name=task.name, source=task.source, kind=found.kind, samples=found.n, rows=rows, labelled=data.labelled,
        metric=None if metric is None else metric.name, metric_unit=None if metric is None else metric.unit,
        higher_is_better=metric is None or metric.higher_is_better, classes=found.classes, class_names=data.classes,
    )  # fmt: skip


def _model(runnable: Runnable) -> ModelFacts:
    return ModelFacts(name=runnable.name, source=runnable.source, backend=runnable.backend)


def _unsaid(found: Collected, data: EvaluationData) -> tuple[Skipped, ...]:
    said = []
    if not data.labelled:
        said.append(Skipped(what="quality and calibration", why="the data have no targets"))
    elif found.kind == "numbers":
        said.append(Skipped(what="calibration", why="the models give no class scores"))
    if data.outside is None:
        said.append(Skipped(what="data from elsewhere", why="none were given (EvaluationData.outside)"))
    elif found.kind == "numbers":
        said.append(Skipped(what="data from elsewhere", why="the models give no confidence"))
    return tuple(said)


def _notes(found: Collected) -> tuple[str, ...]:
    notes = list(found.notes)
    if (warning := order_warning(found)) is not None:
        notes.append(warning)
    if found.n < FEW:
        notes.append(f"{found.n} samples are few: intervals are wide, and rare changes are not seen at all")
    return tuple(notes)


def _settings(
    limits: Limits, stress: Stress | None, limit: int | None, shown: int, threads: int | None
) -> dict[str, Any]:
    asked = {"limits": dataclasses.asdict(limits), "limit": limit, "shown": shown, "threads": threads}
    return json.loads(json.dumps({**asked, "stress": None if stress is None else dataclasses.asdict(stress)}))
