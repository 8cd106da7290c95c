"""The results file: a JSON line for each run of a model, the last of each model counting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line. ``record`` has ``key`` and ``tool``; infinities and NaN are kept as Python's JSON has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def latest(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(key, tool) → the last record; empty without a file. A line cut short by a crash is left out."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    if not path.exists():
        return found
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["key"], record["tool"]] = record
    return found


def fingerprint(sources: Iterable[Path]) -> str:
    """Twelve digits that change with the files given, and with any Python file in the folders given: results of other
    code are not these."""
    digest = hashlib.sha256()
    for source in sources:
        for path in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            digest.update(str(path.relative_to(source.parent)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
