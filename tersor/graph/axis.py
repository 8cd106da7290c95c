"""The algebra of axes: what the positions of a tensor's axis are, as sums and products of leaves.

A *leaf* is a run of channels that can be removed one by one. A concatenation is a sum of what it joins; a linear
layer's output that is viewed as heads × head size is a product, and position (h, d) is gone where h or d is. Two axes
that must be the same are unified: leaves are bound to leaves, to sums and to products, as terms are. Every step
touches a leaf's binding once, so walking a graph is near-linear in its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Fixed:
    """Positions that cannot go, and why ("the model's input", "height and width")."""

    size: int
    reason: str


@dataclass(eq=False)
class Leaf:
    """``size`` channels, each of which may go alone. ``bound``: what it was found to be, if anything.

    ``frozen``: why no channel may go, or None. ``head``: it was seen as a batch axis of a product of activations.
    ``inner``: it was seen as the axis that such a product sums over or keeps. ``group``: whole groups of a grouped
    convolution or normalisation.
    """

    size: int
    frozen: str | None = None
    bound: Axis | None = None
    head: bool = False
    inner: bool = False
    group: bool = False


@dataclass(frozen=True, eq=False)
class Product:
    """Row-major: the last factor runs fastest."""

    factors: tuple[Axis, ...]


@dataclass(frozen=True, eq=False)
class Sum:
    """One part after another."""

    parts: tuple[Axis, ...]


Axis = Fixed | Leaf | Product | Sum
ONE = Fixed(1, "a single position")


class DoesNotFit(Exception):
    """Two axes cannot be brought into one form: one is cut where the other is whole."""

    def __str__(self) -> str:
        return "cuts channels where other layers hold them whole"


def size_of(axis: Axis) -> int:
    """How many positions an axis has."""
    if isinstance(axis, (Fixed, Leaf)):
        return axis.size
    if isinstance(axis, Product):
        return math.prod(size_of(factor) for factor in axis.factors)
    return sum(size_of(part) for part in axis.parts)


def resolve(axis: Axis) -> Axis:
    """The axis with bound leaves replaced at its top: a Fixed, an unbound Leaf, or a flat Product or Sum."""
    if isinstance(axis, Leaf):
        if axis.bound is None:
            return axis
        axis.bound = resolve(axis.bound)
        return axis.bound
    if isinstance(axis, Product):
        return product([resolve(factor) for factor in axis.factors])
    if isinstance(axis, Sum):
        return total([resolve(part) for part in axis.parts])
    return axis


def product(factors: Sequence[Axis]) -> Axis:
    """Factors as one axis: nested products are flattened, single positions dropped."""
    flat: list[Axis] = []
    for factor in factors:
        for item in factor.factors if isinstance(factor, Product) else (factor,):
            if size_of(item) != 1:
                flat.append(item)
    if all(isinstance(item, Fixed) for item in flat):
        reasons = [item.reason for item in flat if isinstance(item, Fixed)]
        return Fixed(math.prod(map(size_of, flat)), reasons[0] if reasons else ONE.reason)
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def total(parts: Sequence[Axis]) -> Axis:
    """Parts as one axis: nested sums are flattened, neighbours that are fixed are merged."""
    flat: list[Axis] = []
    for part in parts:
        for item in part.parts if isinstance(part, Sum) else (part,):
            last = flat[-1] if flat else None
            if isinstance(item, Fixed) and isinstance(last, Fixed):
                flat[-1] = Fixed(last.size + item.size, last.reason)
            elif size_of(item):
                flat.append(item)
    if not flat:
        return Fixed(0, "empty")
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def leaves(axis: Axis) -> Iterator[Leaf]:
    """The unbound leaves of an axis, from left to right."""
    axis = resolve(axis)
    if isinstance(axis, Leaf):
        yield axis
    elif isinstance(axis, Product):
        for factor in axis.factors:
            yield from leaves(factor)
    elif isinstance(axis, Sum):
        for part in axis.parts:
            yield from leaves(part)


def freeze(axis: Axis, reason: str) -> None:
    """No position of the axis may go. The first reason stays."""
    for leaf in leaves(axis):
        if leaf.frozen is None:
            leaf.frozen = reason


def fix(axis: Axis, reason: str) -> None:
    """The axis counts something that is no channel (query, key and value; the gates of an LSTM): it is Fixed."""
    for leaf in list(leaves(axis)):
        leaf.bound = Fixed(leaf.size, reason)


def _bind(leaf: Leaf, axis: Axis) -> None:
    """From now on the leaf is ``axis``."""
    if any(other is leaf for other in leaves(axis)):
        raise DoesNotFit
    leaf.bound = axis
    for part in leaves(axis):
        part.frozen = part.frozen or leaf.frozen
        part.group = part.group or leaf.group
        part.head, part.inner = part.head or leaf.head, part.inner or leaf.inner
    if leaf.frozen is not None:
        freeze(axis, leaf.frozen)


def unify(first: Axis, second: Axis, reason: str) -> None:
    """The two axes are the same, position by position. Where they do not fit, both freeze for ``reason``."""
    try:
        _unify(first, second, reason)
    except DoesNotFit:
        freeze(first, reason)
        freeze(second, reason)


def _unify(first: Axis, second: Axis, reason: str) -> None:
    first, second = resolve(first), resolve(second)
    if first is second:
        return
    if isinstance(first, Fixed):
        freeze(second, first.reason)
    elif isinstance(second, Fixed):
        freeze(first, second.reason)
    elif isinstance(first, Leaf):
        _bind(first, second)
    elif isinstance(second, Leaf):
        _bind(second, first)
    elif isinstance(first, Product) and isinstance(second, Product):
        _unify_products(first, second, reason)
    elif isinstance(first, Sum) and isinstance(second, Sum):
        _unify_sums(first, second, reason)
    else:
        product_, sum_ = (first, second) if isinstance(first, Product) else (second, first)
        assert isinstance(product_, Product) and isinstance(sum_, Sum)
        _unify_mixed(product_, sum_, reason)


def _unify_products(first: Product, second: Product, reason: str) -> None:
    a, b = first.factors[0], second.factors[0]
    if size_of(a) < size_of(b):
        first, second, a, b = second, first, b, a
    outer, inner = split_product(a, size_of(b))
    _unify(outer, b, reason)
    _unify(product([resolve(inner), *map(resolve, first.factors[1:])]), product(second.factors[1:]), reason)


def _unify_sums(first: Sum, second: Sum, reason: str) -> None:
    left: Axis = first
    for part in second.parts:
        taken, left = split_sum(left, size_of(part))
        _unify(taken, part, reason)


def _unify_mixed(first: Product, second: Sum, reason: str) -> None:
    row = size_of(product(first.factors[1:]))
    if all(size_of(part) % row == 0 for part in second.parts):
        _unify_sums(Sum((first,)), second, reason)
        return
    outer, inner = split_product(second, size_of(first.factors[0]))
    _unify(outer, first.factors[0], reason)
    _unify(inner, product(first.factors[1:]), reason)


def split_sum(axis: Axis, at: int) -> tuple[Axis, Axis]:
    """The first ``at`` positions and the rest. Raises DoesNotFit where a product would be cut inside a row."""
    axis = resolve(axis)
    size = size_of(axis)
    if at in (0, size):
        nothing = Fixed(0, "empty")
        return (axis, nothing) if at else (nothing, axis)
    if isinstance(axis, Fixed):
        return Fixed(at, axis.reason), Fixed(size - at, axis.reason)
    if isinstance(axis, Leaf):
        parts = Leaf(at), Leaf(size - at)
        _bind(axis, Sum(parts))
        return parts
    if isinstance(axis, Product):
        row = size // size_of(axis.factors[0])
        if at % row:
            raise DoesNotFit
        first, second = split_sum(axis.factors[0], at // row)
        return product([first, *axis.factors[1:]]), product([second, *axis.factors[1:]])
    before: list[Axis] = []
    for number, part in enumerate(axis.parts):
        if at < size_of(part):
            first, second = split_sum(part, at)
            return total([*before, first]), total([second, *axis.parts[number + 1 :]])
        before.append(part)
        at -= size_of(part)
    return total(before), Fixed(0, "empty")


def split_product(axis: Axis, count: int) -> tuple[Axis, Axis]:
    """The axis as ``count`` rows: (rows, positions in a row). Raises DoesNotFit where rows are not alike."""
    axis = resolve(axis)
    size = size_of(axis)
    if count == 0 or size % count:
        raise DoesNotFit
    if count in (1, size):
        return (ONE, axis) if count == 1 else (axis, ONE)
    if isinstance(axis, Fixed):
        return Fixed(count, axis.reason), Fixed(size // count, axis.reason)
    if isinstance(axis, Leaf):
        factors = Leaf(count), Leaf(size // count)
        _bind(axis, Product(factors))
        return factors
    if isinstance(axis, Product):
        return _split_factors(axis, count)
    row = size // count
    if any(size_of(part) % row for part in axis.parts):
        raise DoesNotFit
    pieces = [split_product(part, size_of(part) // row) for part in axis.parts]
    for _, inner in pieces[1:]:
        _unify(pieces[0][1], inner, "")
    return total([resolve(outer) for outer, _ in pieces]), resolve(pieces[0][1])


def _split_factors(axis: Product, count: int) -> tuple[Axis, Axis]:
    first, rest = axis.factors[0], axis.factors[1:]
    size = size_of(first)
    if size % count == 0:
        outer, inner = split_product(first, count)
        return outer, product([resolve(inner), *rest])
    if count % size:
        raise DoesNotFit
    outer, inner = split_product(product(rest), count // size)
    return product([first, resolve(outer)]), inner


def positions(axis: Axis) -> list[tuple[Leaf, NDArray[np.int64], NDArray[np.int64]]]:
    """For each leaf of the axis: the positions that carry it, and which of its channels each carries. A leaf comes
    again where it is multiplied with itself: position (i, j) carries both of its channels i and j."""
    axis = resolve(axis)
    found: dict[Leaf, list[NDArray[np.int64]]] = {}
    _number(axis, np.arange(size_of(axis)), size_of(axis), found)
    rows = [(leaf, units) for leaf, several in found.items() for units in several]
    return [(leaf, np.flatnonzero(units >= 0), units[units >= 0]) for leaf, units in rows]


def _number(axis: Axis, where: NDArray[np.int64], whole: int, found: dict[Leaf, list[NDArray[np.int64]]]) -> None:
    """Write into ``found`` which channel each position of ``where`` (rows of equal form, [..., size]) carries."""
    axis = resolve(axis)
    if isinstance(axis, Leaf):
        several = found.setdefault(axis, [])
        units = next((units for units in several if (units[where] < 0).all()), None)
        if units is None:
            units = np.full(whole, -1, dtype=np.int64)
            several.append(units)
        units[where] = np.arange(axis.size)
    elif isinstance(axis, Product):
        grid = where.reshape(*where.shape[:-1], *map(size_of, axis.factors))
        leading = where.ndim - 1
        for number, factor in enumerate(axis.factors):
            _number(factor, np.moveaxis(grid, leading + number, -1), whole, found)
    elif isinstance(axis, Sum):
        start = 0
        for part in axis.parts:
            _number(part, where[..., start : start + size_of(part)], whole, found)
            start += size_of(part)


def crossings(axis: Axis) -> Iterator[tuple[Leaf, Leaf]]:
    """Pairs of leaves that own the same positions, as factors of one product."""
    axis = resolve(axis)
    if isinstance(axis, Product):
        inside = [tuple(leaves(factor)) for factor in axis.factors]
        for number, first in enumerate(inside):
            for second in inside[number + 1 :]:
                yield from ((a, b) for a in first for b in second)
        for factor in axis.factors:
            yield from crossings(factor)
    elif isinstance(axis, Sum):
        for part in axis.parts:
            yield from crossings(part)
