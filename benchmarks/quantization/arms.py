"""What is compared: ways to integers for the same network, each from the same data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.quantization import peers
from tersor.core.step import Context, Pipeline, Step
from tersor.core.task import Task
from tersor.distill.response import Distill
from tersor.export.onnx import export_onnx
from tersor.measure.session import OnnxRunnable
from tersor.quantize.adaround import AdaRound
from tersor.quantize.awq import ScaleByActivations
from tersor.quantize.correct_bias import CorrectBias
from tersor.quantize.equalize import Equalize
from tersor.quantize.fold import FoldBatchNorm
from tersor.quantize.gptq import GPTQ
from tersor.quantize.quantize import Quantize
from tersor.quantize.ranges import MeanSquaredError
from tersor.quantize.schemes import Int
from tersor.quantize.weight_only import QuantizeWeights
from tersor.train.finetune import Finetune

FP32, TRAINED = "fp32", "fp32, trained on"
PTQ, REPAIRED, QAT, QAT4 = "PTQ int8", "PTQ int8, repaired", "QAT int8", "QAT W4A8"
ORT, INC = "int8, onnxruntime's quantize_static", "int8, neural-compressor static"
RTN4, GPTQ4 = "weights 4 bits, nearest", "weights 4 bits, GPTQ"
GROUP = 32
W4 = {"weights": Int(4), "weight_range": MeanSquaredError()}

Runnable = Callable[..., Any]


@dataclass(frozen=True)
class Arm:
    """``make``: the task, the context and a path for its file → what is evaluated. ``said``: its settings, printed."""

    name: str
    said: str
    make: Callable[[Task, Context, Path], Runnable]


def convolutional(training: Finetune) -> list[Arm]:
    """Every arm for a convolutional network."""
    taught = replace(training, objective=Distill(temperature=4, alpha=0.7))
    fold = FoldBatchNorm()
    grouped = Int(4)
    steps: Mapping[str, Step] = {
        TRAINED: taught,
        "PTQ W4A8": Pipeline((fold, Quantize(**W4, learn=False))),
        "PTQ W4A8, AdaRound": Pipeline((fold, Quantize(**W4, learn=False), AdaRound())),
        RTN4: Pipeline((fold, QuantizeWeights(grouped, MeanSquaredError()))),
        GPTQ4: Pipeline((fold, GPTQ(grouped))),
    }
    shipped: Mapping[str, Step] = {
        PTQ: Pipeline((fold, Quantize(learn=False))),
        REPAIRED: Pipeline((fold, Equalize(), Quantize(learn=False), CorrectBias())),
        QAT: Pipeline((fold, Quantize(), taught)),
        QAT4: Pipeline((fold, Quantize(**W4), taught)),
    }
    return [
        Arm(FP32, "", _original),
        *(Arm(name, str(step), _in_pytorch(step)) for name, step in steps.items()),
        *(Arm(name, str(step), _in_onnxruntime(step)) for name, step in shipped.items()),
        Arm(ORT, "MinMax, per channel", _onnxruntime),
        Arm(INC, "default", _neural_compressor),
    ]


def transformer() -> list[Arm]:
    """Every arm for a transformer: weights alone, groups of inputs."""
    found = [Arm(FP32, "", _original)]
    for bits in (4, 3):
        scheme = Int(bits, group_size=GROUP)
        nearest = QuantizeWeights(scheme, MeanSquaredError())
        for name, step in {
            f"weights {bits} bits, nearest": nearest,
            f"weights {bits} bits, scaled by activations": Pipeline((ScaleByActivations(scheme), nearest)),
            f"weights {bits} bits, GPTQ": Pipeline((GPTQ(scheme), nearest)),
        }.items():
            found.append(Arm(name, str(step), _in_pytorch(step)))
        found += [_torchao(bits), _neural_compressor_weights(bits)]
    return found


def _original(task: Task, context: Context, path: Path) -> Runnable:
    return copy.deepcopy(task.model).eval()


def _in_pytorch(step: Step) -> Callable[[Task, Context, Path], Runnable]:
    return lambda task, context, path: step.run(task.model, task, context).model


def _in_onnxruntime(step: Step) -> Callable[[Task, Context, Path], Runnable]:
    """Evaluated as it ships: by ONNX Runtime, in integers."""

    def make(task: Task, context: Context, path: Path) -> Runnable:
        export_onnx(step.run(task.model, task, context).model, _example(task), path)
        return OnnxRunnable(path)

    return make


def _onnxruntime(task: Task, context: Context, path: Path) -> Runnable:
    original = path.with_suffix(".fp32.onnx")
    export_onnx(task.model, _example(task), original)
    return OnnxRunnable(peers.onnxruntime_static(original, path, _data(task)))


def _neural_compressor(task: Task, context: Context, path: Path) -> Runnable:
    exported = peers.neural_compressor_static(task.model, _example(task), _data(task))
    return lambda *inputs: exported(*inputs)  # an exported module refuses eval(), and is in it already


def _torchao(bits: int) -> Arm:
    make = lambda task, context, path: peers.torchao_weights(task.model, bits, GROUP)  # noqa: E731
    return Arm(f"weights {bits} bits, torchao", f"linear layers, groups of {GROUP}", make)


def _neural_compressor_weights(bits: int) -> Arm:
    make = lambda task, context, path: peers.neural_compressor_weights(task.model, bits, GROUP)  # noqa: E731
    return Arm(f"weights {bits} bits, neural-compressor", f"linear layers, groups of {GROUP}", make)


def _example(task: Task) -> tuple[Any, ...]:
    assert task.example_inputs is not None, "a completed task has example inputs"
    return task.example_inputs


def _data(task: Task) -> list[tuple[Any, ...]]:
    return peers.calibration_inputs(task, Quantize().calibration_batches)
