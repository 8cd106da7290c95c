"""Put quantisers on a model so that what is exported runs in integer arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from tersor.core.check_fields import check_fields
from tersor.core.edit import Quantizer
from tersor.core.errors import InputError
from tersor.core.place import ActivationPlace, Everything, Selector, TensorPlace, nearest_names, select, tensor_at
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.graph.trace import Call, Graph, trace
from tersor.observe.reach import unreachable
from tersor.observe.watch import Statistics, watch
from tersor.quantize.fold import QUANTISED, foldable
from tersor.quantize.gates import gate_quantizer, split_gates
from tersor.quantize.outliers import outliers
from tersor.quantize.points import INPUT, NO_KERNEL, PRODUCTS, Flow, Points, decide, float_calls, upper_bound
from tersor.quantize.ranges import MeanSquaredError, MinMax, Range
from tersor.quantize.schemes import Int
from tersor.quantize.weight_only import expect_finite_weight, expect_weight_bits, quantizer, rows_of
from tersor.quantize.weight_steps import expect_float_activations, kept, unfit, widened
from tersor.quantize.weights import (
    TRANSPOSED,
    WEIGHTED,
    bias_place,
    has_bias,
    is_quantized,
    output_axis,
    weight_place,
)

Observed = Mapping[ActivationPlace, Statistics]


@dataclass(frozen=True)
class Quantize(Method):
    """Fake-quantise weights and activations where ONNX Runtime has integer kernels for them.

    Quantised are: the weight, the activation and the result of every convolution and linear layer that ``where`` means
    (a sole following ReLU or clamp from zero is absorbed into the result's quantiser), the factors of the products of
    activations in the modules that ``where`` means (attention's), and additions, elementwise products, concatenations
    and spatial pooling between them. Operators without an integer kernel stay float and are skips; the modules nn.SiLU
    and nn.Hardswish become ``Gated``, x · gate(x), whose two operators have kernels.

    Biases are rounded to the steps on which integer kernels add them; training moves them off: ``RoundBiases``.

    After ``run`` alone the model is quantised post training; train it on (any loop, ``Finetune``) and it is
    quantisation-aware training: with ``learn`` the steps are trained too (LSQ, Esser et al. 2020, arXiv 1902.08153).

    Weights that are quantised already (``GPTQ``, ``QuantizeWeights``, ``AdaRound``), with a scale for each output or
    one, keep their grid and their values; only a channel whose bias would not fit 32 bits is put on a wider one. What
    has groups stays weights alone.

    Args:
        weights, activations: the integers. U8 activations with S8 weights is what AMX and VNNI kernels take. Weights
            have 2 to 8 bits. Other activations than of 8 bits, and weights in groups, are true in PyTorch and in the
            exported file, but no integer kernel takes them: the plan's first lines say so.
        weight_range, activation_range: which reals they reach.
        where: the convolution and linear modules meant, and the modules that multiply activations.
        calibration_batches: how many batches of ``task.calibration`` the activations' ranges are read from.
        learn: whether the scales are parameters.
        per_layer: other integers for the weights of some layers, or None: such a layer stays float. Name or pattern of
            a module or its weight → integers; the first that matches counts.
    """

    weights: Int = Int(8, "per_channel")
    activations: Int = Int(8, "per_tensor", symmetric=False)
    weight_range: Range = field(default_factory=MinMax)
    activation_range: Range = field(default_factory=MeanSquaredError)
    where: Selector = field(default_factory=Everything)
    calibration_batches: int = 8
    learn: bool = True
    per_layer: Mapping[str, Int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.activations.granularity != "per_tensor":
            raise InputError(
                "activations have one scale each", where="Quantize.activations", got=str(self.activations),
                expected='Int(8, "per_tensor", symmetric=False), or symmetric=True',
            )  # fmt: skip
        expect_weight_bits(self.weights, "Quantize.weights")
        for pattern, scheme in self.per_layer.items():
            if scheme is not None:
                expect_weight_bits(scheme, f"Quantize.per_layer[{pattern!r}]")
        if self.calibration_batches < 1:
            raise InputError(
                "too few batches",
                where="Quantize.calibration_batches",
                got=self.calibration_batches,
                expected="at least 1",
            )

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """One Quantizer for every weight and for every group of activations that share a grid, and before them one Swap
        for each SiLU and hard swish that is split.

        Raises InputError where activations are quantised already, batch norms ought to be folded first, the model does
        not compute in float32, a parameter or calibration is not finite, there is no calibration data, and where a name
        of ``per_layer`` matches no layer, or one whose weights are quantised already. What is constant over the
        calibration batches (a dead ReLU) tells no range: it is a skip, and the layers around it stay float. An
        activation with outliers is said in its line, with the range that helps.
        """
        example = task.demand_example()
        expect_float_activations(model)
        for name, parameter in model.named_parameters():
            module, _, tensor = name.rpartition(".")
            expect_finite_weight(TensorPlace(module, tensor), parameter)
        graph = trace(model, example)
        _expect_folded(model, graph)
        flow = Flow(graph)
        weighted, skips = self._weighted(model, graph, flow)
        products = self._products(model, graph)
        model, gates, whole = split_gates(model, task, flow, weighted, products)
        if gates:
            graph = trace(model, example)
            flow = Flow(graph)
            weighted, skips = self._weighted(model, graph, flow)
            products = self._products(model, graph)
        skips += whole
        points, statistics, missed = self._observed(model, task, flow, weighted, products)
        skips += [Skip(str(place), reason) for place, reason in missed.items()]
        kept = {call.name for call in points.weighted}
        lost = [call for call in weighted if call.name not in kept and call.place not in missed]
        skips += [_lost(flow, call, missed) for call in lost]
        said = {skip.place: skip.reason for skip in skips}
        floating = {skip.place: skip.reason for skip in float_calls(flow, points)}
        kernelless = {place: reason for place, reason in floating.items() if reason.startswith(NO_KERNEL)}
        skips = [Skip(s.place, "; ".join(filter(None, (kernelless.get(s.place), s.reason)))) for s in skips]
        skips += [Skip(place, reason) for place, reason in floating.items() if place not in said]
        edits, lines = self._quantizers(model, flow, points, statistics)
        weights = [place for edit in edits for place in edit.places if isinstance(place, TensorPlace)]
        remarks = self._remarks([str(place) for place in weights if is_quantized(model, place)])
        lines = [*((swap.module, f"x · {swap.arguments['gate']}(x)") for swap in gates), *lines]
        return Plan("Quantize", (*gates, *edits), tuple(skips), (*remarks, *lines))

    def _remarks(self, standing: list[str]) -> list[tuple[str, str]]:
        """What holds for the whole model and its file. ``standing``: the weights that keep the grid they had."""
        schemes = [self.weights, *(scheme for scheme in self.per_layer.values() if scheme is not None)]
        found = []
        if self.activations.bits != 8:
            found.append(("activations", f"{self.activations}: ONNX Runtime's integer kernels take 8 bits alone"))
        if any(scheme.group_size is not None for scheme in schemes):
            found.append(("weights", "layers with scales for groups of weights multiply in float in ONNX Runtime"))
        if standing:
            found.append(("weights", f"{len(standing)} stay on the grid that they had: {_listed(standing)}"))
        return found

    def _weighted(self, model: nn.Module, graph: Graph, flow: Flow) -> tuple[list[Call], list[Skip]]:
        """The convolution and linear calls that may run in integers, and why the others may not."""
        chosen = select(model, self.where)
        found, skips = [], []
        calls = [call for call in graph.calls if call.operator in WEIGHTED]
        self._expect_names({call.module for call in calls if call.module in chosen})
        for call in calls:
            reason = "left out by where" if call.module not in chosen else self._why_float(model, graph, flow, call)
            if reason:
                skips.append(Skip(call.module or "<model>", reason))
            else:
                _expect_float32(call)
                found.append(call)
        return found, skips

    def _why_float(self, model: nn.Module, graph: Graph, flow: Flow, call: Call) -> str:
        """Why a convolution or linear call that is meant cannot run in integers; "" where it can."""
        place = weight_place(model, graph, call)
        if self._scheme(call.module) is None:
            stays = "stays float" if place is None or not is_quantized(model, place) else "its activations stay float"
            return f"{stays}: per_layer says so"
        if call.operator in TRANSPOSED:
            return f"{NO_KERNEL}{call.operator}"
        if place is None:
            return "stays float: its weight is computed, not a parameter"
        if flow.origin(call.args[0]) not in flow.active:
            return "stays float: it reads no activation"
        if is_quantized(model, place):
            self._expect_unnamed(call.module)
            return unfit(model, place, output_axis(call))
        scheme = self._scheme(call.module)
        assert scheme is not None, "None was said above"
        indivisible = scheme.check(str(place), tensor_at(model, place).shape, output_axis(call))
        return f"stays float: {indivisible}" if indivisible else ""

    def _scheme(self, module: str) -> Int | None:
        """The integers of a layer's weight; None where it stays float."""
        return next((scheme for pattern, scheme in self.per_layer.items() if _matches(pattern, module)), self.weights)

    def _expect_unnamed(self, module: str) -> None:
        named = next((pattern for pattern in self.per_layer if _matches(pattern, module)), None)
        if named is not None:
            raise InputError(
                "the layer's weights are quantised already, and keep their grid", where="Quantize.per_layer",
                got=f"{named!r}: {self._scheme(module)}", do=f"Leave {module!r} out of per_layer",
            )  # fmt: skip

    def _expect_names(self, modules: Collection[str]) -> None:
        for pattern in self.per_layer:
            if not any(_matches(pattern, module) for module in modules):
                raise InputError(
                    "the name matches no convolution or linear layer that where means", where="Quantize.per_layer",
                    got=repr(pattern), do=nearest_names(pattern, modules),
                )  # fmt: skip

    def _products(self, model: nn.Module, graph: Graph) -> list[Call]:
        """The products of activations (attention's) that may run in integers."""
        chosen = select(model, self.where)
        calls = [call for call in graph.calls if call.operator in PRODUCTS and call.module in chosen]
        return [call for call in calls if self._scheme(call.module) is not None]

    def _observed(
        self, model: nn.Module, task: Task, flow: Flow, weighted: list[Call], products: list[Call]
    ) -> tuple[Points, Observed, dict[ActivationPlace, str]]:
        """Decide and calibrate, and again without what cannot be intercepted or tells no range, until all can.

        Returns the points, what was seen at each of their places, and why each place that was given up cannot be.
        """
        example = task.demand_example()
        missed: dict[ActivationPlace, str] = {}
        barred: set[str] = set()
        statistics: dict[ActivationPlace, Statistics] = {}
        while True:
            points = decide(flow, weighted, barred, products)
            names = {flow.place(name): name for name in points.values}
            shapes = {place: flow.shape(name) for place, name in names.items()}
            found = unreachable(model, flow.graph, shapes, example)
            if not found:
                new = [place for place in names if place not in statistics]
                statistics |= watch(model, new, task, batches=self.calibration_batches) if new else {}
                found = _constant(flow, points, statistics)
            if not found:
                return points, statistics, missed
            missed |= found
            barred |= {names[place] for place in found}

    def _quantizers(
        self, model: nn.Module, flow: Flow, points: Points, statistics: Observed
    ) -> tuple[list[Quantizer], list[tuple[str, str]]]:
        places = {name: flow.place(name) for name in points.values}
        activations: dict[str, Quantizer] = {}
        for group in points.groups():
            bounds = [upper_bound(flow.calls[name]) for name in group if name in points.absorbed]
            bound = min((bound for bound in bounds if bound is not None), default=None)
            gate = gate_quantizer(flow, group, tuple(places[name] for name in group), self.activations)
            edit = gate or self._activation([statistics[places[name]] for name in group], bound)
            activations |= dict.fromkeys(group, edit)
        weights: dict[TensorPlace, Quantizer] = {}
        sources: dict[TensorPlace, str] = {}
        for call in points.weighted:
            place = weight_place(model, flow.graph, call)
            assert place is not None, "only calls that read a stored weight are chosen"
            source = points.source[call.name]
            if place not in weights:
                edit = self._weight(model, flow.graph, call, place, float(activations[source].scale))
                weights[place] = replace(edit, reads=places[source])
            elif activations[source] is not activations[sources[place]]:
                weights[place] = replace(weights[place], reads=None)  # its bias is added on two grids
            sources.setdefault(place, source)
        edits = [*dict.fromkeys(activations.values()), *weights.values()]
        lines = [(", ".join(map(str, edit.places)), _describe(edit)) for edit in edits]
        samples = [torch.cat([statistics[places[name]].sample for name in group]) for group in points.groups()]
        remarks = [
            outliers(sample, edit, self.activations)
            for sample, edit in zip(samples, dict.fromkeys(activations.values()), strict=True)
        ]
        remarks += [""] * len(weights)
        return edits, [(place, line + remark) for (place, line), remark in zip(lines, remarks, strict=True)]

    def _activation(self, statistics: list[Statistics], bound: float | None) -> Quantizer:
        """``bound``: where an absorbed clamp ends. The integers must not reach beyond it, or ONNX Runtime keeps the
        clamp and computes what is before it in floating point; so that step is not learnt."""
        scheme = self.activations
        scale, zero_point = self.activation_range.calibrated(statistics, scheme)
        if bound is not None:
            scale = scale.clamp_max((1 - 1e-6) * bound / (scheme.quant_max - int(zero_point)))
        places = tuple(each.place for each in statistics)
        return Quantizer(
            places,
            scale[0],
            zero_point[0],
            scheme.quant_min,
            scheme.quant_max,
            axis=None,
            learn=self.learn and bound is None,
        )

    def _weight(self, model: nn.Module, graph: Graph, call: Call, place: TensorPlace, input_scale: float) -> Quantizer:
        scheme, axis = self._scheme(call.module), output_axis(call)
        assert scheme is not None, "layers that stay float were left out"
        value = tensor_at(model, place).detach()
        bias_at = bias_place(graph, call) if has_bias(call) else None
        grouped = scheme.group_size is not None and not is_quantized(model, place)
        # Where no integer kernel takes the layer, its bias is no integer.
        integer = bias_at is not None and not grouped and self.activations.bits <= 8
        bias = tensor_at(model, bias_at).detach() if bias_at is not None and integer else None
        standing = kept(model, place, bias, input_scale)
        if standing is not None:
            return standing
        edit = quantizer(place, value, axis, scheme, self.weight_range)
        scale = widened(edit.scale.flatten(), rows_of(value, axis, scheme), bias, input_scale)
        return replace(edit, scale=scale.reshape(edit.scale.shape), learn=self.learn)


def _matches(pattern: str, module: str) -> bool:
    return any(pattern == name or fnmatchcase(name, pattern) for name in (module, f"{module}.weight"))


def _lost(flow: Flow, call: Call, missed: Mapping[ActivationPlace, str]) -> Skip:
    """Why a call that has an integer kernel stays float: what stands in the way, and where."""
    names = [flow.source(call.args[0]), call.name + INPUT, flow.result(call)[0]]
    found = [(place, missed[place]) for name in names if (place := flow.place(name)) in missed]
    because = "; ".join(f"{place} {reason}" for place, reason in dict(found).items())
    return Skip(str(call.place), f"stays float: {because or 'its activation or its result bears no quantiser'}")


def _constant(flow: Flow, points: Points, statistics: Observed) -> dict[ActivationPlace, str]:
    """place → why it tells no range, where all values of those that share a quantiser are the same."""
    found: dict[ActivationPlace, str] = {}
    for group in points.groups():
        seen = [statistics[flow.place(name)] for name in group]
        low = min(each.low for each in seen)
        if low == max(each.high for each in seen):
            reason = (
                f"is constant over the calibration batches ({low:g} in every one of {seen[0].calls} calls): no range"
            )
            found |= {each.place: reason for each in seen}
    return found


def _expect_float32(call: Call) -> None:
    if call.dtype != torch.float32:
        raise InputError(
            "the model does not compute in float32", where=str(call.place), got=call.dtype, expected=torch.float32,
            do="Quantise model.float(), with loaders and example inputs of float32",
        )  # fmt: skip


def _describe(edit: Quantizer) -> str:
    kind = "uint8" if edit.quant_min == 0 and edit.quant_max == 255 else "int8"
    if (edit.quant_min, edit.quant_max) not in ((0, 255), (-128, 127)):
        kind = f"integers {edit.quant_min} … {edit.quant_max}"
    if edit.axis is not None:
        low, high = float(edit.scale.min()), float(edit.scale.max())
        what = "channel scales" if edit.group_size is None else f"scales for groups of {edit.group_size}"
        return f"{kind}, {edit.scale.numel()} {what} from {low:.3g} to {high:.3g}"
    return f"{kind}, scale {float(edit.scale):.3g}, zero point {int(edit.zero_point)}"


def _expect_folded(model: nn.Module, graph: Graph) -> None:
    pairs, skips = foldable(model, graph)
    late = [skip.place for skip in skips if skip.reason.endswith(QUANTISED)]
    if late:
        raise InputError(
            "batch norms follow convolutions whose weights are quantised: fold batch norm before both",
            where=_listed(late), got=f"{len(late)} batch norms that can no longer be folded",
            do="Put FoldBatchNorm() first, before the weights are quantised",
        )  # fmt: skip
    if pairs:
        names = [norm.module for _, norm in pairs]
        raise InputError(
            "batch norms follow convolutions: fold batch norm first", where=_listed(names),
            got=f"{len(names)} batch norms that can be folded", do="Put FoldBatchNorm() before Quantize()",
        )  # fmt: skip


def _listed(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
