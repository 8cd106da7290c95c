"""Scaled dot-product attention in steps, for those who must act inside what torch calls as one operator."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_scores(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, *,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What softmax is taken of: (query · scale) keyᵀ, masked; −∞ where a key must not be seen.

    ``query`` [..., heads, queries, size], ``key`` [..., heads, keys, size] → [..., heads, queries, keys]; ``scale`` is
    1 / √size if it is None. ``attn_mask``: bool (True is seen), or numbers to add. With ``enable_gqa`` several heads of
    queries share one of keys. Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.1.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    # The factor on the query, not on the scores: it is smaller, and a quantised query's scale can bear it.
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is None:
        return scores
    return scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    on_probabilities: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.scaled_dot_product_attention``, what the softmax gives being replaced by what
    ``on_probabilities`` makes of it. A query that may see no key gives zeros, as there."""
    scores = attention_scores(query, key, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    probabilities = scores.softmax(-1)
    if attn_mask is not None:
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
        probabilities = probabilities.masked_fill(~seen.any(-1, keepdim=True), 0)
    probabilities = F.dropout(on_probabilities(probabilities), dropout_p)
    if enable_gqa:
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    return probabilities @ value
