"""Products of tensors: matmul, einsum, attention. Equal letters are equal axes; those that vanish are summed over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tersor.graph.axis import ONE, Axis, leaves, size_of
from tersor.graph.flow import Axes, Flow, Refusal, argument
from tersor.graph.rules.elementwise import aligned
from tersor.graph.rules.registry import rule
from tersor.graph.trace import Call

Reads = Callable[[Call, int, int], None]


@rule("matmul", "bmm", "mm", "mv", "dot", "vdot")
def matmul(call: Call, flow: Flow) -> Axes:
    """[…, m, k] · […, k, n] → […, m, n]; batch axes are stretched."""
    return _matmul(call, flow, 0, 1)


@rule("addmm", "baddbmm", "addbmm")
def addmm(call: Call, flow: Flow) -> Axes:
    """input + a · b."""
    result = _matmul(call, flow, 1, 2)
    added = flow.axes(call.args[0])
    for back in range(1, len(added) + 1):
        if size_of(added[-back]) == size_of(result[-back]):
            flow.tie(result[-back], added[-back], call)
    return result


def _matmul(call: Call, flow: Flow, first: int, second: int) -> Axes:
    a, b = len(flow.axes(call.args[first])), len(flow.axes(call.args[second]))
    batch = "ABCDEFGH"[: max(a, b, 2) - 2]
    left = (batch + "mk")[-a:] if a > 1 else "k"
    right = (batch + "kn")[-b:] if b > 1 else "k"
    result = (batch if max(a, b) > 2 else "") + ("m" if a > 1 else "") + ("n" if b > 1 else "")
    return contract(call, flow, [(first, left), (second, right)], result)


@rule("einsum")
def einsum(call: Call, flow: Flow) -> Axes:
    """Any sum of products in Einstein's notation; "…" stands for leading axes."""
    equation = call.args[0].replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    if not arrow:
        raise Refusal("is an einsum without an arrow")
    operands = call.args[1]
    terms = inputs.split(",")
    spare = [letter for letter in "ZYXWVUTSRQ" if letter not in equation]
    ranks = [len(flow.axes(ref)) - len(term.replace("...", "")) for ref, term in zip(operands, terms, strict=True)]
    dots = "".join(spare[: max(ranks, default=0)])
    terms = [term.replace("...", dots[len(dots) - rank :]) for term, rank in zip(terms, ranks, strict=True)]
    return _contracted(call, flow, list(zip(operands, terms, strict=True)), output.replace("...", dots))


@rule("scaled_dot_product_attention")
def attention(call: Call, flow: Flow) -> Axes:
    """softmax(q · kᵀ / √e + mask) · v over [batch, heads, length, e]; with grouped queries heads are k's times a
    repeat."""
    query, key, value = (flow.axes(call.args[number]) for number in range(3))
    if argument(call, 7, "enable_gqa", False) and size_of(query[-3]) != size_of(key[-3]):
        raise Refusal("shares key heads among query heads inside the operator")
    batch = "ABCDEFGH"[: len(query) - 2]
    # Without a stated scale it is 1 / √e of the e that stays: the sum is a statistic.
    how = flow.sums if argument(call, 6, "scale") is not None else flow.statistics
    scores = contract(call, flow, [(0, batch + "le"), (1, batch + "se")], batch + "ls", how)
    mask = argument(call, 3, "attn_mask")
    if mask is not None:
        for back, axis in enumerate(reversed(flow.axes(mask)), start=1):
            if size_of(axis) == size_of(scores[-back]):
                flow.tie(scores[-back], axis, call)
    for number in (-2, -1):
        flow.freeze(scores[number], f"is a position of the sequence at {call.place}")
    heads = [aligned(call, flow, [scores[n], value[n]], size_of(scores[n])) for n in range(len(query) - 2)]
    flow.tie(key[-2], value[-2], call)
    _mark(value[:-2], value[-1:])
    return (*heads, query[-2], value[-1])


def contract(
    call: Call, flow: Flow, operands: Sequence[tuple[int, str]], result: str, how: Reads | None = None
) -> Axes:
    """Tie the axes with equal letters of positional arguments; letters that ``result`` lacks are summed over."""
    arguments = [(call.args[number], letters) for number, letters in operands]
    return _contracted(call, flow, arguments, result, operands[0][0], how)


def _contracted(
    call: Call,
    flow: Flow,
    operands: list[tuple[Any, str]],
    result: str,
    first: int = 1,
    how: Reads | None = None,
) -> Axes:
    axes: dict[str, Axis] = {}
    for ref, letters in operands:
        for letter, axis in zip(letters, flow.axes(ref), strict=True):
            if letter not in axes or size_of(axes[letter]) == 1:
                axes[letter] = axis
            elif size_of(axis) != 1:
                axes[letter] = flow.tie(axes[letter], axis, call)
    weights = [flow.is_weight(ref) for ref, _ in operands]
    for number, (ref, letters) in enumerate(operands):
        others = {letter for other, (_, more) in enumerate(operands) if other != number for letter in more}
        for dim, letter in enumerate(letters):
            if weights[number] and not all(weights):
                _weight_role(flow, ref, dim, made=letter in result and letter not in others, read=letter not in result)
            if letter not in result and not _zeroed(flow, operands, weights, letter):
                (how or flow.sums)(call, first + number, dim)
    if not any(weights) and len(operands) == 2:
        shared = set(operands[0][1]) & set(operands[1][1]) & set(result)
        _mark([axes[c] for c in shared], [axis for letter, axis in axes.items() if letter not in shared])
    return tuple(axes.get(letter, ONE) for letter in result)


def _zeroed(flow: Flow, operands: list[tuple[Any, str]], weights: list[bool], letter: str) -> bool:
    """Whether some operand is a parameter whose entries are zeroed where the letter's channels are gone."""
    return not all(weights) and any(letter in letters and flow.is_parameter(ref) for ref, letters in operands)


def _weight_role(flow: Flow, ref: Any, dim: int, *, made: bool, read: bool) -> None:
    if made:
        flow.role(ref, dim, "producer")
    elif read:
        flow.role(ref, dim, "consumer")


def _mark(heads: Sequence[Axis], inner: Sequence[Axis]) -> None:
    for axis in heads:
        for leaf in leaves(axis):
            leaf.head = True
    for axis in inner:
        for leaf in leaves(axis):
            leaf.inner = True
