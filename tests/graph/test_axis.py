"""The algebra of axes against a naive one: an axis as a list, for each position the labels of the channels that take it
along."""

from itertools import product as pairs

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tersor.graph import axis as algebra
from tersor.graph.axis import (
    ONE,
    DoesNotFit,
    Fixed,
    Leaf,
    Product,
    Sum,
    crossings,
    fix,
    freeze,
    leaves,
    positions,
    product,
    resolve,
    size_of,
    split_product,
    split_sum,
    total,
    unify,
)

NONE = frozenset()


def labels(axis):
    """Position → the (leaf, channel) pairs that it goes with; none for a leaf of one channel, which never goes."""
    if isinstance(axis, Fixed):
        return [NONE] * axis.size
    if isinstance(axis, Leaf):
        if axis.bound is not None:
            return labels(axis.bound)
        return [frozenset({(axis, channel)}) if axis.size > 1 else NONE for channel in range(axis.size)]
    if isinstance(axis, Sum):
        return [label for part in axis.parts for label in labels(part)]
    found = [NONE]
    for factor in axis.factors:
        found = outer(found, labels(factor))
    return found


def outer(rows, inside):
    return [row | column for row, column in pairs(rows, inside)]


def free(found):
    """Labels without those of leaves that are frozen: what can really go."""
    return [frozenset(pair for pair in label if pair[0].frozen is None) for label in found]


def by_positions(axis):
    """Position → labels, as ``positions`` says."""
    found = [set() for _ in range(size_of(axis))]
    for leaf, where, units in positions(axis):
        assert len(where) == len(units)
        for position, unit in zip(where, units, strict=True):
            if leaf.size > 1:
                found[position].add((leaf, int(unit)))
    return found


class Program:
    """Axes made one from another by drawn steps, and what must hold of them whatever is learnt later."""

    def __init__(self, draw):
        self.draw = draw
        self.axes = [Leaf(draw(st.sampled_from([2, 3, 4, 6, 8, 12]))) for _ in range(3)]
        self.claims = []  # functions that give two lists of labels: equal where channels can go

    def pick(self):
        return self.draw(st.sampled_from(self.axes))

    def add(self, axis, size):
        assert size_of(axis) == size
        if 1 < size <= 96 and len(self.axes) < 24:
            self.axes.append(axis)

    def leaf(self):
        self.axes.append(Leaf(self.draw(st.integers(2, 12))))

    def constant(self):
        self.axes.append(Fixed(self.draw(st.integers(1, 5)), "a constant"))

    def cat(self):
        parts = [self.pick() for _ in range(self.draw(st.integers(2, 3)))]
        joined = total([resolve(part) for part in parts])
        self.claims.append(lambda: (labels(joined), [label for part in parts for label in labels(part)]))
        self.add(joined, sum(map(size_of, parts)))

    def flatten(self):
        first, second = self.pick(), self.pick()
        if size_of(first) * size_of(second) <= 96:
            flat = product([resolve(first), resolve(second)])
            self.claims.append(lambda: (labels(flat), outer(labels(first), labels(second))))
            self.add(flat, size_of(first) * size_of(second))

    def split(self):
        whole = self.pick()
        at = self.draw(st.integers(0, size_of(whole)))
        before, after = split_sum(whole, at)
        self.claims.append(lambda: (labels(whole), labels(before) + labels(after)))
        self.add(before, at)
        self.add(after, size_of(whole) - at)

    def view(self):
        whole = self.pick()
        size = size_of(whole)
        count = self.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        rows, inside = split_product(whole, count)
        self.claims.append(lambda: (labels(whole), outer(labels(rows), labels(inside))))
        self.add(rows, count)
        self.add(inside, size // count)
        turned = product([resolve(inside), resolve(rows)])  # a transpose and a reshape
        self.claims.append(lambda: (labels(turned), outer(labels(inside), labels(rows))))
        self.add(turned, size)

    def same(self):
        first = self.pick()
        others = [axis for axis in self.axes if size_of(axis) == size_of(first)]
        second = self.draw(st.sampled_from(others))
        unify(first, second, "they do not fit")
        self.claims.append(lambda: (labels(first), labels(second)))

    def frozen(self):
        axis = self.pick()
        freeze(axis, "it is read by number")
        self.claims.append(lambda: (labels(axis), [NONE] * size_of(axis)))

    def counted(self):
        axis = self.pick()
        fix(axis, "a number of parts")
        self.claims.append(lambda: (labels(axis), [NONE] * size_of(axis)))

    def step(self):
        steps = [self.cat, self.flatten, self.split, self.view, self.view, self.same, self.same, self.same]
        rare = [*steps, self.leaf, self.constant, self.frozen, self.counted]
        try:
            self.draw(st.sampled_from(steps if self.draw(st.integers(0, 3)) else rare))()
        except DoesNotFit:
            pass  # the caller freezes; whatever was learnt until then still has to be right


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_learnt_no_position_is_taken_for_another(data):
    program = Program(data.draw)
    sizes = {}
    for _ in range(data.draw(st.integers(2, 14))):
        program.step()
        for axis in program.axes:
            assert sizes.setdefault(id(axis), size_of(axis)) == size_of(axis) == size_of(resolve(axis))
    for number, claim in enumerate(program.claims):
        first, second = claim()
        assert free(first) == free(second), f"claim {number}"
    for axis in program.axes:
        assert by_positions(axis) == labels(axis) == labels(resolve(axis))
        for first, second in ((a, b) for a, b in crossings(axis) if a.size > 1 < b.size):
            assert any({first, second} <= {leaf for leaf, _ in label} for label in labels(axis))


def test_the_naive_labels_of_sums_and_products():
    a, b = Leaf(2), Leaf(3)
    assert labels(Sum((a, Fixed(1, "it"), a))) == [{(a, 0)}, {(a, 1)}, NONE, {(a, 0)}, {(a, 1)}]
    assert labels(Product((a, b)))[4] == {(a, 1), (b, 1)}


def test_a_view_as_heads_makes_two_leaves_of_one():
    channels = Leaf(12)
    heads, inside = split_product(channels, 3)
    assert isinstance(heads, Leaf) and isinstance(inside, Leaf)
    assert list(leaves(channels)) == [heads, inside] and all(leaf.frozen is None for leaf in leaves(channels))
    found = {leaf: units.tolist() for leaf, _, units in positions(channels)}
    assert found[heads] == [0] * 4 + [1] * 4 + [2] * 4 and found[inside] == [0, 1, 2, 3] * 3


def test_a_shuffle_and_its_inverse_leave_the_channels_free():
    channels, other = Leaf(6), Leaf(6)
    rows, inside = split_product(channels, 2)
    shuffled = product([resolve(inside), resolve(rows)])
    unify(shuffled, other, "they do not fit")
    back = split_product(other, 3)
    unify(product([resolve(back[1]), resolve(back[0])]), channels, "they do not fit")
    assert all(leaf.frozen is None for leaf in leaves(channels))
    assert labels(other) == labels(shuffled)


def test_concatenations_cut_at_other_places_are_cut_at_both():
    a, b, c, d = Leaf(2), Leaf(4), Leaf(3), Leaf(3)
    unify(Sum((a, b)), Sum((c, d)), "they do not fit")
    assert labels(Sum((a, b))) == labels(Sum((c, d)))
    assert sorted(leaf.size for leaf in leaves(Sum((c, d)))) == [1, 2, 3]
    assert all(leaf.frozen is None for leaf in leaves(Sum((a, b))))


def test_parts_of_one_size_stacked_by_a_view_keep_the_same_channels():
    a, b = Leaf(4), Leaf(4)
    rows, inside = split_product(Sum((a, b)), 2)
    assert isinstance(resolve(rows), Fixed) and resolve(a) is resolve(b) is resolve(inside)
    assert all(leaf.frozen is None for leaf in leaves(inside))


def test_an_axis_multiplied_with_itself_loses_rows_and_columns():
    a = Leaf(3)
    square = Product((a, a))
    lost = {int(where[i]) for leaf, where, units in positions(square) for i in np.flatnonzero(units == 1)}
    assert lost == {1, 3, 4, 5, 7}


def test_a_rotation_of_an_axis_onto_itself_makes_one_unit_of_all():
    a, b = Leaf(3), Leaf(1)
    unify(Sum((a, b)), Sum((b, a)), "they do not fit")
    ((leaf, where, units),) = positions(Sum((a, b)))
    assert leaf.size == 1 and where.tolist() == [0, 1, 2, 3] and units.tolist() == [0, 0, 0, 0]


def test_a_product_cut_inside_a_row_does_not_fit_and_unify_freezes_both():
    rows, inside = Leaf(2), Leaf(3)
    with pytest.raises(DoesNotFit):
        split_sum(Product((rows, inside)), 2)
    with pytest.raises(DoesNotFit):
        split_product(Sum((Leaf(2), Leaf(4), Leaf(3))), 2)
    first, second = Product((rows, inside)), Sum((Leaf(2), Leaf(4)))
    unify(first, second, "are cut in two ways")
    assert {leaf.frozen for leaf in [*leaves(first), *leaves(second)]} == {"are cut in two ways"}


def test_what_meets_a_fixed_axis_freezes_for_its_reason_and_the_first_reason_stays():
    leaf = Leaf(3)
    unify(leaf, Fixed(3, "the model's input"), "they do not fit")
    freeze(leaf, "something later")
    assert leaf.frozen == "the model's input"
    other = Leaf(3)
    unify(other, leaf, "they do not fit")
    assert {found.frozen for found in leaves(other)} == {"the model's input"}


def test_marks_pass_to_what_a_leaf_is_found_to_be():
    leaf = Leaf(6, head=True, group=True)
    parts = split_sum(leaf, 2)
    assert all(part.head and part.group and not part.inner for part in parts)
    other = Leaf(2, inner=True)
    unify(other, parts[0], "they do not fit")
    (found,) = leaves(parts[0])
    assert found.head and found.inner and found.group


def test_single_positions_and_empty_parts_vanish():
    assert product([]) == product([ONE, ONE]) == ONE
    leaf = Leaf(3)
    assert product([ONE, leaf, Fixed(1, "it")]) is leaf and total([Fixed(0, "empty"), leaf]) is leaf
    assert total([]) == Fixed(0, "empty") and total([Fixed(1, "a"), Fixed(2, "b")]) == Fixed(3, "a")
    assert size_of(algebra.split_sum(leaf, 3)[1]) == 0 and split_product(leaf, 3) == (leaf, ONE)
