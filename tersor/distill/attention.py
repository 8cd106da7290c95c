"""Learning where the teacher's transformer layers attend to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.distill.checks import expect_one_of
from tersor.distill.join import Joined
from tersor.distill.pairs import reading_of
from tersor.distill.samples import divergence
from tersor.train.layers import LayerPair, Reading, Spread
from tersor.train.objective import Forward, Objective
from tersor.train.taps import UNSEEN


@final
@dataclass(frozen=True)
class AttentionMaps(Objective):
    """The student attends as the teacher does: mean over pairs of layers, heads and queries of D(A_s, A_t).

    A [batch, heads, queries, keys] is what softmax makes of the scores inside a layer, before dropout, whether in the
    open, in scaled_dot_product_attention or in nn.MultiheadAttention. D = KL(A_t ‖ A_s) over keys ("kl"), or the mean
    over keys of the squared difference of scores ("mse"), each row of scores less its mean, because softmax does not
    see a constant. Keys that one of both must not see are left out, and queries that are padding by ``attention_mask``.

    Args:
        pairs, spread: as in ``Hints``; a layer holds one attention: "encoder.layer.*", or a part of it.
        loss: D.
        heads: "each" head learns from the teacher's of its number; "mean": student and teacher are averaged over heads
            first (scores for "mse", probabilities for "kl"), so that their numbers may differ.

    Raises InputError where a name matches nothing, a layer holds no attention or several, and for other numbers of
    heads, queries or keys.
    Source: Wang et al. 2020, MiniLM (arXiv 2002.10957), section 3.1 ("kl"); Jiao et al. 2019, TinyBERT (arXiv
    1909.10351), equation 7, of unnormalised scores ("mse").
    """

    pairs: Mapping[str, str]
    loss: Literal["kl", "mse"] = "kl"
    heads: Literal["each", "mean"] = "each"
    spread: Spread = "uniform"

    def __post_init__(self) -> None:
        expect_one_of("AttentionMaps.loss", self.loss, ("kl", "mse"))
        expect_one_of("AttentionMaps.heads", self.heads, ("each", "mean"))
        self.reads()

    def reads(self) -> tuple[Reading, ...]:
        """The attention inside ``pairs``."""
        return (reading_of("AttentionMaps", self.pairs, "attention", self.spread),)

    def of(self, forward: Forward) -> Tensor:
        """The mean over pairs of layers for one forward pass: []."""
        pairs = forward.pairs(self.reads()[0])
        return torch.stack([self._distance(forward, pair) for pair in pairs]).mean()

    def _distance(self, forward: Forward, pair: LayerPair) -> Tensor:
        self._expect_alike(pair)
        student, teacher = pair.student.float(), pair.teacher.float()
        seen = (student > UNSEEN).all(dim=1, keepdim=True) & (teacher > UNSEEN).all(dim=1, keepdim=True)
        of_query = (self._divergence if self.loss == "kl" else self._squared_error)(student, teacher, seen)
        batch, _, queries, _ = student.shape
        counted = forward.counted(torch.Size((batch, queries)), pair.names[0])
        per_query = of_query.mean(dim=1)  # over heads: [batch, queries]
        return Joined(student, teacher, counted).mean(per_query)

    def _divergence(self, student: Tensor, teacher: Tensor, seen: Tensor) -> Tensor:
        """[batch, heads, queries]."""
        log_s, log_t = (F.log_softmax(x.masked_fill(~seen, UNSEEN), dim=-1) for x in (student, teacher))
        if self.heads == "mean":
            log_s, log_t = (x.logsumexp(dim=1, keepdim=True) for x in (log_s, log_t))
            log_s, log_t = (x.log_softmax(dim=-1) for x in (log_s, log_t))
        return divergence(log_t, log_s)

    def _squared_error(self, student: Tensor, teacher: Tensor, seen: Tensor) -> Tensor:
        """[batch, heads, queries]."""
        if self.heads == "mean":
            student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
        count = seen.sum(dim=-1, keepdim=True).clamp_min(1)
        gap = (student - teacher).masked_fill(~seen, 0)
        gap = (gap - gap.sum(dim=-1, keepdim=True) / count).masked_fill(~seen, 0)
        return gap.square().sum(dim=-1) / count.squeeze(-1)

    def _expect_alike(self, pair: LayerPair) -> None:
        ours, theirs = pair.student.shape, pair.teacher.shape
        if self.heads == "mean":
            ours, theirs = (ours[0], *ours[2:]), (theirs[0], *theirs[2:])  # type: ignore[assignment]
        if ours != theirs:
            raise InputError(
                "attention maps of different shapes", where=f"AttentionMaps: {pair}",
                got=f"student {list(pair.student.shape)}, teacher {list(pair.teacher.shape)}",
                expected="the same [batch, heads, queries, keys]",
                do="Where only the heads differ: heads='mean'",
            )  # fmt: skip
