"""A worker's notes: what each stage found, how long it took and where it stopped, on disk as soon as it is known."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo.limits import OverBudget, unbudgeted

Clock = Callable[[], float]


class Notes:
    """Facts of one model, one JSON line for each addition; a process that is killed leaves what it had found."""

    def __init__(self, path: Path):
        self.path = path
        path.write_text("")

    def add(self, **facts: Any) -> None:
        """Note facts; later ones replace earlier ones of the same name."""
        with self.path.open("a") as file:
            file.write(json.dumps(facts) + "\n")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the work: noted as the one that runs; what it raises is noted under ``errors`` and raised on."""
        self.add(stage=name)
        try:
            yield
        except (Exception, OverBudget) as error:  # whatever a model, Tersor or a peer raises is the finding
            traceback.print_exc(file=sys.stderr)
            self.add(**{f"error_{name}": f"{type(error).__name__}: {_in_one_line(error)}"})
            raise StageError(name) from error


class StageError(Exception):
    """A stage stopped; the notes say why."""


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600]


def read_notes(path: Path) -> dict[str, Any]:
    """All facts of a worker's notes, the last of each name; a line cut short by a kill is left out."""
    facts: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        try:
            facts |= json.loads(line)
        except ValueError:
            continue
    return facts


@contextmanager
def capture_apart(clock: Clock = time.process_time) -> Iterator[list[float]]:
    """The seconds that each torch.export capture in the block takes, out of the budget's reach."""
    spent: list[float] = []
    depth = 0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth:
                return function(*args, **kwargs)
            depth, start = 1, clock()
            try:
                with unbudgeted():
                    return function(*args, **kwargs)
            finally:
                depth = 0
                spent.append(clock() - start)

        return call

    program = torch.export.ExportedProgram
    export, decompose = torch.export.export, program.run_decompositions
    torch.export.export, program.run_decompositions = timed(export), timed(decompose)  # type: ignore[assignment]
    try:
        yield spent
    finally:
        torch.export.export, program.run_decompositions = export, decompose  # type: ignore[assignment]
