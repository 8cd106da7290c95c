"""A pruned transformers model as an ordinary one: a configuration that builds it, found and proved."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.eval_mode import eval_mode
from tersor.core.verify import relative_difference

TOLERANCE = 1e-5  # relative: kernels of other sizes add up in another order
_MOST_RATIOS = 6
_MOST_CONFIGURATIONS = 500
_Shapes = dict[str, tuple[int, ...]]
_Setting = tuple[str, Any]  # a field of the configuration, and a value for it


def save_pretrained(model: nn.Module, folder: Path | str, example_inputs: tuple[Any, ...]) -> Path:
    """Write a pruned transformers model so that its class's ``from_pretrained(folder)`` loads it, without Tersor.

    A configuration can say a pruned model only where its layers are alike (``PruneChannels(0.5)`` with the default
    scope prunes them alike). It is searched for among the fields that hold sizes and their multiples by the ratios of
    the shapes; what it builds must have the model's shapes and, with its weights, give its outputs on
    ``example_inputs``. ``model`` is not changed. Returns ``folder``.

    Raises InputError where the model is none of transformers', or no such configuration is found: the artifact of
    ``tersor.save`` holds every model.
    """
    config, save = getattr(model, "config", None), getattr(model, "save_pretrained", None)
    if not callable(save) or not callable(getattr(config, "to_dict", None)):
        raise InputError(
            "not a model of transformers", where="save_pretrained", got=type(model).__name__,
            expected="a model with a config and save_pretrained", do="Use tersor.save",
        )  # fmt: skip
    wanted = _shapes(model)
    fitting, ratios = _fitting(model, wanted)
    with eval_mode(model), torch.no_grad():
        expected = _tensors(model(*copy.deepcopy(example_inputs)))
    for built in _built(model, fitting, ratios, example_inputs, expected):
        built.save_pretrained(folder)  # type: ignore[operator]
        return Path(folder)
    raise InputError(
        "no configuration was found that computes what the model does", where="save_pretrained",
        got="the shapes fit, the outputs do not", do="Use tersor.save, which holds every model",
    )  # fmt: skip


def _fitting(model: nn.Module, wanted: _Shapes) -> tuple[list[Any], list[Fraction]]:
    """The configurations that build the wanted shapes, and the ratios by which sizes shrank. Raises InputError.

    Several may: half as many heads, or heads half as wide.
    """
    config = copy.deepcopy(model.config)
    start = _shapes_of(model, config) or {}
    open_, seen, found = [(config, start)], {str(config)}, []
    while open_ and len(seen) < _MOST_CONFIGURATIONS:
        config, built = open_.pop()
        if built == wanted:
            found.append(config)
            continue
        for better in sorted(_better(model, config, built, wanted), key=lambda item: -item[0]):
            if str(better[1]) not in seen:
                seen.add(str(better[1]))
                open_.append(better[1:])
    if not found:
        raise _unlike(start, wanted)
    return found, _ratios(start, wanted)


def _better(model: nn.Module, config: Any, built: _Shapes, wanted: _Shapes) -> Iterator[tuple[int, Any, _Shapes]]:
    """(sizes that differ, configuration, its shapes) for each change by which fewer differ: of a single field, else of
    two by one ratio (a width and the number of heads, which must divide it)."""
    left = _differing(built, wanted)
    for count in (1, 2):
        found = False
        for ratio in _ratios(built, wanted):
            for settings in combinations(_scaled(config, [ratio]), count):
                trial = _with(config, settings)
                shapes = _shapes_of(model, trial)
                if shapes is not None and (differing := _differing(shapes, wanted)) < left:
                    found = True
                    yield differing, trial, shapes
        if found:
            return


def _built(
    model: nn.Module,
    fitting: Sequence[Any],
    ratios: Sequence[Fraction],
    inputs: tuple[Any, ...],
    expected: list[Tensor],
) -> Iterator[nn.Module]:
    """Models that give the expected outputs: of the fitting configurations as they are, then with one or two more
    fields changed that shapes do not show (the number of heads where the width alone says how many weights)."""
    wanted = _shapes(model)
    for count in (0, 1, 2):
        for config in fitting:
            for settings in combinations(_scaled(config, ratios), count):
                trial = _with(config, settings)
                if not settings or _shapes_of(model, trial) == wanted:
                    built = _equal(model, trial, inputs, expected)
                    if built is not None:
                        yield built


def _equal(model: nn.Module, config: Any, inputs: tuple[Any, ...], expected: Sequence[Tensor]) -> nn.Module | None:
    """The model of this configuration with the given one's weights, if it gives the same outputs."""
    try:
        built = type(model)(copy.deepcopy(config)).to(next(model.parameters()))
        built.load_state_dict(model.state_dict())
        with torch.no_grad():
            got = _tensors(built.eval()(*copy.deepcopy(inputs)))
    except Exception:  # noqa: BLE001 – a configuration that does not build or run is not the one
        return None
    same = len(got) == len(expected) and all(
        relative_difference(a, b) <= TOLERANCE for a, b in zip(got, expected, strict=True)
    )
    return built if same else None


def _shapes(model: nn.Module) -> _Shapes:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _shapes_of(model: nn.Module, config: Any) -> _Shapes | None:
    """The shapes that a configuration builds, without allocating; None where it builds nothing."""
    try:
        with torch.device("meta"):
            return _shapes(type(model)(copy.deepcopy(config)))
    except Exception:  # noqa: BLE001 – a width that the heads do not divide, for instance
        return None


def _differing(built: _Shapes, wanted: _Shapes) -> int:
    """How many sizes differ; all and one more where the parameters are others."""
    if built.keys() != wanted.keys():
        return 1 + sum(map(len, wanted.values()))
    return sum(a != b for name in wanted for a, b in zip(built[name], wanted[name], strict=True))


def _ratios(built: _Shapes, wanted: _Shapes) -> list[Fraction]:
    """Wanted / built of the sizes that differ, the most frequent first."""
    found = Counter(
        Fraction(b, a) for name in wanted for a, b in zip(built.get(name, ()), wanted[name], strict=False) if a != b
    )
    return [ratio for ratio, _ in found.most_common(_MOST_RATIOS)]


def _scaled(config: Any, ratios: Sequence[Fraction]) -> list[_Setting]:
    """Every field that holds sizes, times every ratio that leaves them whole."""
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    return [(name, new) for name, value in fields.items() for r in ratios if (new := _times(value, r)) is not None]


def _times(value: Any, ratio: Fraction) -> Any:
    """An int, or a sequence of ints, times ``ratio``; None where that is not whole."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 1:
        scaled = value * ratio
        return int(scaled) if scaled.denominator == 1 else None
    if isinstance(value, (list, tuple)) and value:
        new = [_times(item, ratio) for item in value]
        return None if None in new else type(value)(new)
    return None


def _with(config: Any, settings: Sequence[_Setting]) -> Any:
    changed = copy.deepcopy(config)
    for name, value in settings:
        setattr(changed, name, value)
    return changed


def _tensors(outputs: Any) -> list[Tensor]:
    values = dict(outputs) if isinstance(outputs, Mapping) else outputs
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _unlike(built: _Shapes, wanted: _Shapes) -> InputError:
    example = next((name for name in wanted if built.get(name) != wanted[name]), "")
    return InputError(
        "no configuration was found that builds the model's shapes: its layers may be pruned unlike", where=example,
        got=list(wanted.get(example, ())), expected=f"{list(built.get(example, ()))}, as its configuration says",
        do='Prune all layers alike (scope="layer", one fraction), or use tersor.save, which holds every model',
    )  # fmt: skip
