"""How sparse a model is and what that changed: zeros by layer, changed weights, structured against unstructured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.finite import expect_finite
from tersor.core.place import TensorPlace, tensor_at
from tersor.measure.size import effective_weights
from tersor.tensor import encodings, masks
from tersor.tensor.change import change

_NOT_FINITE = "weights that are not finite cannot be compared"


def sparsity(model: nn.Module) -> tuple[dict[str, Any], ...]:
    """A row for each weight of two or more axes, by the values that the forward uses, and last the model's own.

    Keys: path, tensor ("" and "<model>" in the last row), parameters, zeros, sparsity (their fraction), empty_outputs
    of outputs (output channels, dimension 0, that are all zero). Empty where the model has no such weight.
    """
    rows = [
        {"path": place.module, "tensor": place.tensor, **_zeros(tensor)}
        for place, tensor in effective_weights(model)
        if tensor.ndim >= 2 and tensor.numel() > 0
    ]
    if not rows:
        return ()
    total = {name: sum(row[name] for row in rows) for name in ("parameters", "zeros", "empty_outputs", "outputs")}
    return (*rows, {"path": "", "tensor": "<model>", **total, "sparsity": total["zeros"] / total["parameters"]})


def _zeros(tensor: Tensor) -> dict[str, Any]:
    nonzero = torch.count_nonzero(tensor.flatten(1), dim=1)
    zeros = tensor.numel() - int(nonzero.sum())
    return {
        "parameters": tensor.numel(), "zeros": zeros, "sparsity": zeros / tensor.numel(),
        "empty_outputs": int((nonzero == 0).sum()), "outputs": len(nonzero),
    }  # fmt: skip


def weight_changes(original: nn.Module, changed: nn.Module) -> tuple[dict[str, Any], ...]:
    """How far the weights of ``changed`` are from those of ``original``: a row for each that both have in one shape.

    Keys: path, tensor, parameters, and what ``tersor.tensor.change.Change`` holds. Weights of two or more axes, by the
    values that the forward uses. Raises InputError where no weight is in both, and with the count for one that is not
    finite.
    """
    before = {place: tensor for place, tensor in effective_weights(original) if tensor.ndim >= 2 and tensor.numel()}
    rows = [
        {
            "path": place.module,
            "tensor": place.tensor,
            "parameters": tensor.numel(),
            **_change(str(place), before[place], tensor),
        }
        for place, tensor in effective_weights(changed)
        if place in before and before[place].shape == tensor.shape
    ]
    if not rows:
        raise InputError("the models have no weight of one shape in common", where="weight_changes")
    return tuple(rows)


def _change(where: str, original: Tensor, changed: Tensor) -> dict[str, Any]:
    for tensor in (original, changed):
        expect_finite(tensor, where, _NOT_FINITE)
    return change(original, changed)._asdict()


def structured_against_unstructured(model: nn.Module, path: str, fraction: float) -> tuple[dict[str, Any], ...]:
    """What zeroing single weights costs the weight of the module at ``path``, and what removing output channels does.

    ``fraction`` of the weights go by |w|, or of the output channels (dimension 0) by their L2 norm. A row for each:
    kind ("unstructured", "structured"), zeros, parameters_left, dense_bytes (the structured one is really smaller),
    smallest_bytes (in the best encoding), and what ``tersor.tensor.change.Change`` holds. Data-free: which of two equal
    norms matters is for ``sensitivity`` to say. Raises InputError for a fraction outside [0, 1), no such weight,
    and one that is not finite.
    """
    if not 0 <= fraction < 1:
        raise InputError("not a fraction", where="structured_against_unstructured", got=fraction, expected="[0, 1)")
    weight = tensor_at(model, TensorPlace(path, "weight")).detach()
    if weight.ndim < 2 or not weight.numel():
        raise InputError("the weight has no output channels", where=path, got=f"shape {list(weight.shape)}")
    expect_finite(weight, f"{path}.weight", _NOT_FINITE)
    single = masks.keep_largest(weight.abs(), masks.count(fraction, weight.numel()))
    channels = masks.keep_largest(masks.rows(weight.double().square()), masks.count(fraction, len(weight)))
    whole = masks.spread_rows(channels, weight)
    return (
        _row("unstructured", weight, single, torch.ones_like(channels)),
        _row("structured", weight, whole, channels),
    )


def _row(kind: str, weight: Tensor, keep: Tensor, channels: Tensor) -> dict[str, Any]:
    left = torch.where(keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
    found = encodings.sizes(left[channels])
    return {
        "kind": kind, "zeros": int((~keep).sum()), "parameters_left": int(keep.sum()), "dense_bytes": found["dense"],
        "smallest_bytes": found[encodings.smallest(found)], **change(weight, left)._asdict(),
    }  # fmt: skip
