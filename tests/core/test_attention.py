"""Attention in steps is torch's attention, and its softmax can be tapped within a model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.attention import attention
from tersor.core.intercept import ATTENTION_SOFTMAX, intercept_at


def _mask(kind):
    if kind == "bool":  # the second query sees no key
        return torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])
    return torch.tensor([[0.0, -1.5, 2.0, -torch.inf], [-torch.inf] * 4, [0.5] * 4]) if kind == "float" else None


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("given", [{}, {"scale": 0.3}, {"enable_gqa": True}])
def test_attention_in_steps_is_torchs(mask, given):
    torch.manual_seed(0)
    heads = 2 if "enable_gqa" in given else 4
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, heads, 4, 8), torch.randn(2, heads, 4, 5)
    expected = F.scaled_dot_product_attention(query, key, value, _mask(mask), **given)
    got = attention(query, key, value, _mask(mask), **given, on_probabilities=lambda p: p)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_causal_attention_in_steps_is_torchs():
    query, key, value = (torch.randn(3, 5, 4) for _ in range(3))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    got = attention(query, key, value, is_causal=True, on_probabilities=lambda p: p)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(F.scaled_dot_product_attention(x, x, x), x, x)


class Keep(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return x.round()


def test_a_tap_replaces_the_softmax_of_the_call_that_is_meant():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(1, 2, 3, 4)
    tapped, tap = copy.deepcopy(model), Keep()
    intercept_at(tapped, "").add(ATTENTION_SOFTMAX, 1, tap)
    first = F.scaled_dot_product_attention(x, x, x)
    probabilities = (first @ x.transpose(-2, -1) / 2).softmax(-1)
    torch.testing.assert_close(tapped(x), probabilities.round() @ x)
    assert len(tap.seen) == 1
    torch.testing.assert_close(tap.seen[0], probabilities)
