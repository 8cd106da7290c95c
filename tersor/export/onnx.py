"""PyTorch to ONNX: one file as one would ship it, int8 weights as int8, nothing of the exporter's notes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.errors import GraphError, InputError
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.files import write_atomically
from tersor.core.masked import Masked
from tersor.export.half import store_half, widen
from tersor.export.passes import ship

OPSET, WIDE_OPSET = 20, 21  # 21: integers of 16 bits from QuantizeLinear, integers of 4 bits stored
_LARGEST = 2**31 - 1  # protobuf's limit for one message
_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "torch._subclasses", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class OnnxFile:
    """An exported file: where it is, its size in bytes, its operator set, the names of its inputs and outputs."""

    path: Path
    size_bytes: int
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_batch: bool


def export_onnx(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    output_of: Callable[[Any], Tensor] | None = None,
) -> OnnxFile:
    """Write ``model`` (in eval mode, on the CPU; the one given is untouched) to ``path`` as ONNX.

    Weight quantisers become int8 initialisers with a DequantizeLinear, activation quantisers QuantizeLinear /
    DequantizeLinear pairs, masks zeros in the weights; weights stored in half precision stay so, behind a Cast.
    ``example_inputs``: positional tensors, batch first, or the only one. With ``dynamic_batch`` dimension 0 of every
    input is free.
    ``output_of``: what the model returns → the one tensor that the file shall give (``task.output``); without it the
    file gives every tensor that the model returns, flattened.

    Raises GraphError where the exporter fails; InputError for inputs that are no tensors.
    """
    inputs = _example(example_inputs, dynamic_batch)
    target, halves = _exportable(model)
    if output_of is not None:  # a hook's result replaces the forward's, and renames no module as a wrapper would
        target.register_forward_hook(lambda module, args, result: output_of(result))
    proto = _to_proto(target, inputs, dynamic_batch)
    ship(proto, _input_names(model, len(inputs)))
    store_half(proto, halves)
    _check(proto)
    data = proto.SerializeToString(deterministic=True)
    write_atomically(Path(path), data)
    names = tuple(value.name for value in proto.graph.input), tuple(value.name for value in proto.graph.output)
    return OnnxFile(Path(path), len(data), _opset(target), *names, dynamic_batch)


def _example(example_inputs: Tensor | Sequence[Any], dynamic_batch: bool) -> tuple[Tensor, ...]:
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, (tuple, list)):
        raise InputError(
            "no example inputs", where="export_onnx(model, example_inputs, path)", got=type(example_inputs).__name__,
            expected="a tensor, or a tuple of tensors in the order of the forward's arguments",
            do="Of a task: task.complete().example_inputs; of a dict: its values in that order",
        )  # fmt: skip
    for number, value in enumerate(example_inputs):
        if not isinstance(value, Tensor) or (dynamic_batch and value.ndim == 0):
            raise InputError(
                "an example input cannot be exported", where=f"example_inputs[{number}]",
                got=type(value).__name__ if not isinstance(value, Tensor) else "a tensor without a batch dimension",
                expected="tensors, batch first", do="Wrap the model so that it takes tensors only",
            )  # fmt: skip
    inputs = tuple(value.detach().cpu() for value in example_inputs)
    if dynamic_batch and any(value.shape[0] < 2 for value in inputs):
        # torch.export takes a size of one for a constant: show it three.
        inputs = tuple(value.repeat(3, *[1] * (value.ndim - 1)) for value in inputs)
    return inputs


def _exportable(model: nn.Module) -> tuple[nn.Module, set[torch.dtype]]:
    """A copy on the CPU whose masks are zeros in the weights, whose quantisers' steps are constants and whose weights
    in half precision are widened; and the types that these had."""
    target = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    halves = widen(target)
    for module in target.modules():
        if isinstance(module, FakeQuantize):
            module.freeze()
        if parametrize.is_parametrized(module):
            for entries in cast(nn.ModuleDict, module.parametrizations).values():
                _bake_masks(entries)
    return target, halves


def _bake_masks(entries: nn.Module) -> None:
    """Write the zeros of masks into the stored weight, where the quantisers beside them keep zeros at zero."""
    assert isinstance(entries, parametrize.ParametrizationList)
    original = getattr(entries, "original", None)
    if not isinstance(original, Tensor) or not all(_keeps_zeros(entry) for entry in entries):
        return
    for number, entry in enumerate(entries):
        if isinstance(entry, Masked):
            original.masked_fill_(~entry.keep, 0)
            entries[number] = nn.Identity()


def _keeps_zeros(entry: nn.Module) -> bool:
    return isinstance(entry, Masked) or (isinstance(entry, FakeQuantize) and not bool(entry.zero_point.any()))


def _opset(model: nn.Module) -> int:
    """Integers of up to four bits and of more than eight need the newer one."""
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    steps = [quantizer.quant_max - quantizer.quant_min for quantizer in quantizers]
    return WIDE_OPSET if any(count <= 15 or count > 255 for count in steps) else OPSET


def _to_proto(model: nn.Module, inputs: tuple[Tensor, ...], dynamic_batch: bool) -> onnx.ModelProto:
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs) if dynamic_batch else None
    try:
        with quiet_export(), torch.no_grad():
            program = torch.onnx.export(
                model, inputs, dynamo=True, opset_version=_opset(model), dynamic_shapes=shapes, verbose=False
            )
            assert program is not None
            return program.model_proto
    except Exception as error:  # the exporter raises whatever its passes and the user's forward raise
        raise GraphError(
            "the model cannot be exported to ONNX", where=type(model).__name__, got=_first_cause(error),
            do="Usual mend: no literals of the batch size in forward (or dynamic_batch=False), and standard operators",
        ) from error  # fmt: skip


def _input_names(model: nn.Module, count: int) -> list[str]:
    """``input``, or where there are several the names that the forward gives them."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return ["input"] if count == 1 else [*named[:count], *(f"input_{n}" for n in range(len(named), count))]


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Keep the exporters' prints, warnings and log lines to itself; its errors are raised, not printed."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        noise = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check(proto: onnx.ModelProto) -> None:
    if proto.ByteSize() > _LARGEST:
        raise GraphError(
            "the model is too large for one ONNX file", where="export", got=f"{proto.ByteSize()} bytes",
            expected=f"at most {_LARGEST}",
        )  # fmt: skip
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        reason = str(error).splitlines()[0]
        raise GraphError("the exported graph is not valid ONNX", where="export", got=reason) from error
