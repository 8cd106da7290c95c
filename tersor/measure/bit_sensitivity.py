"""How few bits each layer bears: loss and metric with one layer quantised at a time, at several widths."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from tersor.core.apply import apply
from tersor.core.check_fields import check_fields
from tersor.core.edit import Quantizer
from tersor.core.errors import InputError
from tersor.core.place import Place, TensorPlace, stored_at
from tersor.core.plan import Plan, Skip
from tersor.core.progress import Progress
from tersor.core.randomness import seeded
from tersor.core.task import Task
from tersor.graph.trace import Graph, trace
from tersor.measure.layer_curves import Curves, Judge, expect_effort, in_time
from tersor.quantize.points import Flow, decide
from tersor.quantize.quantize import Quantize
from tersor.quantize.weight_steps import expect_float_weights
from tersor.quantize.weights import WEIGHTED, weight_place

WIDTHS = (8, 4, 3, 2)


@dataclass(frozen=True)
class WidthPoint:
    """The whole model's loss and metric with one layer at ``bits`` bits (infinite and NaN where its outputs are not
    finite); ``size_bytes``: of that layer's weights then, ⌈n · bits / 8⌉ and 4 for each scale."""

    bits: int
    size_bytes: int
    loss: float
    metric: float


@dataclass(frozen=True)
class LayerWidths:
    """One layer: the place of its weight, how many numbers that has, and its points, bits falling."""

    place: str
    parameters: int
    points: tuple[WidthPoint, ...]

    @property
    def layer(self) -> str:
        """The module's path, as ``Quantize(per_layer=…)`` takes it."""
        return self.place.rpartition(".")[0]

    @property
    def float_bytes(self) -> int:
        """What its weights take in float32."""
        return 4 * self.parameters


@dataclass(frozen=True)
class BitSensitivity(Curves[LayerWidths]):
    """Loss and metric of the model in float, a curve for each layer, and what cannot be quantised."""


@dataclass(frozen=True)
class BitProbe:
    """What is measured: each layer's weights at each of ``bits``; activations, ranges and where are ``quantize``'s.

    On the first ``samples`` validation samples (whole batches), for about ``seconds`` (None: as long as it takes; the
    float model and one point are always measured). Raises InputError for settings out of range.
    """

    bits: Sequence[int] = WIDTHS
    quantize: Quantize = field(default_factory=Quantize)
    samples: int = 1024
    seconds: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        expect_effort("BitProbe", self.samples, self.seconds)
        if not self.bits or not all(type(bits) is int and 2 <= bits <= 8 for bits in self.bits):
            raise InputError("impossible widths", where="BitProbe.bits", got=self.bits, expected="within 2 … 8")

    def methods(self) -> dict[int, Quantize]:
        """What quantises at each width, bits falling; nothing is learnt."""
        scheme = self.quantize.weights
        return {
            bits: replace(self.quantize, weights=replace(scheme, bits=bits), learn=False)
            for bits in sorted(set(self.bits), reverse=True)
        }


def bit_sensitivity(
    model: nn.Module, task: Task, probe: BitProbe = BitProbe(), *, progress: Progress | None = None
) -> BitSensitivity:
    """Quantise one layer of ``model`` at a time (on a copy), at each width, and evaluate the whole model.

    A layer is quantised with what it reads and gives, as ``probe.quantize`` would; the rest stays float. All layers at
    the most bits come first, so that where time runs out every layer has the same points, or one less. Raises what
    ``Quantize`` raises (batch norm is to be folded first), and InputError for batches that cannot be run.
    """
    begun = time.monotonic()
    expect_float_weights(model, "bit_sensitivity")
    alone = copy.deepcopy(model).eval()
    judge = Judge.of(task, alone, probe.samples)
    loss, metric = judge(alone)
    work, skips = _work(alone, task, probe)
    points: dict[TensorPlace, list[WidthPoint]] = {}
    for bits, place, edits in in_time(work, "sensitivity to bits", probe.seconds, begun, progress):
        weight = next(edit for edit in edits if place in edit.places)
        size = _size(stored_at(alone, place).numel(), bits, weight)
        found = judge(apply(alone, Plan("one layer", edits)))
        points.setdefault(place, []).append(WidthPoint(bits, size, *found))
    layers = tuple(
        LayerWidths(str(place), stored_at(alone, place).numel(), tuple(measured)) for place, measured in points.items()
    )
    left_out = len(work) - sum(map(len, points.values()))
    return BitSensitivity(loss, metric, judge.higher_is_better, judge.samples, layers, skips, left_out)


def _size(numbers: int, bits: int, weight: Quantizer) -> int:
    return -(-numbers * bits // 8) + 4 * weight.scale.numel()


def _work(
    model: nn.Module, task: Task, probe: BitProbe
) -> tuple[list[tuple[int, TensorPlace, tuple[Quantizer, ...]]], tuple[Skip, ...]]:
    """(bits, a weight's place, the quantisers of its layer alone) for each point; and what is passed over."""
    graph = trace(model, task.demand_example())
    work: list[tuple[int, TensorPlace, tuple[Quantizer, ...]]] = []
    skips: dict[Skip, None] = {}
    for bits, method in probe.methods().items():
        with seeded(0, task.calibration):
            plan = method.plan(model, task)
        skips |= dict.fromkeys(plan.skips)
        work += [(bits, place, edits) for place, edits in quantizers_by_layer(model, graph, plan).items()]
    if not work:
        reasons = "; ".join(f"{skip.place}: {skip.reason}" for skip in list(skips)[:3])
        raise InputError("no layer can be quantised", where="bit_sensitivity", got=reasons)
    return work, tuple(skips)


def quantizers_by_layer(model: nn.Module, graph: Graph, plan: Plan) -> Mapping[TensorPlace, tuple[Quantizer, ...]]:
    """Place of each weight that ``plan`` quantises → the quantisers with which its layer alone runs in integers: the
    weight's own, and those of the activations that its calls read and give."""
    at = {place: edit for edit in plan.edits if isinstance(edit, Quantizer) for place in edit.places}
    flow = Flow(graph)
    barred = {name for name in [*graph.inputs, *flow.calls] if flow.place(name) not in at}
    found: dict[TensorPlace, tuple[Quantizer, ...]] = {}
    for place in (place for place in at if isinstance(place, TensorPlace)):
        calls = [
            call for call in graph.calls if call.operator in WEIGHTED and weight_place(model, graph, call) == place
        ]
        points = decide(flow, calls, barred)
        needed = {flow.place(name) for name in points.values} & at.keys()
        found[place] = tuple(_restricted(at, {*needed, place}))
    return found


def _restricted(at: Mapping[Place, Quantizer], places: set[Place]) -> Iterator[Quantizer]:
    """The quantisers of these places, without the others that share them."""
    for edit in dict.fromkeys(at.values()):
        mine = tuple(place for place in edit.places if place in places)
        if mine:
            yield replace(edit, places=mine)
