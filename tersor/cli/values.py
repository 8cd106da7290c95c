"""Values with units on the command line: 1%, 4MB, 5ms."""

from __future__ import annotations

import math
import re

from tersor.core.errors import InputError
from tersor.jobs.by_name import share

_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_MILLISECONDS = {"": 1.0, "ms": 1.0, "s": 1e3, "us": 1e-3, "µs": 1e-3}
_POINTS = {"": 1.0, "%": 1.0, "points": 1.0}


def _parse(text: str | None, units: dict[str, float], option: str, example: str) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Zµ%]*)\s*", text)
    if match is None or match[2].lower() not in units:
        named = ", ".join(unit for unit in units if unit)
        raise InputError(
            "not a value that can be used",
            where=option,
            got=repr(text),
            expected=f"a number with one of {named}, such as {example}",
        )
    return float(match[1]) * units[match[2].lower()]


def parse_points(text: str | None, option: str = "--max-drop") -> float | None:
    """ "1%" → 1.0 percentage points."""
    return _parse(text, _POINTS, option, "1%")


def parse_share(text: str | None, option: str) -> float | None:
    """ "97%" → 0.97; "0.97" too. Raises InputError."""
    if text is None:
        return None
    try:
        value = share(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError("not a share", where=option, got=repr(text), expected="0.97, or a percentage such as 97%")
    return value


def parse_bytes(text: str | None) -> float | None:
    """ "4MB" → 4,000,000 bytes; "4MiB" → 4,194,304."""
    return _parse(text, _BYTES, "--max-size", "4MB")


def parse_milliseconds(text: str | None) -> float | None:
    """ "5ms" → 5.0 milliseconds."""
    return _parse(text, _MILLISECONDS, "--max-latency", "5ms")


def parse_words(text: str) -> tuple[str, ...]:
    """ "html, md" → ("html", "md")."""
    return tuple(part.strip().lower() for part in text.split(","))


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """ "1,32" → (1, 32). Raises InputError for anything but whole numbers from 1 on."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError("not numbers", where=option, got=repr(text), expected="numbers from 1 on, such as 1,32")
    return tuple(map(int, parts))


def parse_sizes(text: str | None, option: str) -> dict[str, int]:
    """ "sequence=128,input:2=224" → {"sequence": 128, "input:2": 224}. Raises InputError."""
    pairs = [part.rpartition("=") for part in (text or "").split(",") if part.strip()]
    if not all(name.strip() and size.strip().isdecimal() for name, _, size in pairs):
        raise InputError("no sizes", where=option, got=repr(text), expected="names with sizes, such as sequence=128")
    return {name.strip(): int(size) for name, _, size in pairs}
