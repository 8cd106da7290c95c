"""The names that recipes know."""

from __future__ import annotations

from tersor.core.step import Method, Step
from tersor.distill.attention import AttentionMaps
from tersor.distill.features import AttentionTransfer, Hints
from tersor.distill.relations import (
    Correlation,
    CorrelationCongruence,
    RelativeAngles,
    RelativeDistances,
    SimilarityPreserving,
)
from tersor.distill.response import DecoupledSoftTargets, Distill, MatchLogits, SoftTargets
from tersor.distill.teach import Teach
from tersor.prune.blocks.adapter import PruneBehindAdapter
from tersor.prune.blocks.block_scores import BlockScore, LossIncrease, RelativeNorm, Similarity
from tersor.prune.blocks.remove import PruneBlocks
from tersor.prune.layerwise.correct_variance import CorrectVariance
from tersor.prune.layerwise.reconstruct import PruneAndReconstruct
from tersor.prune.layerwise.sparsegpt import SparseGPT
from tersor.prune.sparse.drop_and_grow import DropAndGrow
from tersor.prune.sparse.elements import (
    MagnitudeAverage,
    Movement,
    RandomWeights,
    Wanda,
    WeightFisher,
    WeightMagnitude,
    WeightScore,
    WeightTaylor,
)
from tersor.prune.sparse.gradual import GradualSparsity
from tersor.prune.sparse.learnt_mask import LearnMasks
from tersor.prune.sparse.lottery import LotteryTicket
from tersor.prune.sparse.patterns import NM, Block, Element, Pattern, Rows
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.scopes import ErdosRenyi, Global, PerLayer, PerType, Scope
from tersor.prune.sparse.unmask import Unmask
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.group_sparsity import GroupSparsity
from tersor.prune.structured.scores import (
    ActivationWeighted,
    BatchNormScale,
    Fisher,
    GeometricMedian,
    HessianDiagonal,
    Magnitude,
    Random,
    Score,
    Taylor,
)
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
from tersor.quantize.ranges import Entropy, MeanSquaredError, MinMax, MovingAverage, Percentile, Range
from tersor.quantize.relu6 import ReplaceReLU6
from tersor.quantize.round_biases import RoundBiases
from tersor.quantize.spread import ScaleSpread
from tersor.quantize.weight_only import QuantizeWeights
from tersor.recipes.mixed_precision import MixedPrecision
from tersor.recipes.schema import Registry
from tersor.train.adaptive import Adaptive, GradientNorms, Rule, ValidationLoss
from tersor.train.companion import Companion
from tersor.train.conflict import Conflict
from tersor.train.finetune import Finetune
from tersor.train.objective import Objective, Sum, TaskLoss
from tersor.train.recalibrate import RecalibrateBatchNorm
from tersor.train.schedules import Constant, Cosine, OneCycle, Schedule
from tersor.train.together import Together

STEPS = Registry(
    {
        Step: {
            "prune_channels": PruneChannels,
            "prune_and_reconstruct": PruneAndReconstruct,
            "prune_blocks": PruneBlocks,
            "prune_behind_adapter": PruneBehindAdapter,
            "prune": Prune,
            "sparsegpt": SparseGPT,
            "correct_variance": CorrectVariance,
            "unmask": Unmask,
            "lottery_ticket": LotteryTicket,
            "recalibrate_batch_norm": RecalibrateBatchNorm,
            "finetune": Finetune,
            "distill": Teach,
            "fold_batch_norm": FoldBatchNorm,
            "replace_relu6": ReplaceReLU6,
            "equalize": Equalize,
            "quantize": Quantize,
            "quantize_dynamically": QuantizeDynamically,
            "correct_bias": CorrectBias,
            "round_biases": RoundBiases,
            "adaround": AdaRound,
            "mixed_precision": MixedPrecision,
            "cast": Cast,
            "quantize_weights": QuantizeWeights,
            "gptq": GPTQ,
            "scale_by_activations": ScaleByActivations,
        },
        Method: {"prune_channels": PruneChannels},
        Objective: {
            "task_loss": TaskLoss,
            "distill": Distill,
            "soft_targets": SoftTargets,
            "decoupled": DecoupledSoftTargets,
            "match_logits": MatchLogits,
            "hints": Hints,
            "attention_transfer": AttentionTransfer,
            "attention_maps": AttentionMaps,
            "relative_distances": RelativeDistances,
            "relative_angles": RelativeAngles,
            "similarity_preserving": SimilarityPreserving,
            "correlation_congruence": CorrelationCongruence,
            "correlation": Correlation,
            "group_sparsity": GroupSparsity,
            "scale_spread": ScaleSpread,
            "adaptive": Adaptive,
            "conflict": Conflict,
        },
        Rule: {"gradient_norms": GradientNorms, "validation_loss": ValidationLoss},
        Score: {
            "taylor": Taylor,
            "magnitude": Magnitude,
            "geometric_median": GeometricMedian,
            "batch_norm_scale": BatchNormScale,
            "fisher": Fisher,
            "hessian_diagonal": HessianDiagonal,
            "activation_weighted": ActivationWeighted,
            "random": Random,
        },
        WeightScore: {
            "magnitude": WeightMagnitude,
            "taylor": WeightTaylor,
            "fisher": WeightFisher,
            "wanda": Wanda,
            "movement": Movement,
            "magnitude_average": MagnitudeAverage,
            "random": RandomWeights,
        },
        Pattern: {"element": Element, "n_of_m": NM, "block": Block, "rows": Rows},
        Scope: {"layer": PerLayer, "global": Global, "erdos_renyi": ErdosRenyi, "type": PerType},
        Companion: {
            "gradual": GradualSparsity,
            "drop_and_grow": DropAndGrow,
            "learn_masks": LearnMasks,
            "freeze_scales": FreezeScales,
            "freeze_oscillation": FreezeOscillation,
        },
        BlockScore: {"similarity": Similarity, "relative_norm": RelativeNorm, "loss_increase": LossIncrease},
        Range: {
            "min_max": MinMax,
            "moving_average": MovingAverage,
            "percentile": Percentile,
            "mean_squared_error": MeanSquaredError,
            "entropy": Entropy,
        },
        Schedule: {"cosine": Cosine, "one_cycle": OneCycle, "constant": Constant},
    },
    sums={Objective: Sum},
    groups={Companion: Together},
)
