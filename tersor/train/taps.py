"""Keep what passes named layers in one forward pass: their output, or the attention inside them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tersor.core.attention import attention_scores
from tersor.core.errors import InputError
from tersor.core.place import module_at

What = Literal["output", "attention"]
UNSEEN = -1e4  # scores at or below are those of keys that must not be seen
_HIDDEN = 2 * UNSEEN  # such a score as it is kept: a finite number, in half precision too


@dataclass(frozen=True, order=True)
class Tap:
    """What is kept of the module at ``path``: its output (of several the first tensor), or the attention inside it."""

    path: str
    what: What = "output"

    def __str__(self) -> str:
        return self.path if self.what == "output" else f"{self.path} (attention)"


class Seen:
    """What passed the taps since it was last taken."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.values: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}

    def take(self) -> dict[Tap, list[Tensor]]:
        """Everything since the last time, call by call."""
        taken, self.values = self.values, {tap: [] for tap in self.values}
        return taken


@contextmanager
def tapped(model: nn.Module, taps: Sequence[Tap]) -> Iterator[Seen]:
    """Keep what passes ``taps`` of ``model`` inside the ``with``; its hooks are gone at the end, also after an error.

    Raises InputError for a path that the model does not have, and for an output without a float tensor.
    """
    seen = Seen(taps)
    with ExitStack() as stack:
        running: list[Tap] = []
        for tap in taps:
            module = module_at(model, tap.path)
            if tap.what == "output":
                stack.callback(module.register_forward_hook(partial(_keep, seen, tap)).remove)
                continue
            stack.callback(module.register_forward_pre_hook(partial(_enter, running, tap)).remove)
            stack.callback(module.register_forward_hook(partial(_leave, running), always_call=True).remove)
        if any(tap.what == "attention" for tap in taps):
            stack.enter_context(_AttentionWatch(seen, running))
        yield seen


def sole(values: Mapping[Tap, list[Tensor]], whose: str) -> dict[Tap, Tensor]:
    """Tap → what passed it. Raises InputError where that is not exactly one tensor; ``whose``: student or teacher."""
    found = {}
    for tap, calls in values.items():
        if len(calls) != 1:
            attention = tap.what == "attention"
            hidden = ": kernels other than scaled_dot_product_attention hide it" if attention and not calls else ""
            do = (
                "the part that holds one attention"
                if attention and calls
                else "a layer that is called once in each pass"
            )
            raise InputError(
                f"{'nothing passes' if not calls else f'{len(calls)} tensors pass'} this layer of the {whose}",
                where=str(tap), expected=f"one in each forward pass{hidden}",
                do=f"Name {do}",
            )  # fmt: skip
        found[tap] = calls[0]
    return found


def _keep(seen: Seen, tap: Tap, module: nn.Module, args: Any, result: Any) -> None:
    value = _tensor_in(result)
    if value is None or not value.is_floating_point():
        got = type(result).__name__ if value is None else f"a tensor of {value.dtype}"
        raise InputError("the layer's output holds no tensor to learn from", where=str(tap), got=got)
    seen.values[tap].append(value.clone())  # what follows may change it in place


def _tensor_in(result: Any) -> Tensor | None:
    if isinstance(result, Mapping):
        result = tuple(result.values())
    if isinstance(result, (tuple, list)):
        return next((value for value in result if isinstance(value, Tensor)), None)
    return result if isinstance(result, Tensor) else None


def _enter(running: list[Tap], tap: Tap, module: nn.Module, args: Any) -> None:
    running.append(tap)


def _leave(running: list[Tap], module: nn.Module, args: Any, result: Any) -> None:
    running.pop()


class _AttentionWatch(TorchFunctionMode):
    """Keeps, as a tensor [batch, heads, queries, keys], the scores whose softmax over keys is the attention.

    A constant along a row, which softmax does not see, may be missing; a key that must not be seen is at _HIDDEN.
    """

    def __init__(self, seen: Seen, running: list[Tap]):
        super().__init__()
        self.seen, self.running = seen, running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = _READERS.get(getattr(func, "__name__", "")) if self.running else None
        scores = read(func, args, kwargs) if read else None
        if scores is not None:
            kept = scores.clamp_min(_HIDDEN)  # a copy: what follows may change them in place
            for tap in self.running:
                self.seen.values[tap].append(kept)
        return func(*args, **kwargs)


def _of_softmax(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    scores: Tensor = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return scores if scores.ndim == 4 and dim in (-1, 3) else None


def _of_fused(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    return _scores(*args, **kwargs)


def _scores(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor | None:  # fmt: skip
    """What scaled_dot_product_attention computes inside; its arguments."""
    if query.ndim != 4:
        return None
    return attention_scores(query, key, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)


def _of_multihead(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """nn.MultiheadAttention shows its weights only when asked: it is computed again, without dropout."""
    asked = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
    asked.update(dropout_p=0.0, training=False, need_weights=True, average_attn_weights=False, is_causal=False)
    _, weights = F.multi_head_attention_forward(**asked)
    if weights is None or weights.ndim != 4:
        return None
    return weights.clamp_min(torch.finfo(weights.dtype).tiny).log().masked_fill(weights == 0, -torch.inf)


_READERS: dict[str, Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Tensor | None]] = {
    "softmax": _of_softmax,
    "scaled_dot_product_attention": _of_fused,
    "multi_head_attention_forward": _of_multihead,
}
