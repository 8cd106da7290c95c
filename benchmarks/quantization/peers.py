"""What others make of the same network and the same calibration batches."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from tersor.core.task import Task


def calibration_inputs(task: Task, batches: int) -> list[tuple[Tensor, ...]]:
    """What the model is given in the first ``batches`` calibration batches."""
    assert task.calibration is not None, "a completed task has calibration data"
    found = []
    for batch in islice(task.calibration, batches):
        args, kwargs = task.inputs(batch, task.model)
        assert not kwargs, "the benchmark's models take positional inputs"
        found.append(tuple(args))
    return found


def onnxruntime_static(file: Path, to: Path, data: Iterable[tuple[Tensor, ...]]) -> Path:
    """onnxruntime's own static quantisation of an fp32 file, as its documentation recommends it for CPUs with VNNI:
    pre-processed, QDQ, unsigned activations, signed weights with a scale per channel, ranges by MinMax."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest: Iterator[tuple[Tensor, ...]] = iter(list(data))

        def get_next(self) -> dict[str, Any] | None:
            found = next(self.rest, None)
            return None if found is None else {n: x.numpy() for n, x in zip(names, found, strict=True)}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(str(file), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready), str(to), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    return to


def onnxruntime_dynamic(file: Path, to: Path) -> Path:
    """onnxruntime's own dynamic quantisation of an fp32 file with a scale per channel: linear layers and embeddings."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, _quiet():
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(str(file), str(ready), skip_symbolic_shape=True)
        quantize_dynamic(str(ready), str(to), per_channel=True, weight_type=QuantType.QInt8,
                         op_types_to_quantize=["Gather", "MatMul", "Gemm"])  # fmt: skip
    return to


def torchao_weights(model: nn.Module, bits: int, group_size: int | None) -> nn.Module:
    """torchao's weight-only quantisation of linear layers: groups of inputs, or a scale per output where None."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    dtype = {8: torch.int8, 4: torch.int4, 3: torch.int3}[bits]
    copied = copy.deepcopy(model).eval()
    with _quiet():
        quantize_(copied, IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity))
    return copied


def neural_compressor_static(
    model: nn.Module, example: tuple[Tensor, ...], data: list[tuple[Tensor, ...]]
) -> nn.Module:
    """neural-compressor's static int8 (its PyTorch path: X86 quantiser of PyTorch 2's export), run eagerly."""
    with _quiet():
        from neural_compressor.torch.export import export
        from neural_compressor.torch.quantization import convert, get_default_static_config, prepare

        exported = export(
            copy.deepcopy(model).eval(), example_inputs=example, dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        prepared = prepare(exported, get_default_static_config())
        with torch.no_grad():
            for inputs in data:
                prepared(*inputs)
        return convert(prepared)


def neural_compressor_weights(model: nn.Module, bits: int, group_size: int) -> nn.Module:
    """neural-compressor's weight-only round to nearest, symmetric, groups of inputs."""
    with _quiet():
        from neural_compressor.torch.quantization import RTNConfig, convert, prepare

        config = RTNConfig(dtype="int", bits=bits, group_size=group_size, use_sym=True)
        return convert(prepare(copy.deepcopy(model).eval(), config))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep their log lines to themselves; errors are raised."""
    noise = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
