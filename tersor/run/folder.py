"""A run's folder: what lies where, what is written once, and what is appended."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tersor.core.errors import ArtifactError, InputError
from tersor.core.files import sync_folder, write_atomically
from tersor.core.record import Record

SCHEMA = 1


class _Facts(BaseModel):
    """The shape of ``run.json``; what else stands in it is kept as it is."""

    model_config = ConfigDict(extra="allow")
    recipe: dict[str, Any]
    task: dict[str, str]
    seed: int = Field(ge=0)
    budgets: dict[str, float | None]
    timing: dict[str, float | None]
    notes: list[str]
    command: str
    base_sha256: str
    environment: dict[str, str]


@dataclass(frozen=True)
class RunFolder:
    """``runs/NAME``. Every file is written beside its name and renamed; ``records.jsonl`` is appended and fsynced."""

    path: Path

    @classmethod
    def create(cls, path: Path, facts: Mapping[str, Any]) -> RunFolder:
        """A new run in a new or empty folder. Raises InputError where something is there already, or cannot be."""
        run = cls(path)
        run.expect_free()
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_json(run.description, {"schema": SCHEMA, **facts})
        except OSError as error:
            raise InputError(
                "the output folder cannot be written", where=str(path), got=error.strerror or error,
                do="Choose another with -o",
            ) from None  # fmt: skip
        return run

    def expect_free(self) -> None:
        """Raise InputError where something is in the folder already. Ask before long work, too."""
        path = self.path
        if self.description.exists():
            raise InputError(
                "a run lies there already", where=str(path),
                do=f"Go on with it: tersor resume {path}; or choose another folder with -o",
            )  # fmt: skip
        if path.exists() and not path.is_dir():
            raise InputError("the output folder is a file", where=str(path), do="Choose another folder with -o")
        if path.exists() and any(name for name in os.listdir(path) if not name.startswith(".")):
            raise InputError("the output folder is not empty", where=str(path), do="Choose another folder with -o")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises ArtifactError where none lies there, or one of another version."""
        run = cls(path)
        if not run.description.exists():
            raise ArtifactError(
                "no run lies there", where=str(path), got="no run.json" if path.is_dir() else "no such folder",
                expected="a folder that tersor compress made",
            )  # fmt: skip
        schema = run.facts().get("schema")
        if schema != SCHEMA:
            raise ArtifactError(
                "the run is of another version", where=str(run.description), got=f"schema {schema}",
                expected=f"schema {SCHEMA}", do="Finish it with the version of Tersor that began it",
            )  # fmt: skip
        run.expect_whole()
        return run

    def expect_whole(self) -> None:
        """Raise ArtifactError where ``run.json`` does not hold what a run needs."""
        facts = self.facts()
        try:
            _Facts.model_validate(facts)
            if not 1 <= int(facts["environment"]["threads"]) <= 4096:
                raise ValueError(f"threads {facts['environment']['threads']}")
        except (ValueError, KeyError) as error:  # pydantic's error is a ValueError
            raise ArtifactError(
                "the description of the run is damaged", where=str(self.description),
                got=" ".join(str(error).split())[:200],
                do="It was changed by hand: put it back, or compress again into another folder",
            ) from None  # fmt: skip

    @property
    def description(self) -> Path:
        """``run.json``: task, recipe, seed, versions, machine."""
        return self.path / "run.json"

    @property
    def summary(self) -> Path:
        """``summary.json``: the numbers of the report."""
        return self.path / "summary.json"

    @property
    def final_onnx(self) -> Path:
        """``model.onnx``: the file to deploy."""
        return self.path / "model.onnx"

    @property
    def final_model(self) -> Path:
        """``model/``: the artifact to load in Python."""
        return self.path / "model"

    @property
    def student(self) -> Path:
        """``student/``: the model that the steps began with, where it is another one than the original."""
        return self.path / "student"

    def step(self, number: int, name: str) -> Path:
        """``steps/NN-name``."""
        return self.path / "steps" / f"{number:02d}-{name}"

    def facts(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        return read_json(self.description)

    def records(self) -> list[Record]:
        """The finished steps, in order. A torn last line (the machine stopped while writing it) is dropped."""
        path = self.path / "records.jsonl"
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")
        complete = [line for line in lines[:-1] if line]
        try:
            return [Record.from_json(json.loads(line)) for line in complete]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                "a record cannot be read", where=str(path), got=repr(error),
                do="Move the folder away and compress again",
            ) from error  # fmt: skip

    def append(self, record: Record) -> None:
        """Add a finished step, durably. Cuts a torn last line off first."""
        path = self.path / "records.jsonl"
        line = json.dumps(record.to_json(), allow_nan=False).encode() + b"\n"
        with open(path, "a+b") as file:
            file.seek(0)
            end = file.read().rfind(b"\n") + 1
            file.truncate(end)
            file.seek(0, os.SEEK_END)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process alone; the system lets go of it when the process ends, however it ends."""
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(
                    "another process is working on this run", where=str(self.path), do="Wait for it to end"
                ) from None
            yield


def write_json(path: Path, data: Any) -> None:
    """Write JSON that people can read, atomically."""
    write_atomically(path, (json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ArtifactError where it is damaged."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError("the file is missing", where=str(path)) from None
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError("the file is not JSON", where=str(path), got=f"{type(error).__name__}: {error}") from None
    if not isinstance(data, dict):
        raise ArtifactError("the file holds no JSON object", where=str(path), got=type(data).__name__)
    return data


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it is written."""
    beside = path.with_name(f".{path.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    sync_folder(beside)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(beside, path)
    sync_folder(path.parent)
