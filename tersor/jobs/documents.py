"""The JSON documents that jobs leave in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tersor.core.errors import ArtifactError
from tersor.report.write import Of, write_reports
from tersor.run.folder import write_json


def expect_folder(path: Path) -> None:
    """Raise ArtifactError where ``path`` cannot become a folder to write in: before work is spent on its content."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        got = "a file" if there.is_file() else "no permission to write"
        raise ArtifactError("cannot be written", where=str(path), got=f"{got} at {there}", expected="a folder")


def write_document(data: Mapping[str, Any], path: Path) -> Path:
    """Write JSON to ``path``, whose folder is made; returns it. Raises ArtifactError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, data)
    except OSError as error:
        raise ArtifactError("cannot be written", where=str(path.parent), got=error.strerror or error) from error
    return path


def leave(data: Mapping[str, Any], folder: Path, of: Of, formats: Sequence[str]) -> None:
    """Write what was found as ``of``.json into ``folder``, with its report in ``formats``.

    The reports of a run and of an evaluation that lie there are written again, with it in them.
    """
    write_document(data, folder / f"{of}.json")
    write_reports(folder, formats, of=of)
    around: dict[Of, str] = {"evaluation": "evaluation.json", "run": "summary.json"}
    for other, numbers in around.items():
        if other != of and (folder / numbers).is_file():
            write_reports(folder, formats, of=other)
