"""Learning from the teacher's hidden layers: hints with learnt projections, and attention transfer."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.attached import attach, attached, detach
from tersor.core.check_fields import check_fields
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.distill.checks import expect_one_of, expect_positive
from tersor.distill.join import CHANNELS, Channels, channel_axis, join, join_positions
from tersor.distill.pairs import reading_of
from tersor.train.companion import Companion
from tersor.train.layers import LayerPair, Reading, Spread
from tersor.train.objective import Forward, Objective
from tersor.train.rehearse import rehearse


@final
@dataclass(frozen=True)
class Hints(Objective):
    """The student's hidden layers resemble the teacher's: mean over pairs of layers of D(W h_s, h_t).

    D is the mean of (W h_s − h_t)² over positions and channels ("mse"), or the mean of 1 − cos(W h_s, h_t) over
    positions ("cosine"). W is a learnt linear map of channels where widths differ, the identity elsewhere; it is
    trained with the student and is never part of what training hands back. Where resolutions differ, the larger one is
    averaged; positions that the model's ``attention_mask`` leaves out do not count. Hidden states of transformers are
    hints at "encoder.layer.*".

    Args:
        pairs: the student's layer → the teacher's: names or patterns, see ``Reading``, which says what ``spread`` does.
        loss: D.
        spread: which of the teacher's layers, where a pattern matches more of them.
        channels: the channels' axis where it is not 1 of four axes or more, the last of fewer ("first", "last").

    Raises InputError where a name matches nothing, hidden states cannot be joined, or projections are not there.
    Source: Romero et al. 2014, FitNets (arXiv 1412.6550), equation 3 (half the sum of squares there); of hidden states
    Jiao et al. 2019, TinyBERT (arXiv 1909.10351), equation 8; the cosine Sanh et al. 2019 (arXiv 1910.01108).
    """

    pairs: Mapping[str, str]
    loss: Literal["mse", "cosine"] = "mse"
    spread: Spread = "uniform"
    channels: Channels = "auto"

    def __post_init__(self) -> None:
        expect_one_of("Hints.loss", self.loss, ("mse", "cosine"))
        expect_one_of("Hints.channels", self.channels, CHANNELS)
        self.reads()

    def reads(self) -> tuple[Reading, ...]:
        """The outputs of ``pairs``."""
        return (reading_of("Hints", self.pairs, spread=self.spread),)

    def companions(self) -> tuple[Companion, ...]:
        """What puts the projections on the model."""
        return (Project(self),)

    def of(self, forward: Forward) -> Tensor:
        """The mean over pairs of layers for one forward pass: []."""
        pairs = forward.pairs(self.reads()[0])
        return torch.stack([self._distance(forward, pair) for pair in pairs]).mean()

    def _distance(self, forward: Forward, pair: LayerPair) -> Tensor:
        joined = join(pair, forward, "Hints", self.channels)
        student, teacher = joined.student, joined.teacher
        if student.shape[-1] != teacher.shape[-1]:
            projections = cast(nn.ModuleDict, attached(forward.student, self.key))
            student = projections[key_of(pair)](student).float()
        if self.loss == "cosine":
            return joined.mean(1 - F.cosine_similarity(student, teacher, dim=-1))
        return joined.mean((student - teacher).square().mean(dim=-1))

    @property
    def key(self) -> str:
        """The name under which its projections stand on the model: of these very settings."""
        return f"Hints_{zlib.crc32(repr(self).encode()):08x}"


def key_of(pair: LayerPair) -> str:
    """The name of a pair's projection (a module's name has no dots)."""
    return "|".join(pair.names).replace(".", "_")


@final
@dataclass(frozen=True)
class Project(Companion):
    """Puts on the model a linear map for each pair of ``hints`` whose widths differ; training trains it, too."""

    hints: Hints
    needs_length: ClassVar[bool] = False

    def begin(self, model: nn.Module, task: Task) -> None:
        """Make the maps, from the widths that one batch shows; initial values depend on torch's random state."""
        widths = rehearse(self.hints, model, task, self._widths)
        maps = {key: nn.Linear(ours, theirs, bias=False) for key, (ours, theirs) in widths.items() if ours != theirs}
        if maps:
            device = next((parameter.device for parameter in model.parameters()), None)
            attach(model, self.hints.key, nn.ModuleDict(maps).to(device))

    def _widths(self, forward: Forward) -> dict[str, tuple[int, int]]:
        found = {}
        for pair in forward.pairs(self.hints.reads()[0]):
            joined = join(pair, forward, "Hints", self.hints.channels)
            found[key_of(pair)] = (joined.student.shape[-1], joined.teacher.shape[-1])
        return found

    def finish(self, model: nn.Module) -> Plan:
        """Take the maps off."""
        detach(model, self.hints.key)
        return Plan("project")


@final
@dataclass(frozen=True)
class AttentionTransfer(Objective):
    """Where the student looks: mean over pairs of layers and samples of ‖Q_s / ‖Q_s‖₂ − Q_t / ‖Q_t‖₂‖₂².

    Q is a layer's map of Σ_c |A_c|^p over its channels, one number for each position; so widths may differ. Where
    resolutions differ, the larger map is averaged. For transformers' own attention see ``AttentionMaps``.

    Args:
        pairs, spread, channels: see ``Hints``.
        power: p.

    Raises InputError where a name matches nothing, and where maps cannot be joined.
    Source: Zagoruyko and Komodakis 2016 (arXiv 1612.03928), equation 2 with p = 2, squared as in the authors' code;
    there the mean over positions times β = 1000, here their sum: at 8 × 8 positions a weight of 1000 / 64 is the same.
    """

    pairs: Mapping[str, str]
    power: float = 2.0
    spread: Spread = "uniform"
    channels: Channels = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        expect_positive("AttentionTransfer", power=self.power)
        expect_one_of("AttentionTransfer.channels", self.channels, CHANNELS)
        self.reads()

    def reads(self) -> tuple[Reading, ...]:
        """The outputs of ``pairs``."""
        return (reading_of("AttentionTransfer", self.pairs, spread=self.spread),)

    def of(self, forward: Forward) -> Tensor:
        """The mean over pairs of layers for one forward pass: []."""
        pairs = forward.pairs(self.reads()[0])
        return torch.stack([self._distance(forward, pair) for pair in pairs]).mean()

    def _distance(self, forward: Forward, pair: LayerPair) -> Tensor:
        maps = LayerPair(pair.names, self._energy(pair.student), self._energy(pair.teacher))
        student, teacher = join_positions(maps, forward, "AttentionTransfer", self.channels).cleared()
        gap = F.normalize(student.squeeze(-1), dim=1) - F.normalize(teacher.squeeze(-1), dim=1)
        return gap.square().sum(dim=1).mean()

    def _energy(self, x: Tensor) -> Tensor:
        """Σ_c |A_c|^p, the channels' axis kept with length 1."""
        return x.float().abs().pow(self.power).sum(dim=channel_axis(x, self.channels), keepdim=True)
