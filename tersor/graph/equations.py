"""What a forward says about sizes, solved: which attributes follow which channels, and which sizes hang together.

Sizes are polynomials over leaves and attributes. ``view(b, t, self.heads, c // self.heads)`` of a linear layer's output
says heads = self.heads and head size = c // self.heads; so the attribute follows the heads, and the width c is heads ×
head size, whatever of them shrinks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce
from itertools import product
from typing import Any

from torch import nn

from tersor.core.place import module_at
from tersor.graph.axis import Axis, Fixed, Leaf, Product, freeze, resolve
from tersor.graph.flow import Flow
from tersor.graph.sizes import Computed, Dim, Held, Source

Symbol = Leaf | Held
Powers = frozenset[tuple[Symbol, int]]


@dataclass(frozen=True)
class Polynomial:
    """Σ coefficient · Π symbol^power; powers may be negative, since sizes are divided."""

    terms: Mapping[Powers, Fraction]

    def symbols(self) -> Iterator[Symbol]:
        """Every symbol, once per term."""
        for powers in self.terms:
            yield from (symbol for symbol, _ in powers)

    def __add__(self, other: Polynomial) -> Polynomial:
        return _summed([*self.terms.items(), *other.terms.items()])

    def scaled(self, factor: Fraction) -> Polynomial:
        """The polynomial times a number."""
        return Polynomial({powers: value * factor for powers, value in self.terms.items()})

    def __mul__(self, other: Polynomial) -> Polynomial:
        if len(self.terms) == len(other.terms) == 1:
            ((a, x),), ((b, y),) = self.terms.items(), other.terms.items()
            return Polynomial({_joined(a, b): x * y})
        pairs = product(self.terms.items(), other.terms.items())
        return _summed([(_joined(a, b), x * y) for (a, x), (b, y) in pairs])

    def inverse(self) -> Polynomial:
        """1 / the polynomial, of a single term. Raises Unsolvable for more."""
        if len(self.terms) != 1:
            raise Unsolvable("divides by a sum")
        ((powers, value),) = self.terms.items()
        return Polynomial({frozenset((symbol, -power) for symbol, power in powers): 1 / value})

    def replaced(self, known: Mapping[Held, Polynomial]) -> Polynomial:
        """The polynomial with attributes replaced by what they are."""
        if not any(symbol in known for symbol in self.symbols() if isinstance(symbol, Held)):
            return self
        found = Polynomial({})
        for powers, value in self.terms.items():
            term = constant(value)
            for symbol, power in powers:
                base = known[symbol] if isinstance(symbol, Held) and symbol in known else of_symbol(symbol)
                for _ in range(abs(power)):
                    term = term * (base if power > 0 else base.inverse())
            found = found + term
        return found

    def value(self, sizes: Mapping[Leaf, int]) -> Fraction:
        """The number it is when leaves have these sizes (their own where none is given)."""
        found = Fraction(0)
        for powers, coefficient in self.terms.items():
            term = coefficient
            for symbol, power in powers:
                assert isinstance(symbol, Leaf), "attributes are replaced first"
                term *= Fraction(sizes.get(symbol, symbol.size)) ** power
            found += term
        return found


def _summed(terms: Iterable[tuple[Powers, Fraction]]) -> Polynomial:
    found: dict[Powers, Fraction] = {}
    for powers, coefficient in terms:
        found[powers] = found[powers] + coefficient if powers in found else coefficient
    return Polynomial({powers: value for powers, value in found.items() if value})


class Unsolvable(Exception):
    """A size that cannot be followed."""


def _joined(a: Powers, b: Powers) -> Powers:
    if not a or not b:
        return a or b
    powers: dict[Symbol, int] = dict(a)
    for symbol, power in b:
        powers[symbol] = powers.get(symbol, 0) + power
    return frozenset((symbol, power) for symbol, power in powers.items() if power)


def constant(value: Fraction | int) -> Polynomial:
    """A number."""
    return Polynomial({frozenset(): Fraction(value)} if value else {})


def of_symbol(symbol: Symbol) -> Polynomial:
    """A symbol alone."""
    return Polynomial({frozenset({(symbol, 1)}): Fraction(1)})


def length(axis: Axis) -> Polynomial:
    """How long an axis is."""
    axis = resolve(axis)
    if isinstance(axis, Fixed):
        return constant(axis.size)
    if isinstance(axis, Leaf):
        return of_symbol(axis) if axis.frozen is None else constant(axis.size)
    if isinstance(axis, Product):
        return reduce(Polynomial.__mul__, map(length, axis.factors))
    return _summed(term for part in axis.parts for term in length(part).terms.items())


def _of_source(source: Source, flow: Flow) -> Polynomial:
    if isinstance(source, int):
        return constant(source)
    if isinstance(source, Held):
        return of_symbol(source)
    if isinstance(source, Dim):
        axes = flow.value(source.function, source.index)
        if axes is None:
            raise Unsolvable("is a shape that the graph does not hold")
        return length(axes[source.dim])
    assert isinstance(source, Computed)
    left, right = _of_source(source.left, flow), _of_source(source.right, flow)
    match source.operation:
        case "+":
            return left + right
        case "-":
            return left + right.scaled(Fraction(-1))
        case "*":
            return left * right
        case "//":
            return left * right.inverse()


@dataclass(frozen=True)
class Tie:
    """Π ratio(leaf)^power = 1, where a leaf's ratio is the share of its channels that stays. ``where`` the forward
    says so."""

    powers: Mapping[Leaf, int]
    where: str


@dataclass
class Solution:
    """``attributes``: what they will be. ``ties``: leaves whose shares hang together."""

    attributes: dict[Held, Polynomial] = field(default_factory=dict)
    ties: list[Tie] = field(default_factory=list)


@dataclass(frozen=True)
class _Equal:
    left: Polynomial
    right: Polynomial
    where: str

    def symbols(self) -> set[Symbol]:
        return {symbol for side in (self.left, self.right) for symbol in side.symbols()}

    def held(self) -> set[Held]:
        return {symbol for symbol in self.symbols() if isinstance(symbol, Held)}

    def replaced(self, known: Mapping[Held, Polynomial]) -> _Equal:
        return _Equal(self.left.replaced(known), self.right.replaced(known), self.where)

    def freeze(self, reason: str) -> None:
        for symbol in self.symbols():
            if isinstance(symbol, Leaf):
                freeze(symbol, reason)


def solve(flows: Sequence[Flow], model: nn.Module) -> Solution:
    """Solve what the forward says of sizes. Leaves whose size is a literal, or hangs on a sum, freeze."""
    pending = [equal for flow in flows for equal in _equations(flow)]
    known: dict[Held, Polynomial] = {}
    pending = _reduced(pending, known)
    while counts := _counts(pending, model):
        known.update(counts)
        pending = _reduced(pending, known)
    return Solution({held: value for held, value in known.items() if any(value.symbols())}, _ties(pending, model))


def _reduced(pending: list[_Equal], known: dict[Held, Polynomial]) -> list[_Equal]:
    """Solve for attributes, into ``known``, as long as one can be; returns the equations that are left."""
    for find in (_alone, _in_a_product, _in_a_sum):  # attributes that are a size come before those that are a part
        progress = True
        while progress:
            progress = False
            rest = []
            for equal in pending:
                try:
                    equal = equal.replaced(known)
                except Unsolvable as error:
                    equal.freeze(f"has a size at {equal.where} that {error}")
                    continue
                if equal.left == equal.right:
                    continue
                solved = find(equal)
                if solved is None:
                    rest.append(equal)
                else:
                    known[solved[0]] = solved[1]
                    progress = True
            pending = rest
    return pending


def _counts(pending: list[_Equal], model: nn.Module) -> dict[Held, Polynomial]:
    """Of the first equation with several attributes (``self.channels // self.paths``), all but the largest as the
    numbers that they are: they count something else."""
    for equal in pending:
        if len(held := equal.held()) > 1:
            *others, _ = sorted(held, key=lambda symbol: (_number(model, symbol), str(symbol)))
            return {symbol: constant(_number(model, symbol)) for symbol in others}
    return {}


def _equations(flow: Flow) -> Iterator[_Equal]:
    for equation in flow.equations:
        left = length(equation.axis)
        try:
            right = _of_source(equation.source, flow)
        except Unsolvable as error:
            freeze(equation.axis, f"has a size at {equation.where} that {error}")
            continue
        if left != right:
            yield _Equal(left, right, equation.where)
    for first, second in flow.graph.book.equal:
        try:
            left, right = _of_source(first, flow), _of_source(second, flow)
        except Unsolvable:
            continue
        if left != right:
            yield _Equal(left, right, "a comparison in the forward")


def _alone(equal: _Equal) -> tuple[Held, Polynomial] | None:
    """The attribute that is one side of the equation."""
    return _in_a_product(equal, alone=True)


def _in_a_product(equal: _Equal, alone: bool = False) -> tuple[Held, Polynomial] | None:
    """The attribute that is multiplied or divided by what is known."""
    for side, other in ((equal.left, equal.right), (equal.right, equal.left)):
        if len(side.terms) != 1 or any(isinstance(symbol, Held) for symbol in other.symbols()):
            continue
        ((powers, value),) = side.terms.items()
        held = [(symbol, power) for symbol, power in powers if isinstance(symbol, Held)]
        if len(held) != 1 or abs(held[0][1]) != 1 or (alone and (len(powers) != 1 or value != 1)):
            continue
        symbol, power = held[0]
        rest = Polynomial({powers - {held[0]}: value})
        try:
            value_ = other * rest.inverse() if power == 1 else rest * other.inverse()
        except Unsolvable:
            continue
        if all(power > 0 for powers in value_.terms for _, power in powers):  # a ratio of sizes stays a number
            return symbol, value_
    return None


def _in_a_sum(equal: _Equal) -> tuple[Held, Polynomial] | None:
    """The attribute that is in one term of a sum of what is known: ``split([first, whole - first])``."""
    difference = equal.left + equal.right.scaled(Fraction(-1))
    found = [
        (powers, symbol, power) for powers in difference.terms for symbol, power in powers if isinstance(symbol, Held)
    ]
    if len(found) != 1 or found[0][2] != 1:
        return None
    powers, symbol, power = found[0]
    factor = Polynomial({powers - {(symbol, power)}: -difference.terms[powers]})
    rest = Polynomial({other: value for other, value in difference.terms.items() if other != powers})
    return symbol, rest * factor.inverse()


def _ties(pending: list[_Equal], model: nn.Module) -> list[Tie]:
    """Attributes that nothing determines are numbers; what is left ties leaves to each other, or to a number."""
    ties = []
    for equal in pending:
        equal = equal.replaced({symbol: constant(_number(model, symbol)) for symbol in equal.held()})
        if equal.left == equal.right:
            continue
        if len(equal.left.terms) != 1 or len(equal.right.terms) != 1:
            equal.freeze(f"is part of a size at {equal.where} that hangs on a sum")
            continue
        ((powers, _),) = (equal.left * equal.right.inverse()).terms.items()
        tied = {symbol: power for symbol, power in powers if isinstance(symbol, Leaf)}
        if len(tied) == 1:
            (leaf,) = tied
            freeze(leaf, f"has its size as a literal in the forward at {equal.where}")
        elif tied:
            ties.append(Tie(tied, equal.where))
    return ties


def whole_value(model: nn.Module, held: Held) -> Any:
    """What an attribute holds now: an int, or the tuple that one entry is meant of."""
    value: Any = module_at(model, held.module)
    for name in held.name.split("."):
        value = getattr(value, name)
    return value


def _number(model: nn.Module, held: Held) -> int:
    value = whole_value(model, held)
    return int(value if held.index is None else value[held.index])
