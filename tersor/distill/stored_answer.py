"""A teacher's answer as columns of numbers that disks hold well, and back: fp16, all logits or the largest."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.train.taps import UNSEEN
from tersor.train.teacher import Answer

_ALL, _VALUES, _INDICES, _REST, _LAYER = "outputs", "largest", "indices", "rest of ", "layer "


def encode(answer: Answer, top_k: int | None) -> dict[str, Tensor]:
    """The columns of an answer, [batch, …] on the CPU: floats in fp16, integers as they are.

    With ``top_k``, of logits z [batch, …, classes] the k largest with their indices, and in float32 r = log Σ exp z
    over the rest: the mass that is left. Raises InputError where a layer's result has no row for each sample.
    """
    outputs = answer.outputs.detach()
    columns = {_ALL: _small(outputs)} if top_k is None else _largest(outputs, top_k)
    for name, value in answer.layers.items():
        if value.ndim == 0 or len(value) != len(outputs):
            raise InputError(
                "the cache keeps a row for each sample, and this layer gives none", where=f"teacher's layer {name!r}",
                got=f"shape {list(value.shape)}, {len(outputs)} samples", do="Leave the cache out, or the layer",
            )  # fmt: skip
        columns[_LAYER + name] = _small(value.detach())
    return columns


def _small(values: Tensor) -> Tensor:
    return (values.to(torch.float16) if values.is_floating_point() else values).cpu().contiguous()


def _largest(logits: Tensor, k: int) -> dict[str, Tensor]:
    classes = logits.shape[-1]
    if k >= classes:
        return {_ALL: _small(logits)}
    values, indices = logits.float().topk(k, dim=-1)
    rest = logits.float().scatter(-1, indices, -math.inf).logsumexp(dim=-1)
    columns = {_VALUES: values.half(), _INDICES: indices.int(), f"{_REST}{classes}": rest}
    return {name: value.cpu().contiguous() for name, value in columns.items()}


def decode(columns: Mapping[str, Tensor], device: torch.device) -> Answer:
    """The answer in float32 on ``device``. Of logits that were left out, each gets r − log(classes − k): their mass."""
    moved = {name: value.to(device, non_blocking=True) for name, value in columns.items()}
    layers = {name.removeprefix(_LAYER): _wide(moved[name]) for name in moved if name.startswith(_LAYER)}
    if _ALL in moved:
        return Answer(_wide(moved[_ALL]), layers)
    name = next(name for name in moved if name.startswith(_REST))
    values, indices = moved[_VALUES].float(), moved[_INDICES].long()
    classes, k = int(name.removeprefix(_REST)), values.shape[-1]
    each = moved[name] - math.log(classes - k)
    return Answer(each[..., None].repeat_interleave(classes, dim=-1).scatter(-1, indices, values), layers)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values


def storable(columns: Mapping[str, Tensor]) -> Tensor:
    """Which rows are finite in fp16: bool [batch]."""
    rows = [torch.isfinite(value).reshape(len(value), -1).all(dim=1) for value in columns.values()]
    return torch.stack(rows).all(dim=0)


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest |a − b| over all rows and columns of floats, relative to the row's largest |b|.

    Attention's scores of keys that both have as unseen are left out: beside them every other number is small.
    """
    largest = 0.0
    for name, value in b.items():
        if value.is_floating_point() and value.numel():
            x, y = a[name].float().reshape(len(value), -1), value.float().reshape(len(value), -1)
            if name.startswith(_LAYER):
                unseen = (x <= UNSEEN) & (y <= UNSEEN)
                x, y = x.masked_fill(unseen, 0), y.masked_fill(unseen, 0)
            size = y.abs().amax(dim=1).clamp_min(1e-3)
            largest = max(largest, float(((x - y).abs().amax(dim=1) / size).max()))
    return largest
