"""Finished arms, a line of JSON each, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tersor.tensor.statistics import Estimate, paired_difference

FEWEST_SEEDS = 3  # for an interval over seeds


@dataclass(frozen=True, eq=False)
class Finished:
    """``ratio``: times fewer MACs; ``pruning`` and ``training`` in seconds; ``right``: bool [test images]."""

    ratio: float
    pruning: float
    training: float
    right: NDArray[np.bool_]

    @property
    def accuracy(self) -> float:
        """Per cent."""
        return 100 * float(self.right.mean())


class Log:
    """The arms in a file of JSON lines; each is known by its settings, ``facts`` among them."""

    def __init__(self, path: Path, facts: Mapping[str, Any]):
        self.path, self.facts = path, dict(facts)
        self._finished: dict[str, Finished] = {}
        if path.is_file():
            lines = path.read_text().splitlines(keepends=True)
            for line in lines:
                if line.endswith("\n"):  # the last one may have been cut short
                    entry = json.loads(line)
                    self._finished[_text(entry["settings"])] = _read(entry)
            path.write_text("".join(line for line in lines if line.endswith("\n")))

    def once(self, settings: Mapping[str, Any], run: Callable[[], Finished]) -> Finished:
        """What the log has for these settings, or what ``run`` gives, which is then kept."""
        key = _text({**self.facts, **settings})
        if key not in self._finished:
            done = run()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"settings": json.loads(key), **_line(done)}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._finished[key] = done
        return self._finished[key]


def over_images(a: Sequence[Finished], b: Sequence[Finished]) -> Estimate:
    """Mean accuracy of ``a`` minus that of ``b`` in points, pairs of the same seed; its interval over test images."""
    first, second = (np.mean([one.right for one in arm], axis=0, dtype=np.float64) for arm in (a, b))
    return Estimate(*(100 * value for value in paired_difference(first, second)))


def over_seeds(a: Sequence[Finished], b: Sequence[Finished]) -> Estimate | None:
    """The same difference with Student's interval over seeds; None for fewer than three."""
    differences = np.array([x.accuracy - y.accuracy for x, y in zip(a, b, strict=True)])
    n, mean = len(differences), float(differences.mean())
    if n < FEWEST_SEEDS:
        return None
    half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, mean - half, mean + half)


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _line(done: Finished) -> dict[str, Any]:
    return {
        "accuracy": round(done.accuracy, 4), "ratio": done.ratio, "pruning_seconds": round(done.pruning, 1),
        "training_seconds": round(done.training, 1), "images": len(done.right),
        "right": np.packbits(done.right).tobytes().hex(),
    }  # fmt: skip


def _read(entry: Mapping[str, Any]) -> Finished:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(entry["right"]), np.uint8), count=entry["images"])
    return Finished(entry["ratio"], entry["pruning_seconds"], entry["training_seconds"], bits.astype(bool))
