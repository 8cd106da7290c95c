"""The rules by operator: ``@rule("relu", …)`` registers one; an operator without a rule freezes what it touches."""

from __future__ import annotations

from collections.abc import Callable

from tersor.graph.axis import DoesNotFit
from tersor.graph.flow import Axes, Flow, Many, Refusal
from tersor.graph.trace import Call

Rule = Callable[[Call, Flow], Axes | Many]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these ATen operators (base names).

    A rule reads the axes of the call's arguments, ties, freezes and marks atoms, and returns the result's axes. Every
    axis that it neither passes on nor ties to a consumer's weight it must freeze.
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            assert operator not in RULES, f"two rules for {operator}"
            RULES[operator] = function
        return function

    return register


def follow(call: Call, flow: Flow) -> Axes | Many:
    """The axes of what the call gives, by its rule; where there is none, everything that flows through is frozen."""
    if call.operator not in RULES:
        flow.unknown[call.operator] = flow.unknown.get(call.operator, 0) + 1
        return flow.give_up(call, f"passes through {call.place}, an operator without a rule")
    if call.shape is None and call.dtype is not None:
        return flow.give_up(call, f"has a shape at {call.place} that depends on the data")
    try:
        return RULES[call.operator](call, flow)
    except (Refusal, DoesNotFit) as refusal:
        return flow.give_up(call, f"passes through {call.place}, which {refusal}")
