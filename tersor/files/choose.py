"""Which tensors of a file are meant, with which setting, and why the others are passed over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from tersor.core.errors import InputError
from tersor.core.plan import Skip
from tersor.files.dtypes import FLOATS
from tersor.files.weights import TensorEntry, WeightsFile

T = TypeVar("T")


def choose(
    file: WeightsFile,
    where: Sequence[str],
    setting: T | Mapping[str, T],
    objection: Callable[[TensorEntry, T | None], str | None],
    *,
    called: str,
    fewest_axes: int = 2,
) -> tuple[dict[str, T], tuple[Skip, ...]]:
    """(tensor → its setting, what is passed over and why).

    ``where``: shell patterns of names; without any, every tensor of ``fewest_axes`` or more. ``setting``: of all, or by
    shell pattern, of which the first that matches counts. ``objection``: why a tensor cannot bear a setting (None:
    whatever it would be), or None. ``called``: "sparsity", what a setting is.

    Raises InputError for a pattern that matches nothing.
    """
    by_name = setting if isinstance(setting, Mapping) else {"*": setting}
    if isinstance(setting, Mapping):
        file.matching(list(setting))
    chosen: dict[str, T] = {}
    skips: list[Skip] = []
    for entry in file.matching(where) if where else file.tensors:
        told = [value for pattern, value in by_name.items() if fnmatchcase(entry.name, pattern)]
        reason = objection(entry, told[0] if told else None)
        if not where and len(entry.shape) < fewest_axes:
            reason = "fewer than two axes (a pattern of names, where, would take it)"
        elif not told:
            reason = f"no {called} is given for its name"
        if reason:
            skips.append(Skip(entry.name, reason))
        else:
            chosen[entry.name] = told[0]
    return chosen, tuple(skips)


def unfit(entry: TensorEntry, done: str) -> str | None:
    """Why a tensor has nothing that could be ``done`` ("pruned"), or None."""
    if entry.float_bits is None:
        return f"{entry.dtype} is copied: only {', '.join(FLOATS)} can be {done}"
    return f"it is empty: shape {list(entry.shape)}" if entry.size == 0 else None


def nothing_chosen(file: WeightsFile, skips: Sequence[Skip], done: str) -> InputError:
    """The error of a file in which no tensor can be ``done`` ("pruned")."""
    reasons = "; ".join(f"{skip.place}: {skip.reason}" for skip in skips[:3])
    return InputError(f"no tensor can be {done}", where=str(file.path), got=reasons or "no tensors")
