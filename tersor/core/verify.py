"""Removed channels must be gone without a trace: the shrunk model against the masked one. What a plan says that it
preserves must be the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.copies import sharing_copy
from tersor.core.edit import Slice
from tersor.core.errors import VerificationError
from tersor.core.place import tensor_at
from tersor.core.plan import Plan
from tersor.core.randomness import fixed_randomness
from tersor.core.task import Task

TOLERANCE = 1e-4  # relative, in float32
DRAWS = 4  # of noise, beside the examples


def masked_reference(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model`` in which whoever reads a removed channel reads it with weight zero."""
    masked: dict[int, Tensor] = {}
    for cut in (cut for edit in plan.edits if isinstance(edit, Slice) for cut in edit.cuts):
        if cut.role == "consumer":
            weight = tensor_at(model, cut.place)
            with torch.no_grad():
                masked[id(weight)] = only(masked.get(id(weight), weight), cut.dim, cut.keep)
    return sharing_copy(model, {key: nn.Parameter(weight, requires_grad=False) for key, weight in masked.items()})


def only(tensor: Tensor, dim: int, stays: Tensor) -> Tensor:
    """The tensor with every position of ``dim`` zero but those that stay (their numbers)."""
    removed = torch.ones(tensor.shape[dim], dtype=torch.bool)
    removed[stays.cpu()] = False
    return tensor.index_fill(dim, removed.nonzero().flatten().to(tensor.device), 0.0)


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """max |got − expected| / max |expected| (0 / 0 is 0) of finite values; infinity where the shapes differ, or
    values that are not finite."""
    if got.shape != expected.shape:
        return float("inf")
    if not got.numel():
        return 0.0
    got, expected = (value if value.is_complex() else value.double() for value in (got, expected))
    finite = torch.isfinite(expected)
    if not bool((finite == torch.isfinite(got)).all() and (got[~finite] == expected[~finite]).all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    difference, size = (got - expected)[finite].abs().max().item(), expected[finite].abs().max().item()
    return difference / size if size else difference


def verify_edits(
    original: nn.Module,
    edited: nn.Module,
    plan: Plan,
    task: Task,
    *,
    tolerance: float = TOLERANCE,
    draws: int = DRAWS,
) -> float | None:
    """The largest relative difference between ``edited`` and what it must equal: the plan's ``reference``, else the
    masked original where the plan slices, else the original where the plan ``preserves``. On the task's example inputs
    and on ``draws`` of noise like them: a channel that the few examples leave dead must not hide a wrong index.

    Both run in eval mode, in the dtype they have (in half precision the tolerance is at least eight of its steps). None
    where neither holds. Raises VerificationError above ``tolerance``, or where the edited model does not run.
    """
    if not plan.edits or not (plan.preserves or plan.reference is not None or _slices(plan)):
        return None
    example = task.demand_example()
    reference = masked_reference(original, plan) if plan.reference is None else plan.reference
    edited = sharing_copy(edited)
    probes = [example, *(_noise_like(example, seed) for seed in range(draws))]
    expected = [_run(reference, probe, task) for probe in probes]
    # A model may overflow on noise; on the examples it may not.
    chosen = [n for n, outputs in enumerate(expected) if n == 0 or bool(torch.isfinite(outputs).all())]
    what, other = ("shrunk", "masked one") if _slices(plan) else ("edited", "original")
    try:
        difference = max(relative_difference(_run(edited, probes[n], task), expected[n]) for n in chosen)
    except Exception as error:  # whatever the user's forward raises is the finding
        raise VerificationError(
            f"the {what} model does not run; the original is untouched", where=plan.method,
            got=f"{type(error).__name__}: {error}",
            do="A size that the forward holds as a literal cannot follow the removal: leave that group out with where=",
        ) from error  # fmt: skip
    if _slices(plan):
        _expect_training(original, edited, plan, task)
    if expected[0].is_floating_point():
        tolerance = max(tolerance, 8 * torch.finfo(expected[0].dtype).eps)
    if difference > tolerance:
        raise VerificationError(
            f"the {what} model differs from the {other}; the original is untouched", where=plan.method,
            got=f"relative difference {difference:.3g}", expected=f"at most {tolerance:g}",
            do="Leave layers out with where= to find the one, and please report the architecture",
        )  # fmt: skip
    return difference


def _expect_training(original: nn.Module, edited: nn.Module, plan: Plan, task: Task) -> None:
    """The edited model runs as it trains where the original does. Raises VerificationError. ``edited``: a copy."""
    error = _training_error(edited, task)
    if error is not None and _training_error(sharing_copy(original), task) is None:
        raise VerificationError(
            "the shrunk model does not run as it trains; the original is untouched", where=plan.method,
            got=f"{type(error).__name__}: {error}", do="Leave what only training uses out with where=",
        ) from error  # fmt: skip


def _training_error(model: nn.Module, task: Task) -> Exception | None:
    """What the forward raises as it trains: it may be the original's own, of a batch of one or of missing targets."""
    with torch.no_grad(), fixed_randomness(0):
        try:
            model.train()(*copy.deepcopy(task.example_inputs or ()))
        except Exception as error:  # noqa: BLE001
            return error
    return None


def _slices(plan: Plan) -> bool:
    return any(isinstance(edit, Slice) for edit in plan.edits)


def _noise_like(inputs: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """The inputs with float tensors replaced by normal noise of both signs, 2^seed times their size."""
    generator = torch.Generator().manual_seed(seed)

    def noise(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
            return value
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        return drawn * value.square().mean().sqrt() * 2**seed

    return tuple(noise(value) for value in inputs)


def _run(model: nn.Module, inputs: tuple[Any, ...], task: Task) -> Tensor:
    own = copy.deepcopy(inputs)  # a forward may change what it is given
    with torch.no_grad(), fixed_randomness(0), _no_fast_path():
        return task.output(model.eval()(*own))


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """nn.TransformerEncoder's fused path gives padding other values than the graph that is captured."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
