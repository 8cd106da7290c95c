"""The key-value cache that a decoder keeps while it writes: bytes, from the model's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tersor.core.errors import InputError


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of ``context`` tokens in ``layers`` layers, of ``heads`` key-value heads of ``width`` each."""

    layers: int
    heads: int
    width: int
    context: int

    def elements(self, batch: int = 1) -> int:
        """Numbers in the cache: 2 · layers · heads · width · context for each sample."""
        return 2 * self.layers * self.heads * self.width * self.context * batch

    def bytes(self, bits: float, batch: int = 1) -> float:
        """Bytes of the cache in numbers of so many bits."""
        return self.elements(batch) * bits / 8


def kv_cache(model: nn.Module, context: int | None = None) -> KeyValueCache | None:
    """The cache of a transformers decoder; None for a model that writes no text.

    ``context``: tokens kept; default: as many as the model's configuration allows. Raises InputError where the
    configuration allows fewer.
    """
    config = getattr(model, "config", None)
    writes = getattr(model, "can_generate", None)
    if config is None or not callable(writes) or not writes():
        return None
    text: Any = config.get_text_config(decoder=True)
    layers, query_heads = getattr(text, "num_hidden_layers", None), getattr(text, "num_attention_heads", None)
    size, most = getattr(text, "hidden_size", None), getattr(text, "max_position_embeddings", None)
    length = context or most
    if not (layers and query_heads and size and length):
        return None
    if context is not None and (context < 1 or (most is not None and context > most)):
        raise InputError(
            "the model cannot keep so many tokens", where="--context", got=context, expected=f"1 to {most or 'many'}"
        )
    heads = getattr(text, "num_key_value_heads", None) or query_heads
    width = getattr(text, "head_dim", None) or size // query_heads
    return KeyValueCache(int(layers), int(heads), int(width), int(length))
