"""Does ONNX Runtime give what PyTorch gives, and does it really compute in integers?"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from tersor.core.errors import InputError, VerificationError
from tersor.core.eval_mode import eval_mode
from tersor.core.loading import batches_of
from tersor.core.task import Batch, Task
from tersor.core.verify import TOLERANCE, relative_difference
from tersor.export.integers import dequantized
from tersor.export.onnx_graph import Rewriter
from tersor.export.parting import partings, parts_at
from tersor.export.passes import NAMED
from tersor.measure.session import OnnxRunnable
from tersor.tensor.statistics import wilson

AGREEMENT = 0.995  # least top-1 agreement of an int8 file with the model that it was made of
WITHIN_ONE = 0.99  # least share of its outputs that are at most one step from that model's
NEAR = 0.1  # largest relative error (in the 2-norm) of an int8 file
INTEGER = {  # MatMulNBits as it is written here: int8 times the weight's integers
    "QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "MatMulNBits",
}  # fmt: skip
FLOAT = {
    "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul",
}  # fmt: skip

# What only moves numbers, counts them or looks them up.
MOVING = {
    "Cast", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MaxPool", "NhwcMaxPool",
    "Range", "ReorderInput", "ReorderOutput", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
}  # fmt: skip


def verify_onnx(path: Path, model: nn.Module, task: Task, *, quantized: bool, samples: int = 1000) -> dict[str, Any]:
    """Compare the file with ``model`` (eager, eval mode) on the example inputs and ``samples`` of the validation data.

    fp32: the largest relative difference (max |a − b| / max |b| over a batch) may be 1e-4. int8, ``model`` being the
    fake-quantised one: the relative error ‖a − b‖ / ‖b‖ may be 0.1, and top-1 agreement must be 0.995, or its Wilson
    interval reach there. ``equal`` says whether it is 0.995 as measured, and 99 % of the outputs are at most one step
    (LSB) of the output's quantiser apart; where not, ``parts_at`` names the layer where the integers of the two part.

    Returns plain JSON facts; raises VerificationError where the file differs, or where there is nothing to compare.
    """
    path = Path(path)
    session = OnnxRunnable(path)
    with torch.no_grad(), eval_mode(model):
        pairs = [_as_tensors(session, model, task, args) for args in _samples(path, task, samples)]
    if not quantized:
        return _judge_float(path, pairs)
    facts = _compare_quantized(path, pairs, _is_classification(task))
    if not facts["equal"]:
        facts |= _parting(path, model, task)
    _expect_near(path, facts)
    operators = operator_histogram(path)
    more = {"operators": operators, "float_operators": float_operators(operators), "integer_share": integer_share(path)}
    return facts | more


def _as_tensors(session: OnnxRunnable, model: nn.Module, task: Task, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    got = session.output(task, *args)
    expected = task.output(model(*(value.to(device) for value in args)))
    return got, expected.detach().cpu()


def _samples(path: Path, task: Task, samples: int) -> Iterator[tuple[Tensor, ...]]:
    """The example inputs, then validation batches, at most ``samples``, cut to the batch size that the file takes."""
    fixed = _fixed_batch(path)
    if task.example_inputs is not None:
        yield from _pieces(tuple(task.example_inputs), fixed)
    count = 0
    for batch in batches_of(_validation(task), "task.validation"):
        args, kwargs = task.inputs(batch)
        if kwargs:
            raise InputError("an ONNX file takes positional inputs", where="task.validation", got=sorted(kwargs))
        args = tuple(value[: samples - count] for value in args)
        yield from _pieces(args, fixed)
        count += len(args[0])
        if count >= samples:
            return


def _pieces(args: tuple[Tensor, ...], fixed: int | None) -> Iterator[tuple[Tensor, ...]]:
    if fixed is None:
        yield args
        return
    for start in range(0, len(args[0]) - fixed + 1, fixed):
        yield tuple(value[start : start + fixed] for value in args)


def _fixed_batch(path: Path) -> int | None:
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    return dims[0].dim_value if dims and dims[0].HasField("dim_value") else None


def _validation(task: Task) -> Iterable[Batch]:
    return () if task.validation is None else task.validation  # a loader without a length has no truth value


def _is_classification(task: Task) -> bool:
    for batch in batches_of(_validation(task), "task.validation"):
        return not task.targets(batch).is_floating_point()
    return False


def _judge_float(path: Path, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    differences = [relative_difference(got.double(), expected.double()) for got, expected in pairs]
    worst = max(differences, default=float("inf"))
    if not worst <= TOLERANCE:
        raise _differs(path, f"relative difference {worst:.3g}", f"at most {TOLERANCE:g}")
    return {"relative_difference": worst, "tolerance": TOLERANCE, "n": sum(len(got) for got, _ in pairs)}


def _compare_quantized(path: Path, pairs: list[tuple[Tensor, Tensor]], classification: bool) -> dict[str, Any]:
    if not pairs or any(got.shape != expected.shape for got, expected in pairs):
        shapes = [(list(got.shape), list(expected.shape)) for got, expected in pairs[:1]]
        raise _differs(path, f"outputs of shapes {shapes}", "the same shapes from both, for at least one sample")
    got = torch.cat([a.flatten(1) if a.ndim > 1 else a for a, _ in pairs]).double()
    expected = torch.cat([b.flatten(1) if b.ndim > 1 else b for _, b in pairs]).double()
    error = float((got - expected).norm() / expected.norm().clamp_min(1e-30))
    step = output_step(path)
    facts: dict[str, Any] = {"n": len(got), "relative_error": error, "output_step": step, "equal": error <= NEAR}
    if step is not None:
        facts["within_one_step"] = float(((got - expected).abs() <= 1.01 * step).double().mean())
        facts["equal"] &= facts["within_one_step"] >= WITHIN_ONE
    if classification:
        top = [(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs]
        same, n = int(sum(int(t.sum()) for t in top)), sum(len(t) for t in top)
        low, high = wilson(same, n)
        facts |= {"top1_agreement": same / n, "low": low, "high": high, "n": n}
        facts["equal"] &= same / n >= AGREEMENT
    return facts


def _parting(path: Path, model: nn.Module, task: Task) -> dict[str, Any]:
    """Where the integers of the two part, on one batch; nothing where no place bears a name in the file."""
    args = max(_samples(path, task, 32), key=lambda values: len(values[0]))
    found = parts_at(partings(path, model, args), WITHIN_ONE)
    return {} if found is None else {"parts_at": found.place, "within_one_there": found.within_one}


def _expect_near(path: Path, facts: dict[str, Any]) -> None:
    there = f"; the two part at {facts['parts_at']}" if "parts_at" in facts else ""
    if not facts["relative_error"] <= NEAR:
        raise _differs(path, f"relative error {facts['relative_error']:.3g}{there}", f"at most {NEAR}")
    if facts.get("high", 1.0) < AGREEMENT:
        got = f"top-1 agreement {facts['top1_agreement']:.4f} [{facts['low']:.4f}, {facts['high']:.4f}]"
        raise _differs(path, f"{got} on {facts['n']} samples{there}", f"at least {AGREEMENT}")


def _differs(path: Path, got: str, expected: str) -> VerificationError:
    return VerificationError(
        "the ONNX file does not compute what the PyTorch model computes", where=str(path), got=got, expected=expected,
        do="The file must not be shipped: please report the architecture",
    )  # fmt: skip


def output_step(path: Path) -> float | None:
    """The scale of the first output's quantiser; None where the output is not quantised."""
    graph = Rewriter(onnx.load(path).graph)
    last = dequantized(graph, graph.graph.output[0].name)
    return None if last is None else float(numpy_helper.to_array(graph.constants[last.input[1]]))


def optimized_nodes(path: Path) -> list[tuple[str, str]]:
    """(operator, node name) of every node of the graph that ONNX Runtime really runs, after its own optimisations."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        OnnxRunnable(Path(path), optimised_model_path=optimized)
        return [(node.op_type, node.name) for node in onnx.load(optimized).graph.node]


def operator_histogram(path: Path) -> dict[str, int]:
    """How often each operator stands in the graph that ONNX Runtime really runs, most frequent first."""
    return dict(Counter(operator for operator, _ in optimized_nodes(path)).most_common())


def float_operators(operators: Mapping[str, int]) -> dict[str, int]:
    """Of such a histogram what computes in float, conversions from and to integers among it."""
    integer = INTEGER | MOVING
    return {name: n for name, n in operators.items() if name not in integer and not name.startswith("QLinear")}


def integer_share(path: Path) -> dict[str, Any]:
    """How many convolutions and matrix products run in integers: ``integer``, ``total``, ``share``, and the names of
    those that stayed in float, ``float_layers`` (module paths, in files that ``export_onnx`` wrote)."""
    nodes = optimized_nodes(path)
    integer = [name for operator, name in nodes if operator in INTEGER]
    floating = [name for operator, name in nodes if operator in FLOAT]
    # ONNX Runtime renames what it fuses ("fc_token_3", "w_nchwc"): a layer of the file that is not among the integer
    # ones stayed in float.
    in_integers = {re.sub(r"_token_\d+$", "", name) for name in integer}
    named = [node.name for node in onnx.load(path).graph.node if node.op_type in NAMED and node.name]
    layers = [name for name in named if name not in in_integers] if floating else []
    total = len(integer) + len(floating)
    share = len(integer) / total if total else 1.0
    return {"integer": len(integer), "total": total, "share": share, "float_layers": layers}
