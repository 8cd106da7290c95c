"""What a reader should know that the verdict does not say: where work was saved and time was not, and the like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from tersor.core.measurement import Measurement
from tersor.core.record import Record
from tersor.report.format import both_of, human, interval_of, scale_of, value_of
from tersor.report.schema import StepSummary, Summary

BATCHES = (1, 32)
MOST_NAMED = 8
# Operators that multiply in float; those in integers bear other names (QLinearConv, QGemm, MatMulInteger …).
_FLOAT_PRODUCTS = {
    "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul",
    "LSTM", "GRU", "RNN",
}  # fmt: skip
_WEIGHTS_ALONE = "MatMulNBits"  # integer weights; the graph has no integers between layers
_CONVERSIONS = {"QuantizeLinear", "DequantizeLinear"}


def findings(summary: Summary, records: Sequence[Record] = ()) -> tuple[str, ...]:
    """Warnings and remarks, each one sentence, the weightiest first."""
    parts = (
        _unfinished(summary), _slower(summary), _macs_and_clock(summary), _integers(summary), _equality(summary),
        _zeros(summary), _close_budgets(summary), _reviewed(summary), _nothing_done(records),
    )  # fmt: skip
    return tuple(line for part in parts for line in part)


def _unfinished(summary: Summary) -> Iterator[str]:
    done, asked = len(summary.steps), len(summary.recipe.steps)
    if done < asked:
        yield f"{done} of the recipe's {asked} steps have finished; the numbers below are those of the finished ones."
    final, last = summary.final, summary.steps[-1] if summary.steps else None
    if final is not None and last is not None and final.number != last.number:
        yield f"What is shipped is the model after “{final.name}”, not after the last step, “{last.name}”."


def _speedup(summary: Summary, batch: int) -> Measurement | None:
    found = summary.ratio_intervals.get(f"latency_batch_{batch}")
    if found is None and summary.final is not None:
        found = summary.final.measurements.get(f"speedup_batch_{batch}")
    if found is None and f"latency_batch_{batch}" in summary.ratios:
        found = Measurement(summary.ratios[f"latency_batch_{batch}"], "×")
    return found


def _low(measurement: Measurement) -> float:
    return measurement.value if measurement.low is None else measurement.low


def _high(measurement: Measurement) -> float:
    return measurement.value if measurement.high is None else measurement.high


def _slower(summary: Summary) -> Iterator[str]:
    for batch in BATCHES:
        speed = _speedup(summary, batch)
        if speed is not None and _high(speed) < 1:
            yield f"Slower than the original at batch {batch}: {both_of(speed)} its speed."


def _macs_and_clock(summary: Summary) -> Iterator[str]:
    macs = summary.ratios.get("macs", 1.0)
    if macs < 1.3:
        return
    fell = scale_of(macs, "×").full(macs)
    for batch in BATCHES:
        speed = _speedup(summary, batch)
        if speed is None or _high(speed) < 1:
            continue
        if _low(speed) <= 1:
            yield f"MACs fell {fell} and the clock did not at batch {batch}: {both_of(speed)} the original's speed."
        elif speed.value < 0.5 * macs:
            yield f"MACs fell {fell}, the time at batch {batch} only {both_of(speed)}."


def _integers(summary: Summary) -> Iterator[str]:
    for number, (before, after) in enumerate(pairwise(summary.stages)):
        if _runs_integers(before) or not _runs_integers(after):
            continue
        slow = [text for batch in BATCHES if (text := _no_gain(before if number else None, after, batch))]
        floating = _floating(after)
        everything = ", although every convolution and matrix product runs in integers"
        stayed = f"; stayed float: {floating}" if floating else everything
        if slow:
            others = _float_operators(after)
            between = f"; between integers these compute in float: {others}" if others else ""
            yield f"int8 is not faster here ({'; '.join(slow)}){stayed}{between}."
        elif floating:
            yield f"int8 does not cover the whole model{stayed}."


def _float_operators(stage: StepSummary) -> str:
    """What computes in float and is no product, with its count, the most frequent first.

    One conversion each way is that of the model's own input and output.
    """
    found = {
        name: n
        for name, n in _onnx(stage, "float_operators").items()
        if name not in _FLOAT_PRODUCTS and not (name in _CONVERSIONS and n == 1)
    }
    named = [f"{name} ×{n}" for name, n in list(found.items())[:MOST_NAMED]]
    return ", ".join(named) + (f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else "")


def _equality(summary: Summary) -> Iterator[str]:
    for stage in summary.stages:
        onnx = stage.facts.get("onnx")
        if not isinstance(onnx, Mapping) or onnx.get("equal") is not False:
            continue
        place = f"; the integers part at {onnx['parts_at']}" if onnx.get("parts_at") else ""
        mend = " After training, RoundBiases() puts biases back on the file's steps." if place else ""
        yield f"The int8 file of “{stage.name}” and PyTorch differ: {_differences(onnx)}{place}.{mend}"


def _differences(onnx: Mapping[str, object]) -> str:
    """How near the file comes to the model that it was made of, by whatever was measured."""
    within, top1, error = (onnx.get(name) for name in ("within_one_step", "top1_agreement", "relative_error"))
    said = [f"{100 * within:.1f} % of its outputs are at most one step apart"] if isinstance(within, float) else []
    said += (
        [f"it answers as PyTorch for {100 * top1:.1f} % of {onnx.get('n')} samples"] if isinstance(top1, float) else []
    )
    said += [f"its relative error is {error:.2g}"] if isinstance(error, float) else []
    return ", ".join(said) or "nothing says how much"


def _onnx(stage: StepSummary, name: str) -> Mapping[str, object]:
    onnx = stage.facts.get("onnx")
    found = onnx.get(name) if isinstance(onnx, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _runs_integers(stage: StepSummary) -> bool:
    """Whether the step's ONNX graph computes any product in integers, but for those of weights alone."""
    integer, of_weights = _onnx(stage, "integer_share").get("integer"), _onnx(stage, "operators").get(_WEIGHTS_ALONE)
    return isinstance(integer, int) and integer > (of_weights if isinstance(of_weights, int) else 0)


def _floating(stage: StepSummary) -> str:
    """The layers that stayed float where they are named, else the operators with their counts."""
    layers = _onnx(stage, "integer_share").get("float_layers")
    if isinstance(layers, (list, tuple)) and layers:
        more = f" and {len(layers) - MOST_NAMED} more" if len(layers) > MOST_NAMED else ""
        return ", ".join(map(str, layers[:MOST_NAMED])) + more
    operators = _onnx(stage, "operators")
    return ", ".join(f"{name} ×{n}" for name, n in sorted(operators.items()) if name in _FLOAT_PRODUCTS and n)


def _no_gain(before: StepSummary | None, after: StepSummary, batch: int) -> str:
    """What says that a step did not shorten the latency; empty where it did, or where it was not measured.

    ``before``: None for the original, whose speed is 1 by definition; timed against itself it differs by noise.

    Speed-ups are compared, each timed in turns with the original: milliseconds of two sittings are not comparable.
    """
    name = f"speedup_batch_{batch}"
    old, new = None if before is None else before.measurements.get(name), after.measurements.get(name)
    if new is None or new.value > 1.02 * (1.0 if old is None else old.value):
        return ""
    if old is None:
        return f"batch {batch}: {value_of(new)} the original's speed"
    return f"batch {batch}: {value_of(old)} the original's speed before, {value_of(new)} after"


def _zeros(summary: Summary) -> Iterator[str]:
    if summary.final is None:
        return
    nonzeros, weights = (summary.final.measurements.get(name) for name in ("nonzeros", "parameters"))
    if nonzeros is None or weights is None or not weights.value:
        return
    zeros = 1 - nonzeros.value / weights.value
    if zeros >= 0.2:
        yield (
            f"{100 * zeros:.0f} % of the weights are zero. ONNX Runtime stores and multiplies zeros like other "
            "numbers: they save neither bytes nor time there."
        )


def _close_budgets(summary: Summary) -> Iterator[str]:
    for budget in summary.verdict.budgets:
        if budget.value is None or budget.low is None or budget.high is None:
            continue
        name = human(budget.name)
        interval = interval_of(budget.measured)
        limit = scale_of(budget.limit, budget.unit).full(budget.limit)
        if budget.met and budget.high > budget.limit:
            yield f"The budget “{name}” is kept, but its interval {interval} reaches beyond the limit of {limit}."
        elif budget.met is False and budget.low <= budget.limit:
            yield (
                f"The budget “{name}” is missed, but its interval {interval} holds the limit of {limit}: "
                "more test samples would tell."
            )


def _reviewed(summary: Summary) -> Iterator[str]:
    """What trainings say of themselves."""
    for stage in summary.steps:
        review = stage.facts.get("review")
        warnings = review.get("warnings") if isinstance(review, Mapping) else None
        for warning in warnings if isinstance(warnings, (list, tuple)) else ():
            yield f"“{stage.name}”: {warning}"


def _nothing_done(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        idle = [str(plan.get("method", "a method")) for plan in record.plans if not plan.get("edits")]
        if idle and len(idle) == len(record.plans):
            yield f"Step {record.number}, “{record.name}”, found nothing to do ({', '.join(idle)})."
