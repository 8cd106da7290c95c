"""Learning how samples relate to each other: distances, angles, similarities and correlations within a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.distill.checks import expect_one_of, expect_positive, expect_weights
from tersor.distill.join import Joined, exactly, join_positions
from tersor.distill.pairs import reading_of
from tersor.distill.samples import distributions_of
from tersor.train.layers import LayerPair, Reading, Spread
from tersor.train.objective import Forward, Objective

TINY = 1e-12  # squared lengths below count as zero


@final
@dataclass(frozen=True)
class RelativeDistances(Objective):
    """The mean over pairs i ≠ j of samples of Huber(ψ_s(i, j) − ψ_t(i, j)), ψ(i, j) = ‖x_i − x_j‖₂ / μ.

    x are the features of a layer, flattened, or the outputs where ``pairs`` is empty; μ is the batch's mean distance,
    Huber's threshold 1. Widths and scales may differ. With several pairs of layers their mean.

    Args:
        pairs, spread: see ``Hints``.

    Raises InputError where a name matches nothing.
    Source: Park et al. 2019, RKD (arXiv 1904.05068), section 3.2.1; with ``RelativeAngles`` at weights 25 and 50.
    """

    pairs: Mapping[str, str] = field(default_factory=dict)
    spread: Spread = "uniform"

    def __post_init__(self) -> None:
        self.reads()

    def reads(self) -> tuple[Reading, ...]:
        """The outputs of ``pairs``."""
        return _reads("RelativeDistances", self.pairs, self.spread)

    def of(self, forward: Forward) -> Tensor:
        """The mean over pairs of layers for one forward pass: []."""
        return _mean_over_layers(forward, self.reads(), _distance_loss)


def _distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)
    total = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher), reduction="sum")
    return total / max(1, n * (n - 1))


def _relative_distances(x: Tensor) -> Tensor:
    """ψ [batch, batch] of x [batch, features], 0 on the diagonal."""
    n, distances = len(x), _distances(x)
    return distances / (distances.sum() / max(1, n * (n - 1))).clamp_min(TINY)


def _distances(x: Tensor) -> Tensor:
    """‖x_i − x_j‖₂ [batch, batch]; no gradient where it is zero."""
    x = x - x.mean(dim=0)  # nothing changes but rounding
    squares = x.square().sum(dim=1)
    squared = squares[:, None] + squares[None, :] - 2 * x @ x.T
    off_diagonal = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return squared.clamp_min(TINY).sqrt() * off_diagonal


@final
@dataclass(frozen=True)
class RelativeAngles(Objective):
    """The mean over triples of different samples i, j, k of Huber(cos ∠_s(i, j, k) − cos ∠_t(i, j, k)), at corner j.

    x are the features of a layer, flattened, or the outputs where ``pairs`` is empty. It takes batch² ·
    (batch + features) numbers: of ten outputs 9 MB at 128 samples, 0.5 GB at 512; of 4,096 features 0.3 GB at 128.

    Args:
        pairs, spread: see ``Hints``.

    Raises InputError where a name matches nothing.
    Source: Park et al. 2019, RKD (arXiv 1904.05068), section 3.2.2.
    """

    pairs: Mapping[str, str] = field(default_factory=dict)
    spread: Spread = "uniform"

    def __post_init__(self) -> None:
        self.reads()

    def reads(self) -> tuple[Reading, ...]:
        """The outputs of ``pairs``."""
        return _reads("RelativeAngles", self.pairs, self.spread)

    def of(self, forward: Forward) -> Tensor:
        """The mean over pairs of layers for one forward pass: []."""
        return _mean_over_layers(forward, self.reads(), _angle_loss)


def _angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)
    total = F.smooth_l1_loss(_cosines(student), _cosines(teacher), reduction="sum")
    return total / max(1, n * (n - 1) * (n - 2))


def _cosines(x: Tensor) -> Tensor:
    """cos ∠ [corner j, i, k] of x [batch, features]; the same everywhere where two of the three are one sample."""
    towards = F.normalize(x[None, :, :] - x[:, None, :], dim=-1)  # [j, i]: from j to i
    return towards @ towards.transpose(1, 2)


@final
@dataclass(frozen=True)
class SimilarityPreserving(Objective):
    """What the teacher finds alike, the student does: the squared difference of their Gram matrices.

    Between "samples": (1/b²) ‖G_s − G_t‖²_F, G = A Aᵀ of the layer's features A [b, features] with rows scaled to
    length 1. Between "positions": of each sample, the mean squared difference of cos(a_i, a_j) over all pairs of
    positions of a map or sequence. Widths may differ.

    Args:
        pairs, spread: see ``Hints``; without pairs the outputs ("samples" only).
        between: what is compared with what.

    Raises InputError where a name matches nothing, and between positions where there are none to join.
    Source: Tung and Mori 2019 (arXiv 1907.09682), section 3.1; between positions Liu et al. 2019 (arXiv
    1903.04197), section 3, pair-wise distillation.
    """

    pairs: Mapping[str, str] = field(default_factory=dict)
    between: Literal["samples", "positions"] = "samples"
    spread: Spread = "uniform"

    def __post_init__(self) -> None:
        expect_one_of("SimilarityPreserving.between", self.between, ("samples", "positions"))
        if self.between == "positions" and not self.pairs:
            raise InputError("between positions needs pairs of layers", where="SimilarityPreserving.pairs")
        self.reads()

    def reads(self) -> tuple[Reading, ...]:
        """The outputs of ``pairs``."""
        return _reads("SimilarityPreserving", self.pairs, self.spread)

    def of(self, forward: Forward) -> Tensor:
        """The mean over pairs of layers for one forward pass: []."""
        if self.between == "samples":
            return _mean_over_layers(forward, self.reads(), _similarity_loss)
        joined = [join_positions(pair, forward, "SimilarityPreserving") for pair in forward.pairs(self.reads()[0])]
        with exactly(forward.outputs):
            return torch.stack([_structure_loss(features) for features in joined]).mean()


def _structure_loss(joined: Joined) -> Tensor:
    student, teacher = (F.normalize(x, dim=-1) for x in joined.cleared())
    squared = (student @ student.transpose(1, 2) - teacher @ teacher.transpose(1, 2)).square()
    if joined.counted is None:
        return squared.mean()
    both = joined.counted[:, :, None] & joined.counted[:, None, :]
    return (squared * both).sum() / both.sum().clamp_min(1)


def _similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    similar_s, similar_t = (F.normalize(x @ x.T, dim=1) for x in (student, teacher))
    return (similar_s - similar_t).square().mean()


@final
@dataclass(frozen=True)
class CorrelationCongruence(Objective):
    """(1/b²) ‖K_s − K_t‖²_F of the kernel matrices K_ij = exp(−γ ‖x_i − x_j‖²) within a batch, γ = ``gamma``.

    x are the features of a layer, flattened and scaled to length 1, or the outputs where ``pairs`` is empty.

    Args:
        gamma: γ.
        pairs, spread: see ``Hints``.

    Raises InputError for a gamma that is not positive, and where a name matches nothing.
    Source: Peng et al. 2019 (arXiv 1904.01802), section 3, with the Gaussian kernel itself in place of its Taylor
    series, and without the embedding in front.
    """

    pairs: Mapping[str, str] = field(default_factory=dict)
    gamma: float = 0.4
    spread: Spread = "uniform"

    def __post_init__(self) -> None:
        check_fields(self)
        expect_positive("CorrelationCongruence", gamma=self.gamma)
        self.reads()

    def reads(self) -> tuple[Reading, ...]:
        """The outputs of ``pairs``."""
        return _reads("CorrelationCongruence", self.pairs, self.spread)

    def of(self, forward: Forward) -> Tensor:
        """The mean over pairs of layers for one forward pass: []."""
        return _mean_over_layers(forward, self.reads(), self._loss)

    def _loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        similar_s, similar_t = (self._kernel(F.normalize(x, dim=1)) for x in (student, teacher))
        return (similar_s - similar_t).square().mean()

    def _kernel(self, x: Tensor) -> Tensor:
        return torch.exp(2 * self.gamma * (x @ x.T - 1))  # ‖x_i − x_j‖² = 2 − 2 x_i · x_j


@final
@dataclass(frozen=True)
class Correlation(Objective):
    """T² · (β · mean over samples of (1 − ρ(p_s, p_t)) + γ · mean over classes of the same), ρ Pearson's correlation.

    p = softmax(z / T) [batch, classes]: along a sample's classes, and along a class's samples. Only what correlates
    counts, so that a student may be less sure than a far larger teacher. Shapes are SoftTargets'.

    Args:
        beta, gamma: weights of the two parts.
        temperature: T.

    Raises InputError for a temperature that is not positive, weights that are negative or both zero, and what
    SoftTargets raises.
    Source: Huang et al. 2022, DIST (arXiv 2205.10536), section 3; T² as in the authors' code.
    """

    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        expect_positive("Correlation", temperature=self.temperature)
        expect_weights("Correlation", beta=self.beta, gamma=self.gamma)

    def of(self, forward: Forward) -> Tensor:
        """Both parts for one forward pass: []."""
        samples = distributions_of(forward, "Correlation")
        student, teacher = (F.softmax(z / self.temperature, dim=-1) for z in (samples.student, samples.teacher))
        if samples.counted is not None:
            if not bool(samples.counted.any()):
                return 0 * student.sum()
            student, teacher = student[samples.counted], teacher[samples.counted]
        between, within = (1 - _correlation(student, teacher, dim).mean() for dim in (1, 0))
        return self.temperature**2 * (self.beta * between + self.gamma * within)


def _correlation(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Pearson's ρ along ``dim`` of [n, m]; 0 where one of them is constant."""
    x, y = (z - z.mean(dim=dim, keepdim=True) for z in (x, y))
    return F.cosine_similarity(x, y, dim=dim, eps=1e-8)


def _reads(who: str, pairs: Mapping[str, str], spread: Spread) -> tuple[Reading, ...]:
    return (reading_of(who, pairs, spread=spread),) if pairs else ()


def _mean_over_layers(forward: Forward, reads: tuple[Reading, ...], loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean of ``loss`` over pairs of features float32 [batch, features]: of layers, or of the outputs alone.

    Positions of a sequence that are padding are zero.
    """
    outputs = LayerPair(("", ""), forward.outputs, forward.reference_outputs)
    pairs = forward.pairs(reads[0]) if reads else [outputs]
    features = [(_flat(forward, p.student, p.names[0]), _flat(forward, p.teacher, p.names[1])) for p in pairs]
    with exactly(outputs.student):
        return torch.stack([loss(student, teacher) for student, teacher in features]).mean()


def _flat(forward: Forward, x: Tensor, layer: str) -> Tensor:
    counted = forward.counted(x.shape[:2], layer) if x.ndim == 3 else None
    return (x.float() if counted is None else x.float() * counted[..., None]).reshape(len(x), -1)
