"""How much goes where: which units go first, how many of each group, and what is aligned to what kernels like."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.graph.cost import Cost
from tersor.graph.group import Group

Scope = Literal["layer", "stage", "global"]
Levels = NDArray[np.int64]  # kept levels of each bloc
Flags = NDArray[np.bool_]
Kept = dict[Group, Flags]
TOLERANCE = 0.02  # relative, of a target; of all channels, when counts are aligned
PREFERRED_MULTIPLE = 8
FARTHEST = 8  # a count moves by at most this part (an eighth) of its group to become a multiple


@dataclass(frozen=True)
class Keep:
    """What is to be left, of one of: multiply-accumulates per sample, parameters, bytes of parameters and buffers.

    A number up to 1 is a fraction of what the model has; a larger one is absolute: ``Keep(macs=0.45)``,
    ``Keep(bytes=250_000)``. Met to within 2 %, from below where that is possible.

    Raises InputError unless exactly one is given, and it is positive and finite.
    """

    macs: float | None = None
    parameters: float | None = None
    bytes: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            raise InputError(
                "exactly one target is needed", where="Keep", got=", ".join(given) or "none",
                expected="one of macs, parameters, bytes",
            )  # fmt: skip
        if not (self.number > 0 and math.isfinite(self.number)):
            raise InputError(
                "out of range", where=f"Keep.{self.what}", got=self.number,
                expected="a fraction in (0, 1], or an absolute number above 1",
            )  # fmt: skip

    @property
    def what(self) -> str:
        """The name of the cost that is limited."""
        return next(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def number(self) -> float:
        """The fraction or absolute number given."""
        return float(getattr(self, self.what))

    def of(self, cost: Cost) -> Callable[[Mapping[Group, Flags] | Flags], int]:
        """That cost as a function of what the groups keep."""
        return {"macs": cost.macs, "parameters": cost.parameters, "bytes": cost.bytes}[self.what]

    def target(self, whole: int) -> float:
        """The absolute number to reach, where the original has ``whole``."""
        return self.number * whole if self.number <= 1 else self.number


@dataclass(frozen=True, eq=False)
class Bloc:
    """Groups that keep the same fraction of their units, in ``levels`` equal steps; mostly one group, a unit a step.

    ``before``: levels that the original had. ``least``: levels that stay. ``scores`` [levels]: of what goes first,
    second, … ``ranks``: for each group, the place of each unit from the best (0) to the worst. ``stage``: blocs
    of the same number make their channels at the same resolution.
    """

    groups: tuple[Group, ...]
    levels: int
    before: int
    least: int
    scores: NDArray[np.float64]
    ranks: tuple[NDArray[np.int64], ...]
    stage: int

    @property
    def units(self) -> int:
        """Units of all groups that one level is."""
        return sum(group.units for group in self.groups) // self.levels

    def channels(self, level: int, group: Group) -> int:
        """Channels of the group's first producer in this many levels."""
        return level * (group.units // self.levels) * max(1, group.channels // group.units)

    def kept(self, level: int) -> Kept:
        """The units of each group in its best ``level`` levels."""
        return {
            group: rank < level * (group.units // self.levels)
            for group, rank in zip(self.groups, self.ranks, strict=True)
        }

    def step(self, multiple_of: int) -> int:
        """Kept levels that are multiples of this make every group's channels a multiple of ``multiple_of``."""
        return math.lcm(*(multiple_of // math.gcd(multiple_of, self.channels(1, group)) for group in self.groups))


def bloc(
    groups: Sequence[Group], scores: Sequence[NDArray[np.float64]], *, before: int, stage: int, minimum: int,
    max_sparsity: float | None,
) -> Bloc:  # fmt: skip
    """The bloc of ``groups``, whose units have ``scores``; the original had ``before`` units in the first.

    At least ``minimum`` channels, one level, and all but the fraction ``max_sparsity`` (of the original) stay.
    """
    levels = math.gcd(*(group.units for group in groups))
    sorts = [np.argsort(-score, kind="stable") for score in scores]
    ranks = tuple(np.argsort(sort, kind="stable") for sort in sorts)
    ascending = [score[sort][::-1].reshape(levels, -1) for score, sort in zip(scores, sorts, strict=True)]
    made = Bloc(
        tuple(groups), levels, before * levels // groups[0].units, 1,
        np.concatenate(ascending, axis=1).mean(axis=1), ranks, stage,
    )  # fmt: skip
    least = max(1, *(-(-minimum // made.channels(1, group)) for group in groups))
    if max_sparsity is not None:
        least = max(least, made.before - math.floor(exact(max_sparsity) * made.before))
    return replace(made, least=min(least, levels))


def exact(sparsity: float) -> Fraction:
    """The decimal number that was written: 0.7 of 10 units is 7, not 6.999…."""
    return Fraction(str(sparsity))


@dataclass(frozen=True, eq=False)
class Order:
    """Every level that may go, in the order in which they go.

    ``owner``: the bloc of each; ``gone``: how many of the units that it competes with are gone once it is. ``whole``:
    for each bloc, of the units that it competes with, how many the original had.
    """

    owner: NDArray[np.int64]
    gone: NDArray[np.int64]
    whole: NDArray[np.int64]

    def first(self, count: int, blocs: Sequence[Bloc]) -> Levels:
        """The levels that each bloc keeps when the first ``count`` go."""
        return self._without(self.owner[:count], blocs)

    def at(self, sparsity: Sequence[float], blocs: Sequence[Bloc]) -> Levels:
        """The levels that each bloc keeps when everything goes up to the sparsity that is asked of it."""
        pairs = zip(sparsity, self.whole.tolist(), strict=True)
        limits = np.array([math.floor(exact(value) * whole) for value, whole in pairs], dtype=np.int64)
        return self._without(self.owner[self.gone <= limits[self.owner]], blocs)

    @staticmethod
    def _without(gone: NDArray[np.int64], blocs: Sequence[Bloc]) -> Levels:
        return np.array([bloc.levels for bloc in blocs], dtype=np.int64) - np.bincount(gone, minlength=len(blocs))


def order(blocs: Sequence[Bloc], scope: Scope) -> Order:
    """In which order levels go: within what competes by score, and of several competitions evenly.

    "layer": a bloc competes with itself alone; "stage": with those of its stage; "global": with all.
    """
    rivals: dict[int, list[int]] = {}
    for number, member in enumerate(blocs):
        key = {"layer": number, "stage": member.stage, "global": 0}[scope]
        rivals.setdefault(key, []).append(number)
    nothing = np.zeros(0, dtype=np.int64)
    owners, gone, scores = [nothing], [nothing], [np.zeros(0)]
    units = np.array([member.units for member in blocs], dtype=np.int64)
    whole = np.zeros(len(blocs), dtype=np.int64)
    for numbers in rivals.values():
        free = [blocs[number].levels - blocs[number].least for number in numbers]
        owner = np.repeat(numbers, free).astype(np.int64)
        score = np.concatenate([blocs[number].scores[:count] for number, count in zip(numbers, free, strict=True)])
        sort = np.argsort(score, kind="stable")
        whole[numbers] = sum(blocs[number].before * blocs[number].units for number in numbers)
        already = sum((blocs[number].before - blocs[number].levels) * blocs[number].units for number in numbers)
        owners.append(owner[sort])
        gone.append(already + np.cumsum(units[owner[sort]]))
        scores.append(score[sort])
    owner, removed = np.concatenate(owners), np.concatenate(gone)
    sort = np.lexsort((np.concatenate(scores), removed / whole[owner]))
    return Order(owner[sort], removed[sort], whole)


def kept_units(blocs: Sequence[Bloc], levels: Levels) -> Kept:
    """What each group keeps; groups that stay whole are left out."""
    found: Kept = {}
    for member, level in zip(blocs, levels, strict=True):
        if level < member.levels:
            found.update(member.kept(int(level)))
    return found


@dataclass(frozen=True, eq=False)
class Budget:
    """A target: what is to be left of a cost, of which the original has ``whole``."""

    keep: Keep
    cost: Cost
    whole: int

    @property
    def target(self) -> float:
        """The absolute number to reach."""
        return self.keep.target(self.whole)

    def left(self, blocs: Sequence[Bloc]) -> Callable[[Levels], int]:
        """The cost as a function of the levels that the blocs keep."""
        starts = np.cumsum([0, *(group.units for group in self.cost.groups)])
        start_of = dict(zip(self.cost.groups, starts.tolist(), strict=False))
        rank = np.full(int(starts[-1]), -1, dtype=np.int64)  # what is in no bloc always stays
        owner, factor = np.zeros_like(rank), np.ones_like(rank)
        for number, member in enumerate(blocs):
            for group, ranks in zip(member.groups, member.ranks, strict=True):
                units = slice(start_of[group], start_of[group] + group.units)
                rank[units], owner[units], factor[units] = ranks, number, group.units // member.levels
        count = self.keep.of(self.cost)
        return lambda levels: count(rank < levels[owner] * factor if len(blocs) else rank < 0)

    def text(self, count: float) -> str:
        """The number and what fraction of the original it is."""
        return f"{count / self.whole:.4g} ({count:,.0f} of {self.whole:,} {UNITS[self.keep.what]})"

    def unreachable(self, nearest: Sequence[int], do: str) -> InputError:
        """The error that says what can be met instead."""
        return InputError(
            f"the target on {UNITS[self.keep.what]} cannot be met", where=f"PruneChannels.keep.{self.keep.what}",
            got=self.text(self.target), expected=f"the nearest that can: {' or '.join(map(self.text, nearest))}", do=do,
        )  # fmt: skip


UNITS = {"macs": "MACs", "parameters": "parameters", "bytes": "bytes"}


def solve(
    blocs: Sequence[Bloc], removals: Order, budget: Budget, cost: Callable[[Levels], int],
    shape: Callable[[Levels], Levels],
) -> Levels:  # fmt: skip
    """The levels to keep so that the budget is met to within 2 %, from below where that is possible.

    The shortest list of removals, by bisection with an exact count at each step. ``cost``: of levels kept. ``shape``:
    what is made of levels before they count.

    Raises InputError where no choice comes that near, with the nearest that do.
    """

    def levels(count: int) -> Levels:
        return shape(removals.first(count, blocs))

    def left(count: int) -> int:
        return cost(levels(count))

    low, high, target = 0, len(removals.owner), budget.target
    if left(low) <= target:
        return levels(low)
    if left(high) > target * (1 + TOLERANCE):
        raise budget.unreachable([left(high)], "Raise max_sparsity, lower minimum or multiple_of, or widen where=")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left(middle) > target else (low, middle)
    for state in (levels(high), levels(low), *_neighbours(blocs, levels(high), shape, 1),
                  *_neighbours(blocs, levels(low), shape, -1)):  # fmt: skip
        if abs(cost(state) - target) <= TOLERANCE * target:
            return state
    raise budget.unreachable([left(high), left(low)], "Ask for one of these: the channels allow no finer choice")


def _neighbours(blocs: Sequence[Bloc], levels: Levels, shape: Callable[[Levels], Levels], way: int) -> Iterator[Levels]:
    """The same levels but for one bloc's, which keeps the next count more (``way`` 1) or less (−1) that is allowed."""
    for number, member in enumerate(blocs):
        for level in range(int(levels[number]) + way, member.levels + 1 if way > 0 else member.least - 1, way):
            other = levels.copy()
            other[number] = level
            if (shaped := shape(other))[number] != levels[number]:
                yield shaped
                break


def round_up(blocs: Sequence[Bloc], levels: Levels, multiple_of: int) -> Levels:
    """Kept counts raised to multiples of ``multiple_of``, whatever that costs."""
    steps = np.array([member.step(multiple_of) for member in blocs], dtype=np.int64)
    whole = np.array([member.levels for member in blocs], dtype=np.int64)
    return np.minimum(-(-levels // steps) * steps, whole) if len(blocs) else levels


def align(
    blocs: Sequence[Bloc], levels: Levels, multiple_of: int, error: Callable[[Levels], float]
) -> tuple[Levels, list[str]]:
    """Kept counts moved to multiples where a group is wide enough and ``error`` (relative, signed) stays within 2 %.

    The widest groups first; of the two neighbouring multiples the one that leaves the smaller error. Where all together
    are too far in the end, the narrowest make up for it. Returns the levels and, for each bloc, why it is not aligned
    ("" where it is, or where nothing goes).
    """
    asked, levels, whys = levels, levels.copy(), [""] * len(blocs)
    aligned: list[int] = []
    for number in sorted(range(len(blocs)), key=lambda n: -blocs[n].levels):
        member, level = blocs[number], int(levels[number])
        step = member.step(multiple_of)
        if level == member.levels or level % step == 0:
            continue
        tried: list[tuple[float, int]] = []
        for candidate in (level // step * step, level // step * step + step):
            if member.least <= candidate < member.levels and abs(candidate - level) * FARTHEST <= member.levels:
                levels[number] = candidate
                tried.append((abs(error(levels)), candidate))
        levels[number] = min(tried)[1] if tried else level
        if tried:
            aligned.append(number)
        else:
            whys[number] = f"no multiple of {multiple_of}: the nearest is too far from what is asked"
    while aligned and abs(error(levels)) > TOLERANCE:
        number = aligned.pop()
        _even_out(blocs[number], number, int(asked[number]), levels, error)
        whys[number] = f"no multiple of {multiple_of}: with it all groups together are over 2 % from what is asked"
    return levels, whys


def _even_out(member: Bloc, number: int, asked: int, levels: Levels, error: Callable[[Levels], float]) -> None:
    """Set the bloc's count, near what is asked of it, so that the error of all together is the smallest."""
    reach = member.levels // FARTHEST
    low, high = max(member.least, asked - reach), min(member.levels - 1, asked + reach)
    while low < high:  # the error grows with what is kept
        levels[number] = (low + high) // 2
        low, high = (low, (low + high) // 2) if error(levels) >= 0 else ((low + high) // 2 + 1, high)
    errors = []
    for level in {max(low - 1, member.least), low}:
        levels[number] = level
        errors.append((abs(error(levels)), level))
    levels[number] = min(errors)[1]


@dataclass(frozen=True, eq=False)
class Choice:
    """What each bloc keeps, and why its count is no multiple of what kernels like ("" where it is)."""

    blocs: tuple[Bloc, ...]
    levels: Levels
    remarks: tuple[str, ...]

    def kept(self) -> list[Kept]:
        """What the groups of each bloc keep; empty where it stays whole."""
        return [kept_units([member], self.levels[n : n + 1]) for n, member in enumerate(self.blocs)]

    def untouched(self) -> list[Group]:
        """The groups that stay whole."""
        pairs = zip(self.blocs, self.levels, strict=True)
        return [group for member, level in pairs if level == member.levels for group in member.groups]


def choose(
    blocs: Sequence[Bloc], sparsity: Sequence[float], scope: Scope, multiple_of: int | None, budget: Budget | None
) -> Choice:
    """How many levels each bloc keeps: as its ``sparsity`` says, or as the ``budget`` does where there is one."""
    removals = order(blocs, scope)

    def shape(levels: Levels) -> Levels:
        return levels if multiple_of is None else round_up(blocs, levels, multiple_of)

    if budget is None:
        levels = shape(removals.at(sparsity, blocs))
    else:
        cost = budget.left(blocs)
        levels = solve(blocs, removals, budget, cost, shape)
    if multiple_of is not None or not len(blocs):
        return Choice(tuple(blocs), levels, ("",) * len(blocs))
    if budget is not None:
        levels, remarks = align(blocs, levels, PREFERRED_MULTIPLE, lambda levels: cost(levels) / budget.target - 1)
    else:
        channels = np.array([sum(b.channels(1, group) for group in b.groups) for b in blocs], dtype=np.int64)
        every = int(channels @ np.array([member.levels for member in blocs]))
        asked = int(channels @ levels)

        def error(levels: Levels) -> float:
            return (int(channels @ levels) - asked) / every

        levels, remarks = align(blocs, levels, PREFERRED_MULTIPLE, error)
    return Choice(tuple(blocs), levels, tuple(remarks))
