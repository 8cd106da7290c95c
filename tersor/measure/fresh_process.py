"""Measure in a process of its own: what this one has loaded, cached or left spinning does not count there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tersor.core import errors
from tersor.core.errors import TersorError
from tersor.core.progress import Progress

Tick = Callable[[], None]
_PARTS = ("what", "where", "got", "expected", "do")


def run_fresh(
    module: str, request: Mapping[str, Any], *, progress: Progress | None = None, description: str = "", ticks: int = 1,
    patience: float | None = None,
) -> Any:  # fmt: skip
    """Run ``python -m module``, a worker that ends in ``serve``, and return what it answers to ``request`` (both JSON).

    It finds modules where this process does. An error that the worker raises is raised here; a worker that dies is a
    TersorError with the end of what it wrote, and so is one that says nothing for ``patience`` seconds, which is ended.
    """
    package = str(Path(errors.__file__).parents[2])
    found_as_here = {  # and not in the working directory first, where a random.py would be taken for Python's own
        "PYTHONPATH": os.pathsep.join([*map(os.path.abspath, sys.path), package]), "PYTHONSAFEPATH": "1",
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
            env={**os.environ, **found_as_here},
        )  # fmt: skip
        answers: list[dict[str, Any]] = []
        watch = Watch(process, patience)
        try:
            for _ in (progress or Progress()).track(_exchange(process, request, answers), description, ticks):
                watch.heard()
            code = process.wait()
        finally:
            watch.stop()
            process.kill()
            process.wait()
        if watch.lost:
            raise TersorError(
                "the measuring process gave no sign of life", where=module, got=f"silence for {patience:g} s",
                do="The model may never end; where it is only slow, take smaller batches, or Conditions(patience=…)",
            )  # fmt: skip
        if not answers:
            said.seek(0)
            tail = " | ".join(said.read().strip().splitlines()[-3:])
            raise TersorError(
                "the measuring process died", where=module, got=f"exit code {code}: {tail}",
                do="A code of -9 means that the machine ran out of memory",
            )  # fmt: skip
    return _result(answers[0])


class Watch:
    """Ends a process that was not heard of for ``patience`` seconds (None: never); ``lost`` says whether it did."""

    def __init__(self, process: subprocess.Popen[str], patience: float | None):
        self.lost = False
        self._process, self._patience = process, patience
        self._timer: threading.Timer | None = None
        self.heard()

    def heard(self) -> None:
        """Wait for as long again."""
        self.stop()
        if self._patience is not None and self._patience <= threading.TIMEOUT_MAX:
            self._timer = threading.Timer(self._patience, self._end)
            self._timer.daemon = True
            self._timer.start()

    def stop(self) -> None:
        """Wait no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self.lost = True
        self._process.kill()


def _exchange(
    process: subprocess.Popen[str], request: Mapping[str, Any], answers: list[dict[str, Any]]
) -> Iterator[None]:
    assert process.stdin is not None and process.stdout is not None
    with process.stdin as stdin:
        try:
            json.dump(request, stdin)
            stdin.flush()
        except BrokenPipeError:
            return  # it died at its start: the caller says so
    with process.stdout as stdout:
        for line in stdout:
            message = json.loads(line)
            if "tick" in message:
                yield
            else:
                answers.append(message)


def _result(answer: Mapping[str, Any]) -> Any:
    if "error" in answer:
        kinds = {kind.__name__: kind for kind in (errors.ArtifactError, errors.InputError)}
        kind = kinds.get(answer["kind"], TersorError)
        parts = dict(answer["error"])
        raise kind(parts.pop("what"), **parts)
    return answer["result"]


def serve(work: Callable[[Any, Tick], Any]) -> None:
    """The worker's side: read the request, call ``work(request, tick)`` and answer. Other output goes to stderr."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # a library that prints must not talk between the answers
        request = json.load(sys.stdin)
        try:
            _send(answers, {"result": work(request, lambda: _send(answers, {"tick": True}))})
        except TersorError as error:
            parts = {part: getattr(error, part) for part in _PARTS}
            _send(answers, {"kind": type(error).__name__, "error": parts})


def _send(stream: IO[str], message: Mapping[str, Any]) -> None:
    print(json.dumps(message), file=stream, flush=True)
