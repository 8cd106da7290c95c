"""Prove that places told by the captured graph are where the running model passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tersor.core.place import ActivationPlace
from tersor.graph.trace import Graph
from tersor.observe.watch import Watcher


def unreachable(
    model: nn.Module, graph: Graph, places: Iterable[ActivationPlace], example_inputs: tuple[Any, ...]
) -> dict[ActivationPlace, str]:
    """place → why it cannot be intercepted, for those of ``places`` that the running model does not bear out.

    A copy of the model runs once, on the inputs that the graph was captured with. A place is borne out where it is hit
    exactly once, its module makes as many of these calls as the graph says (else ordinals could be shifted), and the
    result has the shape that the graph has.
    """
    watcher = Watcher(model, places)
    with torch.random.fork_rng(devices=[]):
        watcher.run(*example_inputs)
    expected = Counter((call.module, call.operator) for call in graph.calls)
    shapes = {call.place: call.shape for call in graph.calls}
    shapes |= {ActivationPlace("", "input", i): shape for i, shape in enumerate(graph.inputs.values())}
    found = {}
    for place, statistics in watcher.statistics.items():
        in_graph = expected[place.module, place.operator] if place.operator != "input" else len(graph.inputs)
        running = watcher.counts.get((place.module, place.operator), 0)
        if in_graph != running or statistics.calls != 1:
            found[place] = (
                f"cannot be intercepted: {in_graph} {place.operator} calls in the graph, {running} at run time, "
                f"{statistics.calls} of them at this ordinal"
            )
        elif statistics.shape != shapes.get(place):
            found[place] = (
                f"cannot be intercepted: shape {shapes.get(place)} in the graph, {statistics.shape} at run time"
            )
    return found
