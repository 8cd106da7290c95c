"""How long it takes to find which channels go together, over growing depth: Tersor and Torch-Pruning in one run."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar

import torch
import torch_pruning
from torch import nn

from benchmarks.structured.page import table, write
from tersor.graph.groups import find_groups
from tersor.graph.trace import trace
from tersor.zoo.residual import ResidualNet

DEPTHS = (50, 100, 200, 400)
WIDTH = 16
T = TypeVar("T")


@dataclass(frozen=True)
class Seconds:
    """CPU seconds of each stage: Tersor's capture and grouping, Torch-Pruning's graph and its list of groups."""

    capture: float
    grouping: float
    graph: float
    groups: float


def main() -> None:
    """Time both tools and write docs/benchmarks/grouping.md."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="layers of the networks, even numbers")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure(plain_residual(10))  # imports and caches of both tools
    found: dict[int, list[Seconds]] = {depth: [] for depth in args.depths}
    for _ in range(args.repeats):  # in turns, so that what slows the machine slows all depths
        for depth in args.depths:
            found[depth].append(measure(plain_residual(depth)))
            print(depth, found[depth][-1], flush=True)
    medians = {depth: _median(times) for depth, times in found.items()}
    _write(medians, args.repeats)


def plain_residual(layers: int) -> nn.Module:
    """A residual network of ``layers`` layers with weights: a convolution, blocks of two, a linear layer."""
    if layers < 4 or layers % 2:
        raise ValueError(f"{layers} layers: expected an even number, 4 or more")
    return ResidualNet((WIDTH,), (layers - 2) // 2, in_channels=3, classes=10).eval()


def measure(model: nn.Module) -> Seconds:
    """Each stage of both tools on ``model``, once."""
    example = torch.randn(2, 3, 8, 8)
    graph, capture = _timed(lambda: trace(model, (example,)))
    _, grouping = _timed(lambda: find_groups(graph, model))
    peer, built = _timed(lambda: torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example[:1]))
    last = [model.get_submodule("fc")]
    _, groups = _timed(lambda: list(peer.get_all_groups(ignored_layers=last)))
    return Seconds(capture, grouping, built, groups)


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    begun = time.process_time()
    result = call()
    return result, time.process_time() - begun


def _median(times: Sequence[Seconds]) -> Seconds:
    columns = zip(*((t.capture, t.grouping, t.graph, t.groups) for t in times), strict=True)
    return Seconds(*(statistics.median(column) for column in columns))


def _write(medians: dict[int, Seconds], repeats: int) -> None:
    columns: list[tuple[str, Callable[[Seconds], float]]] = [
        ("Tersor: capture", lambda t: t.capture),
        ("Tersor: grouping", lambda t: t.grouping),
        ("Tersor: both", lambda t: t.capture + t.grouping),
        ("Torch-Pruning: graph", lambda t: t.graph),
        ("Torch-Pruning: groups", lambda t: t.groups),
        ("Torch-Pruning: both", lambda t: t.graph + t.groups),
    ]
    rows = [[str(depth), *(f"{1e3 * of(times):,.0f} ms" for _, of in columns)] for depth, times in medians.items()]
    first, last = min(medians), max(medians)
    if first != last:
        grown = math.log(last / first)
        slopes = (math.log(of(medians[last]) / of(medians[first])) / grown for _, of in columns)
        rows.append(["growth: depth to the power of", *(f"{slope:.2f}" for slope in slopes)])
    body = (
        f"Residual networks of two-convolution blocks, {WIDTH} channels; CPU seconds on one thread, the median of "
        f"{repeats} turns through all depths. Torch-Pruning {version('torch-pruning')}: `build_dependency`, then "
        "`get_all_groups`. The last line is the slope between the shallowest and the deepest network in a doubly "
        "logarithmic plot: 1 is linear.\n\n" + table(["layers", *(name for name, _ in columns)], rows)
    )
    write("grouping", "Finding groups over growing depth", body, "benchmarks/structured/grouping.py")


if __name__ == "__main__":
    main()
