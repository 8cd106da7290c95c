"""Pairs of layers, the student's and the teacher's, by name or pattern."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from tersor.core.attached import is_attached
from tersor.core.errors import InputError
from tersor.core.place import nearest_names
from tersor.train.taps import Tap, What

Spread = Literal["uniform", "top", "bottom"]


@dataclass(frozen=True)
class Reading:
    """What an objective reads: of each pair of layers (student's, teacher's) their outputs or their attention.

    A layer is a name ("layer3") or a shell pattern of names ("encoder.layer.*", as ByName's); of modules inside each
    other that match, the outermost is meant. Where n of the student's layers match and m ≥ n of the teacher's,
    ``spread`` says which are learnt from: "uniform" the ⌊i m / n⌋-th for i = 1 … n, so that the last learns from the
    last; "top" the last n; "bottom" the first n.
    Source of the three maps: Jiao et al. 2019, TinyBERT (arXiv 1909.10351), section 4, on the mapping function.
    """

    pairs: tuple[tuple[str, str], ...]
    what: What = "output"
    spread: Spread = "uniform"


@dataclass(frozen=True, eq=False)
class LayerPair:
    """What the layers ``names`` (student's, teacher's) gave for one batch; the teacher's has no gradient."""

    names: tuple[str, str]
    student: Tensor
    teacher: Tensor

    def __str__(self) -> str:
        return f"{self.names[0] or '<model>'} ← {self.names[1] or '<model>'}"


_Resolved = dict[Reading, tuple[tuple[Tap, Tap], ...]]
_FOUND: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, _Resolved]] = WeakKeyDictionary()


def resolve(reading: Reading, student: nn.Module, teacher: nn.Module) -> tuple[tuple[Tap, Tap], ...]:
    """The pairs of layers that ``reading`` means, in order. Remembered: names are looked up once for two models.

    Raises InputError where a pattern matches nothing, with the nearest names, and where the teacher has fewer layers.
    """
    known = _FOUND.setdefault(student, WeakKeyDictionary()).setdefault(teacher, {})
    if reading not in known:
        found = [
            (Tap(ours, reading.what), Tap(theirs, reading.what))
            for pair in reading.pairs
            for ours, theirs in _joined(pair, _matching(pair[0], student, "student"), teacher, reading.spread)
        ]
        known[reading] = tuple(dict.fromkeys(found))
    return known[reading]


def _joined(pair: tuple[str, str], ours: list[str], teacher: nn.Module, spread: Spread) -> list[tuple[str, str]]:
    theirs = _matching(pair[1], teacher, "teacher")
    n, m = len(ours), len(theirs)
    if n > m:
        raise InputError(
            "the student has more layers here than the teacher", where=_where(pair[0]),
            got=f"{n} of the student ({', '.join(ours[:4])} …), {m} of the teacher ({', '.join(theirs[:4])})",
            expected=f"at most {m}", do="Name the pairs one by one",
        )  # fmt: skip
    places = {
        "uniform": [(i + 1) * m // n - 1 for i in range(n)],
        "top": list(range(m - n, m)),
        "bottom": list(range(n)),
    }[spread]
    return [(name, theirs[place]) for name, place in zip(ours, places, strict=True)]


def _matching(pattern: str, model: nn.Module, whose: str) -> list[str]:
    """Paths of the modules that ``pattern`` means, in the model's order."""
    names = [path for path, _ in model.named_modules(remove_duplicate=False) if not is_attached(path)]
    if pattern in names:
        return [pattern]
    matching = [name for name in names if name and fnmatchcase(name, pattern)]
    found = set(matching)
    outermost = [name for name in matching if not any(outer in found for outer in _outer(name))]
    if not outermost:
        raise InputError(
            f"no layer of the {whose} has this name", where=_where(pattern), do=nearest_names(pattern, names)
        )
    return outermost


def _outer(path: str) -> list[str]:
    """The paths of the modules that hold the one at ``path``."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _where(pattern: str) -> str:
    return f"layer {pattern!r}"
