"""Tersor makes a trained PyTorch model smaller and faster, and proves that it still behaves.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Task": "tersor.core.task",
    "Metric": "tersor.core.task",
    "Plan": "tersor.core.plan",
    "Context": "tersor.core.step",
    "Pipeline": "tersor.core.step",
    "apply": "tersor.core.apply",
    "ByName": "tersor.core.place",
    "ByType": "tersor.core.place",
    "Everything": "tersor.core.place",
    "TersorError": "tersor.core.errors",
    "PruneChannels": "tersor.prune.structured.channels",
    "Keep": "tersor.prune.structured.amount",
    "prune_iteratively": "tersor.prune.structured.iterative",
    "PruneBlocks": "tersor.prune.blocks.remove",
    "PruneBehindAdapter": "tersor.prune.blocks.adapter",
    "PruneAndReconstruct": "tersor.prune.layerwise.reconstruct",
    "GroupSparsity": "tersor.prune.structured.group_sparsity",
    "Prune": "tersor.prune.sparse.prune",
    "SparseGPT": "tersor.prune.layerwise.sparsegpt",
    "CorrectVariance": "tersor.prune.layerwise.correct_variance",
    "Unmask": "tersor.prune.sparse.unmask",
    "Element": "tersor.prune.sparse.patterns",
    "NM": "tersor.prune.sparse.patterns",
    "Block": "tersor.prune.sparse.patterns",
    "Rows": "tersor.prune.sparse.patterns",
    "PerLayer": "tersor.prune.sparse.scopes",
    "Global": "tersor.prune.sparse.scopes",
    "ErdosRenyi": "tersor.prune.sparse.scopes",
    "PerType": "tersor.prune.sparse.scopes",
    "GradualSparsity": "tersor.prune.sparse.gradual",
    "DropAndGrow": "tersor.prune.sparse.drop_and_grow",
    "LearnMasks": "tersor.prune.sparse.learnt_mask",
    "LotteryTicket": "tersor.prune.sparse.lottery",
    "prune_gradually": "tersor.prune.sparse.gradual",
    "prune_by_movement": "tersor.prune.sparse.gradual",
    "prune_in_rounds": "tersor.prune.sparse.rounds",
    "rewind_learning_rate": "tersor.prune.sparse.rounds",
    "dense_sparse_dense": "tersor.prune.sparse.unmask",
    "train_sparse": "tersor.prune.sparse.drop_and_grow",
    "FoldBatchNorm": "tersor.quantize.fold",
    "Quantize": "tersor.quantize.quantize",
    "ReplaceReLU6": "tersor.quantize.relu6",
    "Equalize": "tersor.quantize.equalize",
    "CorrectBias": "tersor.quantize.correct_bias",
    "AdaRound": "tersor.quantize.adaround",
    "Cast": "tersor.quantize.cast",
    "MinMax": "tersor.quantize.ranges",
    "MovingAverage": "tersor.quantize.ranges",
    "Percentile": "tersor.quantize.ranges",
    "MeanSquaredError": "tersor.quantize.ranges",
    "Entropy": "tersor.quantize.ranges",
    "MixedPrecision": "tersor.recipes.mixed_precision",
    "FreezeScales": "tersor.quantize.freeze",
    "FreezeOscillation": "tersor.quantize.oscillation",
    "ScaleSpread": "tersor.quantize.spread",
    "Together": "tersor.train.together",
    "Int": "tersor.quantize.schemes",
    "RoundBiases": "tersor.quantize.round_biases",
    "QuantizeDynamically": "tersor.quantize.dynamic",
    "QuantizeWeights": "tersor.quantize.weight_only",
    "GPTQ": "tersor.quantize.gptq",
    "ScaleByActivations": "tersor.quantize.awq",
    "Finetune": "tersor.train.finetune",
    "Average": "tersor.train.average",
    "Every": "tersor.core.step",
    "TaskLoss": "tersor.train.objective",
    "Adaptive": "tersor.train.adaptive",
    "Conflict": "tersor.train.conflict",
    "GradientNorms": "tersor.train.adaptive",
    "ValidationLoss": "tersor.train.adaptive",
    "Distill": "tersor.distill.response",
    "Teach": "tersor.distill.teach",
    "Teacher": "tersor.distill.teachers",
    "Teachers": "tersor.distill.teachers",
    "TeacherCache": "tersor.distill.cache",
    "Ahead": "tersor.distill.ahead",
    "drop_layers": "tersor.distill.students",
    "scaled": "tersor.distill.scaling",
    "scaled_config": "tersor.distill.scaling",
    "capacity": "tersor.measure.capacity",
    "replayed": "tersor.train.replay",
    "SoftTargets": "tersor.distill.response",
    "DecoupledSoftTargets": "tersor.distill.response",
    "MatchLogits": "tersor.distill.response",
    "Hints": "tersor.distill.features",
    "AttentionTransfer": "tersor.distill.features",
    "AttentionMaps": "tersor.distill.attention",
    "RelativeDistances": "tersor.distill.relations",
    "RelativeAngles": "tersor.distill.relations",
    "SimilarityPreserving": "tersor.distill.relations",
    "CorrelationCongruence": "tersor.distill.relations",
    "Correlation": "tersor.distill.relations",
    "Budgets": "tersor.run.budgets",
    "compress": "tersor.jobs.compress",
    "resume": "tersor.jobs.compress",
    "distill_student": "tersor.jobs.distill",
    "Student": "tersor.jobs.student",
    "dry_run": "tersor.jobs.dry_run",
    "inspect": "tersor.jobs.inspect",
    "inspect_file": "tersor.jobs.prune_file",
    "prune_file": "tersor.jobs.prune_file",
    "quantize_file": "tersor.jobs.quantize_file",
    "dequantize_file": "tersor.jobs.quantize_file",
    "load_weights": "tersor.jobs.quantize_file",
    "load_check": "tersor.jobs.load_check",
    "sensitivity": "tersor.jobs.sensitivity",
    "Probe": "tersor.measure.sensitivity",
    "bit_sensitivity": "tersor.jobs.bit_sensitivity",
    "BitProbe": "tersor.measure.bit_sensitivity",
    "evaluate": "tersor.jobs.evaluate",
    "benchmark": "tersor.jobs.benchmark",
    "layouts": "tersor.jobs.layouts",
    "Conditions": "tersor.measure.benchmark",
    "Engines": "tersor.jobs.contenders",
    "fits": "tersor.jobs.fits",
    "advise": "tersor.jobs.advise",
    "read_profile": "tersor.hardware.profile",
    "EvaluationData": "tersor.measure.behaviour.data",
    "Pixels": "tersor.measure.behaviour.data",
    "Limits": "tersor.measure.behaviour.gate",
    "Stress": "tersor.measure.behaviour.robustness",
    "load": "tersor.export.artifact:load_artifact",
    "save": "tersor.export.artifact:save_artifact",
    "save_pretrained": "tersor.export.pretrained",
    "export_onnx": "tersor.export.onnx",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from tersor.core.apply import apply
    from tersor.core.errors import TersorError
    from tersor.core.place import ByName, ByType, Everything
    from tersor.core.plan import Plan
    from tersor.core.step import Context, Every, Pipeline
    from tersor.core.task import Metric, Task
    from tersor.distill.ahead import Ahead
    from tersor.distill.attention import AttentionMaps
    from tersor.distill.cache import TeacherCache
    from tersor.distill.features import AttentionTransfer, Hints
    from tersor.distill.relations import (
        Correlation,
        CorrelationCongruence,
        RelativeAngles,
        RelativeDistances,
        SimilarityPreserving,
    )
    from tersor.distill.response import DecoupledSoftTargets, Distill, MatchLogits, SoftTargets
    from tersor.distill.scaling import scaled, scaled_config
    from tersor.distill.students import drop_layers
    from tersor.distill.teach import Teach
    from tersor.distill.teachers import Teacher, Teachers
    from tersor.export.artifact import load_artifact as load
    from tersor.export.artifact import save_artifact as save
    from tersor.export.onnx import export_onnx
    from tersor.export.pretrained import save_pretrained
    from tersor.hardware.profile import read_profile
    from tersor.jobs.advise import advise
    from tersor.jobs.benchmark import benchmark
    from tersor.jobs.bit_sensitivity import bit_sensitivity
    from tersor.jobs.compress import compress, resume
    from tersor.jobs.contenders import Engines
    from tersor.jobs.distill import distill_student
    from tersor.jobs.dry_run import dry_run
    from tersor.jobs.evaluate import evaluate
    from tersor.jobs.fits import fits
    from tersor.jobs.inspect import inspect
    from tersor.jobs.layouts import layouts
    from tersor.jobs.load_check import load_check
    from tersor.jobs.prune_file import inspect_file, prune_file
    from tersor.jobs.quantize_file import dequantize_file, load_weights, quantize_file
    from tersor.jobs.sensitivity import sensitivity
    from tersor.jobs.student import Student
    from tersor.measure.behaviour.data import EvaluationData, Pixels
    from tersor.measure.behaviour.gate import Limits
    from tersor.measure.behaviour.robustness import Stress
    from tersor.measure.benchmark import Conditions
    from tersor.measure.bit_sensitivity import BitProbe
    from tersor.measure.capacity import capacity
    from tersor.measure.sensitivity import Probe
    from tersor.prune.blocks.adapter import PruneBehindAdapter
    from tersor.prune.blocks.remove import PruneBlocks
    from tersor.prune.layerwise.correct_variance import CorrectVariance
    from tersor.prune.layerwise.reconstruct import PruneAndReconstruct
    from tersor.prune.layerwise.sparsegpt import SparseGPT
    from tersor.prune.sparse.drop_and_grow import DropAndGrow, train_sparse
    from tersor.prune.sparse.gradual import GradualSparsity, prune_by_movement, prune_gradually
    from tersor.prune.sparse.learnt_mask import LearnMasks
    from tersor.prune.sparse.lottery import LotteryTicket
    from tersor.prune.sparse.patterns import NM, Block, Element, Rows
    from tersor.prune.sparse.prune import Prune
    from tersor.prune.sparse.rounds import prune_in_rounds, rewind_learning_rate
    from tersor.prune.sparse.scopes import ErdosRenyi, Global, PerLayer, PerType
    from tersor.prune.sparse.unmask import Unmask, dense_sparse_dense
    from tersor.prune.structured.amount import Keep
    from tersor.prune.structured.channels import PruneChannels
    from tersor.prune.structured.group_sparsity import GroupSparsity
    from tersor.prune.structured.iterative import prune_iteratively
    from tersor.quantize.adaround import AdaRound
    from tersor.quantize.awq import ScaleByActivations
    from tersor.quantize.cast import Cast
    from tersor.quantize.correct_bias import CorrectBias
    from tersor.quantize.dynamic import QuantizeDynamically
    from tersor.quantize.equalize import Equalize
    from tersor.quantize.fold import FoldBatchNorm
    from tersor.quantize.freeze import FreezeScales
    from tersor.quantize.gptq import GPTQ
    from tersor.quantize.oscillation import FreezeOscillation
    from tersor.quantize.quantize import Quantize
    from tersor.quantize.ranges import Entropy, MeanSquaredError, MinMax, MovingAverage, Percentile
    from tersor.quantize.relu6 import ReplaceReLU6
    from tersor.quantize.round_biases import RoundBiases
    from tersor.quantize.schemes import Int
    from tersor.quantize.spread import ScaleSpread
    from tersor.quantize.weight_only import QuantizeWeights
    from tersor.recipes.mixed_precision import MixedPrecision
    from tersor.run.budgets import Budgets
    from tersor.train.adaptive import Adaptive, GradientNorms, ValidationLoss
    from tersor.train.average import Average
    from tersor.train.conflict import Conflict
    from tersor.train.finetune import Finetune
    from tersor.train.objective import TaskLoss
    from tersor.train.replay import replayed
    from tersor.train.together import Together


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tersor' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    value = getattr(import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
