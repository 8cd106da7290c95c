"""Which answers changed: how many turned wrong or right, and the worst of them with their inputs."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from tersor.measure.behaviour.collect import Collected
from tersor.measure.behaviour.data import EvaluationData
from tersor.measure.behaviour.inputs import Reach
from tersor.measure.behaviour.intervals import mean_of
from tersor.measure.behaviour.schema import Answer, Flip, Flips, Shown
from tersor.measure.behaviour.scores import Scores

_LARGEST = 128  # pixels of a shown picture's longer side
_NUMBERS = 64  # of an input that is no picture


def flips(found: Collected, data: EvaluationData) -> Flips:
    """Fractions of rows that turned wrong, turned right, stayed right, stayed wrong, or changed; and the worst samples.

    Severity: of samples that turned wrong, the probability that the actual class lost; of tokens, the mean rise of the
    loss of the sample's positions; of numbers, the rise of the squared error; without targets the divergence (classes
    and tokens; classes only where the answer changed) or the mean squared difference (numbers).
    """
    one, other = found.original.scores, found.compressed.scores
    worst = tuple(_flip(found, data, *kept) for kept in found.worst.found)
    if one is None or other is None:
        return Flips(worst=worst)
    measured = {"changed": mean_of(one.classes != other.classes, found)}
    if found.targets is not None:
        before, after = one.classes == found.targets, other.classes == found.targets
        measured |= {
            "turned_wrong": mean_of(before & ~after, found),
            "turned_right": mean_of(~before & after, found),
            "both_right": mean_of(before & after, found),
            "both_wrong": mean_of(~before & ~after, found),
        }
    return Flips(measurements=measured, worst=worst)


def _flip(found: Collected, data: EvaluationData, severity: float, sample: int, x: NDArray[Any]) -> Flip:
    shown = show(x, found.reach, data)
    if found.kind != "classes":
        return Flip(sample=sample, severity=severity, input=shown)
    assert found.original.scores is not None and found.compressed.scores is not None
    return Flip(
        sample=sample, severity=severity, input=shown,
        actual=None if found.targets is None else int(found.targets[sample]),
        original=_answer(found.original.scores, sample), compressed=_answer(found.compressed.scores, sample),
    )  # fmt: skip


def _answer(scores: Scores, row: int) -> Answer:
    likelihood = None if scores.loss is None else float(scores.likelihood[row])
    return Answer(predicted=int(scores.classes[row]), confidence=float(scores.confidence[row]), likelihood=likelihood)


def show(x: NDArray[Any], reach: Reach | None, data: EvaluationData) -> Shown:
    """One sample's input in a form that can be drawn: a picture as grey or RGB bytes, at most 128 pixels a side."""
    if reach is not None and reach.pictures and x.ndim == 3:
        low, high = data.pixels.reach if data.pixels is not None else (reach.low, reach.high)
        picture = torch.from_numpy(x).float()
        span = (high - low).clamp(min=1e-12)
        picture = ((picture - low[:, None, None]) / span[:, None, None]).clamp(0, 1)
        picture = picture[:3] if len(picture) >= 3 else picture[:1]
        largest = max(picture.shape[1:])
        if largest > _LARGEST:
            size = [max(1, round(side * _LARGEST / largest)) for side in picture.shape[1:]]
            picture = F.interpolate(picture[None], size, mode="area")[0]
        pixels = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous().numpy()
        return Shown(kind="picture", shape=pixels.shape, pixels=base64.b64encode(pixels.tobytes()).decode())
    tokens = np.issubdtype(x.dtype, np.integer)
    return Shown(
        kind="tokens" if tokens else "numbers",
        shape=x.shape,
        numbers=tuple(float(value) for value in x.ravel()[:_NUMBERS]),
    )
