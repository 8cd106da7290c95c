"""Students of other sizes: a factory's arguments, or a Hugging Face configuration, scaled in width and depth."""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from tersor.core.errors import InputError, user_code

_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim")  # the stream that heads divide
_HEADS = re.compile(r"^(num_|n_)?((encoder|decoder)_)?(attention_)?heads?$")
_SHARED_HEADS = re.compile(r"key_value_heads|kv_heads")
_INNER = re.compile(r"^(intermediate_size|d_ff|n_inner|hidden_dim|((encoder|decoder)_)?ffn_dim|ffn_hidden_size)$")
_DEPTH = re.compile(r"^(num_|n_)?((encoder|decoder)_)?(hidden_)?layers?$|^num_(encoder|decoder)_layers$")


def scaled(
    factory: Callable[..., nn.Module],
    width: float = 1.0,
    depth: float = 1.0,
    *,
    widths: Sequence[str] = (),
    depths: Sequence[str] = (),
    multiple: int = 1,
) -> Callable[..., nn.Module]:
    """The factory with the arguments ``widths`` times ``width`` and ``depths`` times ``depth``, each at least 1.

    Arguments are numbers or sequences of numbers, taken from a ``functools.partial``, else from the function's
    defaults; widths are rounded to multiples of ``multiple``, depths to whole numbers. The factory is called once,
    without allocating, to see that it builds.

    Raises InputError for factors that are not positive, arguments that the factory lacks or that hold no numbers, and
    where what is asked for does not build.

    >>> from functools import partial
    >>> half = scaled(partial(nn.Linear, in_features=8, out_features=6), 0.5, widths=["out_features"])
    >>> half()
    Linear(in_features=8, out_features=3, bias=True)
    """
    _check_factors(width, depth)
    asked = [(name, width, multiple, "widths") for name in widths] + [(name, depth, 1, "depths") for name in depths]
    if not asked:
        raise InputError("nothing is scaled", where="scaled", do="Name arguments: widths=['channels'], depths=[…]")
    known = _arguments(factory)
    changed = {}
    for name, factor, step, of in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or list(known)[:5]
            raise InputError("no such argument", where=f"scaled.{of}", got=name, do=f"Nearest: {', '.join(near)}")
        changed[name] = _times(known[name], factor, step, f"scaled.{of}, {name}")
    made = partial(factory, **changed)
    with user_code("the scaled factory fails", where="scaled", expected=f"it to build with {changed}"):
        with torch.device("meta"):
            made()
    return made


def scaled_config(config: Any, width: float = 1.0, depth: float = 1.0) -> Any:
    """A Hugging Face configuration of another size, for ``type(teacher)(scaled_config(teacher.config, 0.5, 0.5))``.

    Heads keep their size: with h heads of size s, h' = max(1, round(h · width)) and the hidden size is h' · s; the
    feed-forward width follows in proportion, rounded to a multiple of 8; key-value heads are the largest number that
    divides h' and is at most round(width · theirs). Layers: round(depth · theirs), at least 1; lists with an entry for
    each layer keep those of evenly spaced layers.

    Raises InputError for factors that are not positive, where the configuration has no field of a kind that is known
    here, and where the hidden size is no multiple of every number of heads.
    """
    _check_factors(width, depth)
    fields = config.to_dict()
    changes: dict[str, Any] = {}
    if width != 1:
        changes |= _narrower(fields, width, config)
    if depth != 1:
        changes |= _shallower(fields, depth, config)
    return type(config).from_dict({**copy.deepcopy(fields), **changes})


def _narrower(fields: Mapping[str, Any], width: float, config: Any) -> dict[str, Any]:
    hidden = {name: fields[name] for name in _HIDDEN if _is_size(fields.get(name))}
    heads = {name: value for name, value in fields.items() if _HEADS.match(name) and _is_size(value)}
    if not hidden or not heads:
        raise _unknown(config, "a hidden size and a number of heads")
    main, size = next(iter(hidden.items()))
    first = next(iter(heads.values()))
    new_heads = {name: max(1, math.floor(value * width + 0.5)) for name, value in heads.items()}
    new_size = size // first * next(iter(new_heads.values()))
    if any(new_size % count for count in new_heads.values()):
        raise InputError(
            "heads do not divide the hidden size", where=f"scaled_config.width={width}", got=f"{new_size}, {new_heads}",
            do="Choose a width at which every number of heads stays in proportion",
        )  # fmt: skip
    changes: dict[str, Any] = {main: new_size, **new_heads}
    for name, value in fields.items():
        if _INNER.match(name) and _is_size(value) and name != main:
            changes[name] = max(8, 8 * math.floor(value * new_size / size / 8 + 0.5))
        elif _SHARED_HEADS.search(name) and _is_size(value):
            most = max(1, math.floor(value * width + 0.5))
            changes[name] = max(n for n in range(1, most + 1) if next(iter(new_heads.values())) % n == 0)
    return changes


def _shallower(fields: Mapping[str, Any], depth: float, config: Any) -> dict[str, Any]:
    counts = {name: value for name, value in fields.items() if _DEPTH.match(name) and _is_size(value)}
    if not counts:
        raise _unknown(config, "a number of layers")
    changes: dict[str, Any] = {name: max(1, math.floor(value * depth + 0.5)) for name, value in counts.items()}
    lengths = {value: changes[name] for name, value in counts.items()}
    for name, value in fields.items():
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) in lengths:
            new = lengths[len(value)]
            changes[name] = [value[number * len(value) // new] for number in range(new)]
    return changes


def _unknown(config: Any, what: str) -> InputError:
    names = [name for name, value in config.to_dict().items() if _is_size(value)]
    return InputError(
        f"the configuration has no field that is known to be {what}", where=type(config).__name__, got=names,
        do="Scale the fields yourself: scaled(partial(build, …), widths=[…], depths=[…])",
    )  # fmt: skip


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_factors(width: float, depth: float) -> None:
    for name, factor in (("width", width), ("depth", depth)):
        if not 0 < factor < math.inf:
            raise InputError("must be positive", where=f"scaled.{name}", got=factor, expected="a number above 0")


def _arguments(factory: Callable[..., Any]) -> dict[str, Any]:
    """Names of a factory's arguments → their values: a partial's own, else the defaults (None where there is none)."""
    if isinstance(factory, partial):
        return {**_arguments(factory.func), **factory.keywords}
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def _times(value: Any, factor: float, multiple: int, where: str) -> Any:
    if _is_size(value):
        return multiple * max(1, math.floor(value * factor / multiple + 0.5))
    if isinstance(value, (tuple, list)) and value:
        return type(value)(_times(item, factor, multiple, where) for item in value)
    raise InputError("the argument holds no sizes", where=where, got=repr(value), expected="whole numbers above 0")
