"""Prove that places told by the captured graph are where the running model passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tersor.core.intercept import INSIDE
from tersor.core.place import ActivationPlace
from tersor.graph.trace import Graph
from tersor.observe.watch import Watcher


def unreachable(
    model: nn.Module,
    graph: Graph,
    shapes: Mapping[ActivationPlace, tuple[int, ...] | None],
    example_inputs: tuple[Any, ...],
) -> dict[ActivationPlace, str]:
    """place → why it cannot be intercepted, for those in ``shapes`` that the running model does not bear out.

    A copy of the model runs once, on the inputs that the graph was captured with. A place is borne out where it is hit
    exactly once, its module makes as many of these calls as the graph says (else ordinals could be shifted), and what
    passes has the shape that the graph says, ``shapes[place]``.
    """
    watcher = Watcher(model, shapes)
    with torch.random.fork_rng(devices=[]):
        watcher.run(*example_inputs)
    expected = Counter((call.module, call.operator) for call in graph.calls)
    found = {}
    for place, statistics in watcher.statistics.items():
        operator = INSIDE.get(place.operator, place.operator)
        running = watcher.counts.get((place.module, operator), 0)
        in_graph = running if operator == "input" else expected[place.module, operator]
        if in_graph != running or statistics.calls != 1:
            found[place] = (
                f"cannot be intercepted: {in_graph} {operator} calls in the graph, {running} at run time, "
                f"{statistics.calls} of them at this ordinal"
            )
        elif statistics.shape != shapes[place]:
            found[place] = f"cannot be intercepted: shape {shapes[place]} in the graph, {statistics.shape} at run time"
    return found
