"""Built-in tasks: small models and data that come along."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.zoo.digits import digits
from tersor.zoo.fashion import fashion

BUILTIN: dict[str, Callable[..., Task]] = {"digits": digits, "fashion": fashion}

__all__ = ["BUILTIN", "digits", "fashion", "load"]


def load(name: str, *, progress: Progress = Progress(), **settings: Any) -> Task:
    """The built-in task ``name``; ``settings`` are its function's. Raises InputError, naming the tasks there are."""
    if name not in BUILTIN:
        near = difflib.get_close_matches(name, BUILTIN, n=1)
        raise InputError(
            "no such built-in task", where=name, expected=f"one of {', '.join(sorted(BUILTIN))}",
            do=f"Did you mean {near[0]}?" if near else "",
        )  # fmt: skip
    return BUILTIN[name](progress=progress, **settings)
