"""A run's folder in, report.html out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tersor.core.errors import ArtifactError
from tersor.core.files import write_atomically
from tersor.core.record import Record
from tersor.report.html import render
from tersor.report.schema import parse_summary

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Rebuild ``report.html`` from ``summary.json`` and ``records.jsonl`` in a run's folder; returns its path.

    A torn last line of the records (the machine stopped while it was written) is left out. Raises ArtifactError where
    the summary is missing, damaged or of another version.
    """
    summary = _read_summary(folder)
    page = render(summary, _read_records(folder / "records.jsonl"))
    path = folder / REPORT
    write_atomically(path, page.encode("utf-8", errors="replace"))
    return path


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        data = json.loads(path.read_bytes(), parse_constant=_refuse)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            "there is no summary", where=str(path), got="no such file", expected="the folder of a finished run",
            do=f"Finish the run first: tersor resume {folder}",
        ) from None  # fmt: skip
    except ValueError as error:
        raise ArtifactError(
            "the summary is not JSON", where=str(path), got=str(error), do=f"Rebuild it: tersor resume {folder}"
        ) from None
    if not isinstance(data, dict):
        raise ArtifactError("the summary holds no JSON object", where=str(path), got=type(data).__name__)
    parse_summary(data, str(path))
    return data


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _read_records(path: Path) -> Sequence[Record]:
    if not path.exists():
        return ()
    lines = [
        line for line in path.read_bytes().split(b"\n")[:-1] if line.strip()
    ]  # after the last newline: a torn line
    try:
        return [Record.from_json(json.loads(line)) for line in lines]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            "a record cannot be read", where=str(path), got=repr(error),
            do="Restore the file, or move it away: the report is then made from summary.json alone",
        ) from error  # fmt: skip
